"""Real runs of a benchmark on a small world: all items ranked beside candidates, controls beside the full model."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small_world
import tiny_models
from torch.nn import Linear

from recbole_mllm import run_benchmark
from recbole_mllm.benchmark.cases import write_cases
from recbole_mllm.benchmark.evidence import BEYOND
from recbole_mllm.benchmark.jobs import BenchmarkPlan, jobs_of
from recbole_mllm.benchmark.records import RECORDS, RunRecord, read_arrays, read_records
from recbole_mllm.benchmark.report import render
from recbole_mllm.benchmark.worker import parameters_trained, run_job
from recbole_mllm.data.atomic import read_atomic
from recbole_mllm.evaluation import full_ranking
from recbole_mllm.quick_start import make_config, run
from recbole_mllm.summaries.controls import other_images


def runs(place: Path, mode: str, *labels: str, **more: Any) -> dict[str, RunRecord]:
    arguments = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": mode}
    keys = {
        "data_path": str(place / "data"), "mllm": str(place / "llava"), "prompt_style": "demo",
        "item_summary_tokens": 3, "user_summary_tokens": 3, "finetune": "none", "eval_args": arguments,
        "retriever": "ItemKNN", "top_k": 6, "use_gpu": False, "metric_decimal_place": 7, "epochs": 1,
    }  # fmt: skip
    return ran(BenchmarkPlan("steps", labels, (3,), place / mode, overrides=keys | more))


def ran(plan: BenchmarkPlan) -> dict[str, RunRecord]:
    place = Path.cwd()
    for job in jobs_of(plan):
        job.folder.mkdir(parents=True)
        run_job(json.loads(json.dumps(job.order())))
        os.chdir(place)
    return {run.label: run for run in read_records(plan.output_dir / RECORDS)}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    small_world.write(tmp_path / "data")
    tiny_models.llava(tmp_path / "llava")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_a_run_ranks_beside_its_candidates_is_what_a_full_ranking_finds(place: Path) -> None:
    """Of general and sequential models and, as a retriever is named, of MLLMMSR."""
    labels = ("ItemKNN", "SASRec", "MLLMMSR")
    drawn, full = (runs(place, mode, *labels, summary_mode="none") for mode in ("uni20", "full"))
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
    found = runs(place, "uni20", "Pop", "MLLMMSR", retriever=None, summary_mode="none")
    assert found["Pop"].full_ranking is not None and found["Pop"].full_ranking["n_users"] == 10
    assert found["Pop"].n_users == small_world.USERS and found["MLLMMSR"].full_ranking is None


def test_the_seed_and_the_sample_of_users_of_a_config_file_are_those_of_its_runs(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "own.yaml").write_text("seed: 11\nlimit_users: 4\ndata_path: data\n")
    plans: list[BenchmarkPlan] = []
    monkeypatch.setattr("recbole_mllm.benchmark.runner.benchmark", lambda plan, **_: plans.append(plan) or [])
    run_benchmark("steps", "Pop", config_file_list=["own.yaml"], output_dir=place / "few")
    run_benchmark("steps", "Pop", config_file_list=["own.yaml"], output_dir=place / "more", seeds=[5],
                  config_dict={"limit_users": 6})  # fmt: skip
    few, more = (ran(plan)["Pop"] for plan in plans)
    assert (few.seed, few.n_users) == (11, 4) and (more.seed, more.n_users) == (5, 6)


@pytest.mark.slow
def test_controls_run_on_texts_of_their_own_where_texts_change_and_the_leaderboard_tests_them(place: Path) -> None:
    names = ("shuffled-history", "wrong-image", "wrong-summary", "no-history")
    found = runs(place, "uni20", "MLLMMSR", *(f"MLLMMSR:{name}" for name in names), retriever=None, limit_users=8)
    assert len({run.candidates for run in found.values()}) == 1 and all(run.ok for run in found.values())
    scores = {label: read_arrays(place / "uni20" / str(run.scores), ["score"])["score"] for label, run in found.items()}
    assert all((scores[f"MLLMMSR:{name}"] != scores["MLLMMSR"]).any() for name in names)
    folder = place / "data" / "steps"
    tags = {path.name for path in folder.glob("*.usum")}
    assert len(tags) == 3 and sum("shuffled-history" in tag or "wrong-image" in tag for tag in tags) == 2
    texts = {
        "wrong-image" in path.name: {row["item_id"]: row["summary"] for row in read_atomic(path)}
        for path in folder.glob("*.isum")
    }
    images = {small_world.item(n): Path(small_world.item(n)) for n in range(small_world.ITEMS)}
    swapped = {item: image.name for item, image in other_images(images, 2024).items()}
    both = [item for item in texts[True] if swapped[item] in texts[False]]
    assert both and all(texts[True][item] == texts[False][swapped[item]] for item in both)
    render(place / "uni20")
    told = json.loads((place / "uni20" / "leaderboard.json").read_text())
    assert {use["variant"] for use in told["uses"]} == found.keys() - {"MLLMMSR"}
    assert all(set(row["beyond"]) == set(BEYOND) for row in told["rows"])


# What a run keeps for the case studies: the history before the target, the texts, the images


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
