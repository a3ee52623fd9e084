"""MLLMMSR inside stock RecBole: registered, trained, saved, reloaded, and ranked by what it says and nothing else."""

import re

import pytest
import small_world
import torch
from recbole.config import Config
from recbole.quick_start import load_data_and_model, objective_function, run_recbole
from recbole.utils import get_trainer
from run_parts import prepared, run_keys, with_trainer

from recbole_mllm.cli import main
from recbole_mllm.common.errors import UserError
from recbole_mllm.model import summarizers
from recbole_mllm.model.sequential_recommender.mllmmsr import MLLMMSR
from recbole_mllm.model.summarizers import prepare_summaries


@pytest.fixture
def settings(place, monkeypatch):
    monkeypatch.chdir(place)
    few = {"item_summary_tokens": 3, "user_summary_tokens": 3, "train_last_k": 1, "limit_users": 8}
    return run_keys(place, mllm=str(place / "llava"), prompt_style="demo", **few)


def test_stock_run_recbole_trains_saves_and_reloads_and_its_seed_gives_the_same_numbers(settings, place):
    first, outcome = (run_recbole("MLLMMSR", "steps", config_dict=settings) for _ in range(2))
    assert 0 <= outcome["test_result"]["ndcg@10"] <= 1
    assert first["test_result"] == outcome["test_result"] and first["best_valid_score"] == outcome["best_valid_score"]
    saved = max((place / "saved").glob("MLLMMSR-*.pth"), key=lambda path: path.stat().st_mtime)
    assert (saved.with_suffix("") / "adapter_model.safetensors").is_file()
    state = torch.load(saved, weights_only=False)["state_dict"]
    assert state and all("lora_" in name for name in state)  # the base model is not in the checkpoint
    config, model, _, _, _, test = load_data_and_model(str(saved))
    again = get_trainer(config["MODEL_TYPE"], config["model"])(config, model).evaluate(test, load_best_model=False)
    assert dict(again) == dict(outcome["test_result"])


def test_hyper_tunings_objective_works(settings):
    found = objective_function({"model": "MLLMMSR", "dataset": "steps", **settings, "finetune": "none"})
    assert found["model"] == "MLLMMSR" and "ndcg@10" in found["test_result"]


def says_yes_to_the_next_item(prompts, answers, *, share_prefix):
    """Stand for an MLLM that says Yes to exactly the item after the last one the prompt speaks of."""
    out = []
    for prompt in prompts:
        candidate, *history = map(int, re.findall(r"title of i(\d\d)", prompt.text))
        out.append(float((history[-1] + 1) % small_world.ITEMS == candidate))
    return torch.tensor(out)


def test_a_planted_world_is_ranked_perfectly(settings):
    keys = {"summary_mode": "none", "finetune": "none", "score_cache": False}
    model, (*_, test), trainer = with_trainer(Config("MLLMMSR", "steps", config_dict=settings | keys))
    model.mllm.yes_scores = says_yes_to_the_next_item
    found = trainer.evaluate(test, load_best_model=False)
    assert found["hit@3"] == found["mrr@10"] == found["ndcg@10"] == found["gauc"] == 1.0


def test_questions_that_were_shortened_are_told_once(settings, caplog):
    keys = {
        "summary_mode": "none",
        "item_summary": "none",
        "use_image": False,
        "finetune": "none",
        "show_progress": False,
    }
    told = r"(\d+) questions were over max_text_tokens = {}, or the model's positions"
    for limit, found in ((60, 1), (400, 0)):
        caplog.clear()
        run_recbole("MLLMMSR", "steps", config_dict=settings | keys | {"max_text_tokens": limit})
        assert len(re.findall(told.format(limit), caplog.text)) == found


def test_summaries_are_exported_and_off_accepts_them_but_makes_none(settings, place):
    run_recbole("MLLMMSR", "steps", config_dict=settings | {"finetune": "none"})
    assert list((place / "data" / "steps").glob("steps.*.isum")) and list(
        (place / "data" / "steps").glob("steps.*.usum")
    )
    run_recbole("MLLMMSR", "steps", config_dict=settings | {"finetune": "none", "summarize": "off"})
    with pytest.raises(UserError, match="summarize is off"):
        run_recbole("MLLMMSR", "steps", config_dict=settings | {"summarize": "off", "user_summary_tokens": 4})


def test_summaries_can_be_a_step_of_their_own(settings, monkeypatch):
    config = Config("MLLMMSR", "steps", config_dict=settings | {"finetune": "none"})
    _, (train, *_) = prepared(config)
    summaries = prepare_summaries(config, train._dataset)
    again = "recbole_mllm.model.sequential_recommender.mllmmsr.prepare_summaries"
    monkeypatch.setattr(again, lambda *_: pytest.fail("prepared twice"))
    model = MLLMMSR(config, train._dataset, summaries)
    assert model.preferences is summaries
    with pytest.raises(UserError, match="the checkpoint belongs to other#1, not to llava"):
        model.load_other_parameter({"base": "other#1"})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"eval_args": {"mode": "full", "order": "TO"}}, "set retriever: SASRec"),
        ({"lora_rnk": 4}, "unknown key 'lora_rnk' in config_dict; did you mean lora_"),
        (
            {"mllm": "server:m@http://127.0.0.1:9/v1", "finetune": "none", "server_scoring": "rerank"},
            "needs a prompt_style with <Instruct>, <Query> and <Document>",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_loaded(settings, keys, message, monkeypatch):
    monkeypatch.setattr(summarizers, "refresh", lambda *_: pytest.fail("summaries were made"))
    with pytest.raises(UserError, match=message):
        run_recbole("MLLMMSR", "steps", config_dict=settings | keys)


def test_missing_images_are_told_before_any_summary_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small_world.write(tmp_path / "dataset", images=False)
    for words in (["summarize"], ["--model", "MLLMMSR"]):
        assert main([*words, "--dataset", "steps", "--mllm=tiny"]) == 2
        assert "no item has an image" in capsys.readouterr().err
    assert not list((tmp_path / "dataset" / "steps").glob("*sum")) + list((tmp_path / "dataset").rglob("*.sqlite"))
