"""What a run of MLLMMSR really keeps for the case studies: the history before the target, the texts, the images."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import small_world
import tiny_models
from torch.nn import Linear

from recbole_mllm.benchmark.cases import write_cases
from recbole_mllm.benchmark.worker import parameters_trained
from recbole_mllm.quick_start import make_config, run


def test_a_real_run_keeps_what_its_test_rows_read_and_no_more(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_world.write(tmp_path / "data")
    keys = {
        "data_path": str(tmp_path / "data"), "checkpoint_dir": str(tmp_path / "saved"), "show_progress": False,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "frozen_candidates": True, "epochs": 1, "seed": 7,
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "uni20", "group_by": "user"},
        "mllm": str(tiny_models.llava(tmp_path / "llava")), "prompt_style": "demo", "item_summary_tokens": 3,
        "user_summary_tokens": 3, "finetune": "none",
    }  # fmt: skip
    outcome = run(make_config("MLLMMSR", "steps", [], keys))
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


def test_a_baseline_keeps_no_cases_and_only_what_learns_is_counted(tmp_path):
    assert write_cases(SimpleNamespace(preferences=None), tmp_path) is None and not list(tmp_path.iterdir())
    linear, frozen = Linear(4, 2), Linear(4, 2).requires_grad_(False)
    assert parameters_trained(linear) == 10 and parameters_trained(frozen) == 0
    linear.type = SimpleNamespace(name="TRADITIONAL")  # as RecBole calls Pop, whose one parameter is a stand-in
    assert parameters_trained(linear) == 0
