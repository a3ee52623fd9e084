"""A record is enough to do its run again, and what does not hold is said plainly."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import small_world
import torch
from planted_runs import plant_run

from recbole_mllm.benchmark.jobs import BenchmarkPlan
from recbole_mllm.benchmark.records import RECORDS, append, read_records
from recbole_mllm.benchmark.rerun import TOLERANCE, compare, find_run, order_of, rerun
from recbole_mllm.benchmark.runner import benchmark
from recbole_mllm.benchmark.worker import share_cores
from recbole_mllm.cli import main
from recbole_mllm.common.errors import UserError


def planted(folder: Path, label: str = "SASRec", **changes):
    record = plant_run(folder, label, 1.0, versions={"torch": "2"}, device="cpu", **changes)
    append(folder / RECORDS, record)
    return record


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """A finished, tuned run of BPR on half of the cores; its config file is gone, as the record must suffice."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    small_world.write(tmp_path, images=False)
    config = tmp_path / "mine.yaml"
    config.write_text("epochs: 2\nload_col: {inter: [user_id, item_id, timestamp]}\n")
    results = tmp_path / "results"
    overrides = {"data_path": str(tmp_path), "embedding_size": 16}
    benchmark(BenchmarkPlan("steps", ("BPR",), (7,), results, (str(config),), overrides, 2, tune=3), tell=print)
    config.unlink()
    (record,) = read_records(results / RECORDS)
    assert record.metrics
    return results, record


def test_a_trained_run_is_repeated_to_the_last_digit(ran):
    results, first = ran
    assert find_run(first.run_id, results) == (results, first)
    assert len(first.tuning["trials"]) == 3 and first.tuning["metric"] == "NDCG@10"
    best = max(first.tuning["trials"], key=lambda trial: trial["valid"])
    assert first.tuning["chosen"] == best["settings"] and "embedding_size" not in first.tuning["space"]
    for key, value in best["settings"].items():
        assert first.config[key] == value
    again = rerun(results, first)
    assert again.agree and "every metric must be equal" in again.lines[0], again.lines  # so as many threads, too
    assert read_records(results / RECORDS) == [first], "the leaderboard's records stay as they are"
    second = read_records(results / "reruns" / RECORDS)[0]
    assert second.metrics == first.metrics and second.config["embedding_size"] == 16 and second.config["epochs"] == 2
    assert second.tuning is None, "the choice is repeated, not the search"


def test_runs_at_the_same_time_share_the_cores(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for job in ({"jobs": 1}, {"jobs": 3}, {"jobs": 16}, {"threads": 5}):
        share_cores(job)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    share_cores({"jobs": 2})
    assert given == [8, 2, 1, 5]
    record = planted(tmp_path, config={"data_path": str(tmp_path)}, dataset="demo")
    record = replace(record, versions={"machine": "Linux CPU, 3 threads, GPU"})
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert order_of(record, tmp_path)["threads"] == 3
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert order_of(record, tmp_path)["threads"] == 2


def test_equal_surroundings_ask_for_equal_numbers_and_others_for_near_ones(tmp_path):
    record = planted(tmp_path)
    shifted = {name: value + TOLERANCE / 2 for name, value in record.metrics.items()}
    assert compare(record, record).agree
    here = compare(record, replace(record, metrics=shifted))
    assert not here.agree and sum("DISAGREES" in line for line in here.lines) == len(record.metrics)
    there = compare(record, replace(record, metrics=shifted, versions={"torch": "3"}))
    assert there.agree and str(TOLERANCE) in there.lines[0] and "  torch: 2 then, 3 now" in there.lines
    far = {name: value + 2 * TOLERANCE for name, value in record.metrics.items()}
    assert not compare(record, replace(record, metrics=far, device="cuda")).agree
    fewer = {"NDCG@10": record.metrics["NDCG@10"]}
    assert not compare(record, replace(record, metrics=fewer)).agree


def test_dropout_by_content_is_named_where_it_made_the_difference(tmp_path):
    old = {"torch": "2", "recbole_mllm": "0.1.0"}
    config = {"finetune": "lora", "lora_dropout": 0.05, "epochs": 1}
    before = replace(planted(tmp_path, "MLLMMSR"), config=config, versions=old)
    far = {name: value + 2 * TOLERANCE for name, value in before.metrics.items()}
    now = replace(before, metrics=far, versions=old | {"recbole_mllm": "0.2.0"})
    assert any("agrees with lora_dropout: 0 alone" in line for line in compare(before, now).lines)
    for same in ({"finetune": "none"}, {"lora_dropout": 0}, {"finetune": "full"}):
        lines = compare(replace(before, config=config | same), now).lines
        assert not any("lora_dropout" in line for line in lines)
    assert not any("lora_dropout" in line for line in compare(now, now).lines)


def test_a_run_is_found_below_results_and_an_unknown_one_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    record = planted(Path("results/a"))
    planted(Path("results/a/reruns"), run_id=record.run_id)
    assert find_run(record.run_id) == (Path("results/a"), record)
    assert main(["rerun", "nothing"]) == 2
    assert capsys.readouterr().err.startswith("recbole-mllm: no run 'nothing'")
    with pytest.raises(UserError, match=f"did you mean {record.run_id}"):
        find_run(record.run_id[:-1])
    with pytest.raises(UserError, match=r"no runs\.jsonl|holds no"):
        find_run(record.run_id, tmp_path)
    planted(Path("results/b"))
    with pytest.raises(UserError, match="results/a, results/b; say which"):
        find_run(record.run_id)
    failed = replace(record, run_id="broken", status="out of memory", metrics={})
    append(Path("results/a") / RECORDS, failed)
    with pytest.raises(UserError, match="out of memory"):
        find_run("broken")


def test_a_dataset_that_has_moved_is_asked_for(tmp_path):
    record = planted(tmp_path, config={"data_path": str(tmp_path / "old" / "steps"), "limit_users": 5}, dataset="steps")
    with pytest.raises(UserError, match="--data_path"):
        order_of(record, tmp_path)
    (tmp_path / "new" / "steps").mkdir(parents=True)
    order = order_of(record, tmp_path, str(tmp_path / "new"))
    assert order["overrides"] == {"data_path": str(tmp_path / "new")} and order["limit_users"] == 5


def test_a_repetition_that_crashes_disagrees_and_says_why(tmp_path):
    record = planted(tmp_path, config={"data_path": str(tmp_path / "demo")}, dataset="demo")
    script = "raise MemoryError('too small')"
    found = rerun(tmp_path, record, worker=(sys.executable, "-c", script))
    assert not found.agree and "MemoryError: too small" in found.lines[0]
