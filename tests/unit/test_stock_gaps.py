"""What stock RecBole stops at, or passes over, between a dataset and its metrics."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import small_world

import recbole_mllm  # noqa: F401  (registers the shims)
from recbole_mllm.errors import UserError
from recbole_mllm.quick_start import make_config, run


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("sys.argv", ["run"])
    monkeypatch.chdir(tmp_path)
    small_world.write(tmp_path / "dataset")
    load = {"inter": ["user_id", "item_id", "timestamp"]}
    return {"epochs": 1, "hidden_size": 8, "load_col": load, "show_progress": False, "checkpoint_dir": "saved"}


def test_metrics_that_count_items_are_measured(keys: dict[str, Any]) -> None:
    several = ["NDCG", "ItemCoverage", "GiniIndex", "ShannonEntropy", "AveragePopularity", "TailPercentage"]
    config = make_config(
        "SASRec", "steps", [], keys | {"metrics": several, "topk": 60, "valid_metric": "itemcoverage@60"}
    )
    found = run(config).test
    # the best 60 of 60 items are all of them, which RecBole counts 61 with the padding, each as often as the others
    assert found["ItemCoverage@60"] == pytest.approx(60 / 61, abs=1e-4)
    assert found["GiniIndex@60"] == pytest.approx(1 / 61, abs=1e-4)
    assert found["AveragePopularity@60"] > 0


def test_a_saved_dataset_is_split_as_this_run_says(keys: dict[str, Any]) -> None:
    split = {"split": {"RS": [8, 1, 1]}, "order": "RO", "group_by": "user", "mode": "full"}
    run(make_config("BPR", "steps", [], keys | {"save_dataset": True, "eval_args": split, "epochs": 0}))
    assert Path("saved/steps-Dataset.pth").is_file()
    now = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "uni5"}
    done = run(make_config("Pop", "steps", [], keys | {"eval_args": now, "frozen_candidates": True}))
    assert done.pairs is not None
    hits = done.pairs["label"] > 0
    users, items = (done.dataset.id2token(f, done.pairs[f][hits]) for f in ("user_id", "item_id"))
    assert sorted(users) == [f"u{n:02d}" for n in range(small_world.USERS)]
    assert list(items) == [small_world.item(2 * int(u[1:]) + small_world.LENGTH - 1) for u in users]  # the last of each
    later = Path("saved/steps-Dataset.pth").stat().st_mtime + 9
    os.utime("dataset/steps/steps.inter", (later, later))
    with pytest.raises(UserError, match=r"steps\.inter is newer than saved/steps-Dataset\.pth"):
        run(make_config("Pop", "steps", [], keys))
