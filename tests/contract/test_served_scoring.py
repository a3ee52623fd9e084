"""A fine-tuned model, exported and served by a real `transformers serve`: its scores and texts are this process's."""

import json
import logging
import os
import shutil

import pytest
import small_world
import torch
from huggingface_hub import ModelCard
from PIL import Image
from planted_writers import answers_of
from recbole.quick_start import load_data_and_model, run_recbole
from run_parts import run_keys
from stock_forward import STYLE
from transformers import AutoModelForImageTextToText
from transformers.decision import DecisionConfig
from transformers.pipelines import DecisionPipeline
from transformers_serve import TransformersServe

from recbole_mllm.cli import main
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.model_names import parse_endpoint, source_of
from recbole_mllm.common.prompts import (
    fused_summary_prompt,
    image_summary_prompt,
    item_line,
    preference_prompt,
    recommend_prompt,
    text_summary_prompt,
)
from recbole_mllm.common.settings import ServerSettings
from recbole_mllm.mllm.interface import Decoding
from recbole_mllm.mllm.loading import load_processor
from recbole_mllm.mllm.server import ServerModel
from recbole_mllm.mllm.server_scoring import ServedScorer, decision_request
from recbole_mllm.training.model_export import export, model_card

pytest.importorskip("openai")
pytest.importorskip("uvicorn")

SERVERS = ServerSettings(4, 60.0, 90.0, None)
SOURCE = source_of("tiny")
LENGTH = Decoding(14)
KEY = "sk-no-file-may-hold-this"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data, and the checkpoint of a few large steps of LoRA on the bundled model."""
    place = tmp_path_factory.mktemp("served")
    small_world.write(place / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        run_recbole("MLLMMSR", "steps", config_dict=_settings(place))
    (path,) = (place / "saved").glob("MLLMMSR-*.pth")
    return path


def _settings(place, **more):
    few = {"train_last_k": 1, "limit_users": 6, "train_batch_size": 4, "learning_rate": 0.02}
    few |= {"item_summary_tokens": 8, "user_summary_tokens": 8, "mllm": "tiny"}
    return run_keys(place, **few | {"seed": 3} | more)


@pytest.fixture(scope="module")
def local(trained):
    with pytest.MonkeyPatch.context() as patch:
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


@pytest.fixture(scope="module")
def summaries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    kinds = {"red.png": ("RGB", "red"), "blue.jpg": ("RGB", "blue"), "half.png": ("RGBA", (0, 128, 0, 128))}
    paths = []
    for name, (mode, colour) in kinds.items():
        Image.new(mode, (48, 64), colour).save(folder / name)
        paths.append(folder / name)
    lines = [item_line(STYLE, f"Mug {n}", "A red plain mug, wood scene.") for n in range(3)]
    return [
        *(image_summary_prompt(STYLE, path) for path in paths),
        *(text_summary_prompt(STYLE, f"Title {n} of ünïcode") for n in range(4)),
        fused_summary_prompt(STYLE, "a red mug", "Mug"),
        preference_prompt(STYLE, lines, None),
        preference_prompt(STYLE, lines, "The user prefers red."),
    ]


def test_text_and_image_prompts_are_answered_as_in_this_process(served, local, summaries):
    here = [answers_of(local.mllm, [prompt], LENGTH)[0] for prompt in summaries]
    there = answers_of(ServerModel(parse_endpoint(served.endpoint, "item_summarizer"), SERVERS), summaries, LENGTH)
    assert [a.text for a in there] == [a.text for a in here]
    assert [a.prompt_tokens for a in there] == [a.prompt_tokens for a in here]
    assert len({a.text for a in here}) > 4  # they do depend on the prompt
    assert all(a.truncated == (a.new_tokens >= LENGTH.max_new_tokens) for a in there)
    assert {a.truncated for a in there} == {True, False}


def test_a_model_it_does_not_serve_is_refused_with_its_own_words(served, summaries):
    other = parse_endpoint(served.endpoint.replace(str(served.model), "another/model"), "item_summarizer")
    with pytest.raises(UserError, match="Server is pinned to"):
        answers_of(ServerModel(other, SERVERS), summaries[3:6], LENGTH)


def test_summaries_made_through_a_server_need_no_server_once_imported(served, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own would stand in the way of a run's log file
    for name in "ab":
        small_world.write(tmp_path / "dataset" / name)
        shutil.move(tmp_path / "dataset" / name / "steps", tmp_path / "dataset" / "steps")
        words = f"summarize --dataset steps --limit_users 3 --train_last_k=1 --item_summarizer={served.endpoint}"
        words += f" --user_summarizer={served.endpoint} --prompt_style=demo"
        words += " --item_summary_tokens=10 --user_summary_tokens=12"
        if name == "a":
            assert main(words.split()) == 0
            assert main(["store", "export", "steps", "--out", "published.jsonl.gz"]) == 0
            made = {p.name: p.read_bytes() for p in (tmp_path / "dataset" / "steps").glob("*.?sum")}
            shutil.move(tmp_path / "dataset" / "steps", tmp_path / "gone")
        else:
            assert main(["store", "import", "steps", "published.jsonl.gz"]) == 0
            assert main(words.replace(str(served.port), "9").split() + ["--summarize=off"]) == 0
            assert made == {p.name: p.read_bytes() for p in (tmp_path / "dataset" / "steps").glob("*.?sum")}
    assert len(made) == 2 and all(len(data.splitlines()) > 10 for data in made.values())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".log" for path in files)
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


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
    hub = {"base": "org/name", "base_identity": "org/name@main"}
    assert ModelCard(model_card(about | hub, STYLE)).data.base_model == "org/name"
    (copy / "README.md").write_text("served on host 7")
    capsys.readouterr()
    assert main(["export", str(trained), "--out", str(copy)]) == 2
    assert "README.md was changed after it was written" in capsys.readouterr().err
    assert (copy / "README.md").read_text() == "served on host 7" and (copy / "notes.txt").is_file()


@pytest.mark.slow
def test_a_fully_tuned_run_exports_the_whole_model(trained, tmp_path, monkeypatch):
    place = trained.parent.parent
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
