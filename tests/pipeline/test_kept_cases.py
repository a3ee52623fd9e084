"""What a run of MLLMMSR really keeps for the case studies: the history before the target, the texts, the images."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import small_world
import tiny_models

from recbole_mllm.benchmark.cases import write_cases
from recbole_mllm.benchmark.worker import parameters_trained
from recbole_mllm.quick_start import make_config, run


def _outcome(folder: Path, model: str, monkeypatch, **keys):
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.chdir(folder)
    settings = {
        "data_path": str(folder / "data"), "checkpoint_dir": str(folder / "saved"), "show_progress": False, "seed": 7,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "frozen_candidates": True, "epochs": 1,
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "uni20", "group_by": "user"},
    }  # fmt: skip
    return run(make_config(model, "steps", [], settings | keys))


def test_a_real_run_keeps_what_its_test_rows_read_and_no_more(tmp_path, monkeypatch):
    small_world.write(tmp_path / "data")
    tiny_models.llava(tmp_path / "llava")
    outcome = _outcome(
        tmp_path, "MLLMMSR", monkeypatch, mllm=str(tmp_path / "llava"), prompt_style="demo", item_summary_tokens=3,
        user_summary_tokens=3, finetune="none",
    )  # fmt: skip
    path = write_cases(outcome, tmp_path)
    assert path is not None
    kept = json.loads(path.read_text())
    assert len(kept["users"]) == small_world.USERS
    for case in kept["users"]:
        start = 2 * int(case["user"][1:])
        walk = [small_world.item(start + t) for t in range(small_world.LENGTH)]
        assert case["history"] == walk[:-1] and case["target"] == walk[-1]
        assert [(step["since"], step["seen"]) for step in case["steps"]] == [(0, 3), (3, 6)]
        assert case["steps"][-1]["text"] == case["read"]
        assert case["target"] in kept["items"]
    assert kept["items"]["i00"] == {"title": "title of i00", "image": "images/i00.png"}
    users = np.asarray(outcome.dataset.field2id_token["user_id"]).astype(str)
    assert {case["user"] for case in kept["users"]} == set(users[outcome.pairs["user_id"]])
    assert not list(tmp_path.glob(".cases*"))


def test_a_baseline_keeps_none_and_pop_trains_nothing(tmp_path, monkeypatch):
    small_world.write(tmp_path / "data", images=False)
    outcome = _outcome(tmp_path, "Pop", monkeypatch)
    assert write_cases(outcome, tmp_path) is None and not (tmp_path / "cases.json").exists()
    assert parameters_trained(outcome.model) == 0
    assert parameters_trained(_outcome(tmp_path, "BPR", monkeypatch, embedding_size=4).model) == 4 * (31 + 61)
