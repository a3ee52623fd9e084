"""Beside drawn candidates a benchmark's run ranks all items: with the numbers that a full ranking has."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import small_world
import tiny_models

from recbole_mllm.benchmark.jobs import BenchmarkPlan, jobs_of
from recbole_mllm.benchmark.records import RECORDS, RunRecord, read_records
from recbole_mllm.benchmark.worker import run_job
from recbole_mllm.evaluation import full_ranking


def runs(place: Path, mode: str, *labels: str, **more: Any) -> dict[str, RunRecord]:
    arguments = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": mode}
    keys = {
        "data_path": str(place / "data"), "mllm": str(place / "llava"), "prompt_style": "demo",
        "item_summary_tokens": 3, "user_summary_tokens": 3, "finetune": "none", "eval_args": arguments,
        "retriever": "ItemKNN", "top_k": 6, "use_gpu": False, "metric_decimal_place": 7, "epochs": 1,
    }  # fmt: skip
    plan = BenchmarkPlan("steps", labels, (3,), place / mode, overrides=keys | more)
    for job in jobs_of(plan):
        job.folder.mkdir(parents=True)
        run_job(json.loads(json.dumps(job.order())))
        os.chdir(place)
    return {run.label: run for run in read_records(place / mode / RECORDS)}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    small_world.write(tmp_path / "data")
    tiny_models.llava(tmp_path / "llava")
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_a_run_ranks_beside_its_candidates_is_what_a_full_ranking_finds(place: Path) -> None:
    """Of general and sequential models and, as a retriever is named, of MLLMMSR."""
    labels = ("ItemKNN", "SASRec", "MLLMMSR")
    drawn, full = runs(place, "uni20", *labels), runs(place, "full", *labels)
    for label in labels:
        beside = drawn[label].full_ranking
        assert beside is not None and beside["n_users"] == small_world.USERS and full[label].full_ranking is None
        assert beside["metrics"] == full[label].metrics, label
        assert drawn[label].retrieval is None and "AUC" in drawn[label].metrics
        assert (beside["retrieval"] is None) == (label != "MLLMMSR")
    told, theirs = drawn["MLLMMSR"].full_ranking, full["MLLMMSR"].retrieval
    assert told is not None and theirs is not None and told["retrieval"]["top_k"] == 6
    assert told["retrieval"]["recall"] == theirs["recall"] and drawn["MLLMMSR"].train_s is None


def test_of_many_users_a_sample_is_ranked_and_mllmmsr_without_a_retriever_ranks_none(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full_ranking, "MOST_SCORES", 10 * (small_world.ITEMS + 1))
    found = runs(place, "uni20", "Pop", "MLLMMSR", retriever=None)
    assert found["Pop"].full_ranking is not None and found["Pop"].full_ranking["n_users"] == 10
    assert found["Pop"].n_users == small_world.USERS and found["MLLMMSR"].full_ranking is None
