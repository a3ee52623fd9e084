"""A fine-tuned model exported, served by a real `transformers serve`, and asked there: the scores of this process."""

import json
import os
import shutil
import sys

import pytest
import small_world
import torch
from huggingface_hub import ModelCard
from recbole.quick_start import load_data_and_model, run_recbole
from stock_forward import STYLE
from transformers import AutoModelForImageTextToText
from transformers.decision import DecisionConfig
from transformers.pipelines import DecisionPipeline
from transformers_serve import TransformersServe

from recbole_mllm.cli import main
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.model_names import parse_endpoint, source_of
from recbole_mllm.common.prompts import recommend_prompt
from recbole_mllm.common.settings import ServerSettings
from recbole_mllm.mllm.loading import load_processor
from recbole_mllm.mllm.server_scoring import ServedScorer, decision_request
from recbole_mllm.training.model_export import export, model_card

pytest.importorskip("openai")
pytest.importorskip("uvicorn")

SERVERS = ServerSettings(4, 60.0, 90.0, None)
SOURCE = source_of("tiny")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data, and the checkpoint of a few large steps of LoRA on the bundled model."""
    place = tmp_path_factory.mktemp("served")
    small_world.write(place / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pytest"])
        patch.chdir(place)
        run_recbole("MLLMMSR", "steps", config_dict=_settings(place))
    (path,) = (place / "saved").glob("MLLMMSR-*.pth")
    return path


def _settings(place, **more):
    return {
        "data_path": str(place / "data"),
        "checkpoint_dir": str(place / "saved"),
        "mllm": "tiny",
        "item_summary_tokens": 8,
        "user_summary_tokens": 8,
        "learning_rate": 0.02,
        "train_last_k": 1,
        "limit_users": 6,
        "train_batch_size": 4,
        "show_progress": False,
        "seed": 3,
    } | more


@pytest.fixture(scope="module")
def local(trained):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pytest"])
        patch.chdir(trained.parent.parent)
        _, model, *_ = load_data_and_model(str(trained))
    model.load_state_dict(torch.load(trained, weights_only=False)["state_dict"])
    return model.eval()


@pytest.fixture(scope="module")
def prompts(local, trained):
    """Questions with images and without, and a title that spells the model's special tokens."""
    images = sorted((trained.parent.parent / "data" / "steps" / "images").iterdir())
    likes = ["The user prefers red.", "The user is new."]
    titles = ["a plain mug", "Ünïcode 'mug', \"set of 3\"", "a <image-1> mug"]
    return [
        recommend_prompt(local.style, preference, title, image)
        for preference in likes
        for title in titles
        for image in (images[0], images[-1], None)
    ]


@pytest.fixture(scope="module")
def merged(trained):
    out = trained.parent.parent / "merged"
    assert main(["export", str(trained), "--out", str(out), "--merge"]) == 0
    return out


@pytest.fixture(scope="module")
def served(merged, tmp_path_factory):
    with TransformersServe(merged, tmp_path_factory.mktemp("hub")) as server:
        yield server


def test_a_served_export_says_yes_as_likely_as_this_process(served, local, prompts, caplog):
    here = local.mllm.yes_scores(prompts, local.answers).sigmoid()
    scorer = ServedScorer(parse_endpoint(served.endpoint, "mllm"), SERVERS)
    there = scorer.yes_scores(prompts, scorer.answers(local.style)).sigmoid()
    torch.testing.assert_close(there, here, atol=1e-4, rtol=0)
    assert here.max() - here.min() > 0.01  # they do depend on the prompt
    assert scorer.tokens_read == sum(len(e.ids) for e in local.mllm.encode(prompts))
    assert "adds words of its own" not in caplog.text


def test_recbole_ranks_by_a_served_model_as_by_the_trained_one(served, local, trained, monkeypatch):
    place = trained.parent.parent
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.chdir(place)
    here = _settings(place, resume=str(trained))
    there = _settings(place, mllm=served.endpoint, finetune="none", prompt_style="demo", resume=None)
    there |= {"item_summarizer": "tiny", "user_summarizer": "tiny", "checkpoint_dir": str(place / "other")}
    first, second = (run_recbole("MLLMMSR", "steps", config_dict=one)["test_result"] for one in (here, there))
    assert dict(first) == dict(second)
    (path,) = (place / "other").glob("*.pth")
    saved = torch.load(path, weights_only=False)
    assert saved["other_parameter"] == {"base": f"server:{served.model}"} and not saved["state_dict"]
    with pytest.raises(UserError, match="its model is behind a server, so there is nothing here to export"):
        export(str(path), place / "nothing", merge=True)


def test_an_adapter_export_is_read_by_transformers_and_scores_alike(trained, local, prompts, tmp_path):
    assert main(["export", str(trained.with_suffix("")), "--out", str(tmp_path / "adapter")]) == 0
    files = set(os.listdir(tmp_path / "adapter"))
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    pipe = DecisionPipeline(
        model=AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval(),
        tokenizer=local.mllm.encoder.tokenizer,
        processor=load_processor(str(tmp_path / "adapter")),
        decision_config=DecisionConfig.from_file(tmp_path / "adapter" / "decision.json"),
    )
    here = local.mllm.yes_scores(prompts, local.answers).sigmoid()
    there = [pipe(decision_request("m", prompt))["answer"]["noul"] for prompt in prompts]
    torch.testing.assert_close(torch.tensor(there), here, atol=1e-4, rtol=0)


def test_an_export_replaces_an_export_and_nothing_else(merged, trained, tmp_path, capsys):
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("text")
    assert main(["export", str(trained), "--out", str(foreign)]) == 2
    assert "already holds thesis.tex and is not an export" in capsys.readouterr().err
    assert os.listdir(foreign) == ["thesis.tex"]
    copy = tmp_path / "copy"
    shutil.copytree(merged, copy)
    (copy / "notes.txt").write_text("the user's own")
    assert main(["export", str(trained), "--out", str(copy)]) == 0  # an adapter, where a whole model was
    named = {entry["file"] for entry in json.loads((copy / "export.json").read_text())["outputs"]}
    assert set(os.listdir(copy)) == named | {"export.json", "notes.txt"}
    assert "adapter_config.json" in named and not named & {"config.json", "model.safetensors"}
    card = ModelCard.load(copy / "README.md")
    assert card.data.library_name == "peft" and card.data.base_model is None  # a path here, and no id on the hub
    about = json.loads((copy / "export.json").read_text())
    assert ModelCard(model_card(about | {"base": "org/name"}, STYLE)).data.base_model == "org/name"
    (copy / "README.md").write_text("served on host 7")
    capsys.readouterr()
    assert main(["export", str(trained), "--out", str(copy)]) == 2
    assert "README.md was changed after it was written" in capsys.readouterr().err
    assert (copy / "README.md").read_text() == "served on host 7" and (copy / "notes.txt").is_file()


def test_a_fully_tuned_run_exports_the_whole_model(trained, tmp_path, monkeypatch):
    place = trained.parent.parent
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.chdir(place)
    more = {"finetune": "full", "checkpoint_dir": str(tmp_path / "saved"), "learning_rate": 0.001}
    run_recbole("MLLMMSR", "steps", config_dict=_settings(place, **more))
    (path,) = (tmp_path / "saved").glob("*.pth")
    export(str(path), tmp_path / "out", merge=False)
    models = (AutoModelForImageTextToText.from_pretrained(p, dtype=torch.float32) for p in (SOURCE, tmp_path / "out"))
    bare, exported = (dict(model.named_parameters()) for model in models)  # tied weights once
    kept = torch.load(path, weights_only=False)["state_dict"]
    assert exported.keys() == bare.keys() and kept
    assert all(torch.equal(exported[name], kept.get(name, bare[name])) for name in exported)
    assert any(not torch.equal(exported[name], bare[name]) for name in exported)
