"""A fused row from request to report: its parts run first, their kept scores make it, or the row says why not."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted_runs import N_CANDIDATES, plant_run
from scipy import stats

from recbole_mllm.benchmark.fusing import fuse_runs
from recbole_mllm.benchmark.jobs import BenchmarkPlan
from recbole_mllm.benchmark.records import RECORDS, RunRecord, append, latest, read_arrays, read_records
from recbole_mllm.benchmark.report import render
from recbole_mllm.benchmark.rerun import find_run, rerun
from recbole_mllm.benchmark.runner import benchmark
from recbole_mllm.benchmark.setups import setup_of
from recbole_mllm.benchmark.variants import expand, resolve
from recbole_mllm.common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FUSED = "MLLMMSR+SASRec"
WORKER = f"""
import json, sys
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}]
from recbole_mllm.benchmark.records import append
from recbole_mllm.benchmark.worker import run_job
from tests.planted_runs import plant_run
job = json.loads(Path(sys.argv[1]).read_text())
out = Path(job["output_dir"])
with (out / "started.txt").open("a") as file:
    file.write(job["label"] + "\\n")
if "parts" in job:
    run_job(job)
else:
    power = {{"SASRec": 1.5, "MLLMMSR": 1.4, "Pop": 0.0}}[job["label"]]
    config = {{"topk": [3, 5, 10], "metrics": ["Hit", "MRR", "NDCG", "Recall", "GAUC"], "metric_decimal_place": 6}}
    record = plant_run(out, job["label"], power, job["kind"], job["seed"], run_id=job["run_id"], config=config,
                       n_users=300, keep_valid=job["keep_valid"],
                       started=job["overrides"].get("started", "2026-01-01"))
    append(out / "runs.jsonl", record)
"""


def run(results: Path, *labels: str, **changes: Any) -> dict[tuple[str, int], RunRecord]:
    values: dict[str, Any] = {"dataset": "demo", "labels": labels, "seeds": (1, 2), "output_dir": results}
    benchmark(BenchmarkPlan(**(values | changes)), (sys.executable, str(results.parent / "worker.py")), str)
    return records(results)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a benchmark of the fused row, which nobody changes."""
    folder = tmp_path_factory.mktemp("fused")
    (folder / "worker.py").write_text(WORKER)
    run(folder / "results", *expand(FUSED), jobs=2)
    return folder / "results"


@pytest.fixture
def results(finished: Path, tmp_path: Path) -> Path:
    """A copy of them."""
    shutil.copytree(finished.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / "results"


def records(results: Path) -> dict[tuple[str, int], RunRecord]:
    return {(record.label, record.seed): record for record in latest(read_records(results / RECORDS)).values()}


def by_user(results: Path, path: str | None) -> tuple[np.ndarray, ...]:
    """Return items, labels, scores and places of a file of scores, ``[users, candidates]`` in one order."""
    arrays = read_arrays(results / str(path), ("user", "item", "label", "score", "place"))
    order = np.lexsort((arrays["item"], arrays["user"]))
    columns = (arrays[name][order].reshape(-1, N_CANDIDATES) for name in ("item", "label", "score", "place"))
    return tuple(columns)


def test_the_parts_run_first_and_the_row_is_what_their_kept_scores_make(finished):
    results, runs = finished, records(finished)
    assert sorted(runs) == [(label, seed) for label in ("MLLMMSR", FUSED, "SASRec") for seed in (1, 2)]
    assert (results / "started.txt").read_text().split()[-2:] == [FUSED] * 2
    for seed in (1, 2):
        fused, mllm, sasrec = (runs[label, seed] for label in (FUSED, "MLLMMSR", "SASRec"))
        told = fused.fusion
        assert told["chosen"] == "mixture" and set(told["parts"]) == {mllm.run_id, sasrec.run_id}
        assert fused.train_s == mllm.train_s + sasrec.train_s and fused.converged
        (item, label, m, _), (_, _, b, _) = by_user(results, mllm.scores), by_user(results, sasrec.scores)
        counts = read_arrays(results / sasrec.train_counts, ("item", "count"))
        known = np.isin(item, counts["item"][counts["count"] > 0])
        m = (m - m.mean(1, keepdims=True)) / m.std(1, keepdims=True)
        b = np.ma.array(b, mask=~known)
        b = ((b - b.mean(1, keepdims=True)) / b.std(1, keepdims=True)).filled(np.nan)
        b = np.where(known, b, told["rho"] * m + told["offset"])
        scores = told["alpha"] * m + (1 - told["alpha"]) * b
        _, _, kept, place = by_user(results, fused.scores)
        np.testing.assert_allclose(kept, scores, atol=1e-5)
        np.testing.assert_array_equal(place, scores.argsort(axis=1).argsort(axis=1))
        rank = (scores > scores[label > 0][:, None]).sum(1)
        assert fused.metrics["NDCG@10"] == pytest.approx(np.where(rank < 10, 1 / np.log2(rank + 2), 0).mean(), abs=1e-6)
    board = json.loads((results / "leaderboard.json").read_text())
    assert [row["model"] for row in board["rows"]][0] == FUSED and board["best_baseline"] == "SASRec"
    top = board["rows"][0]
    assert set(top["beyond"]) == set(board["rows"][1]["beyond"]) != set()
    assert top["tested_against"] == "SASRec" and [one["seed"] for one in top["fusion"]] == [1, 2]
    (said,) = board["what_the_mllm_adds"]
    assert said.startswith("What MLLMMSR adds to SASRec: +0.") and "], significant (paired, p" in said
    assert "on cold targets" in said and "Seed 1, 2: the mixture that validation chose" in said and "(α = 0." in said
    values, cold = {}, None
    for label in (FUSED, "SASRec"):
        runs = [np.load(results / "runs" / records(results)[label, seed].run_id / "per_user.npz") for seed in (1, 2)]
        values[label] = np.mean([run["NDCG@10"][run["user"].argsort()] for run in runs], axis=0)
        cold = runs[0]["train_count"][runs[0]["user"].argsort()] == 0
    for name, mask in (("cold", cold), ("warm", ~cold)):
        low, high = stats.ttest_1samp((values[FUSED] - values["SASRec"])[mask], 0).confidence_interval(0.95)
        assert f"[{low:+.3f}, {high:+.3f}] on {name} targets".replace("-", "−") in said
    for name in ("leaderboard.md", "leaderboard.html"):
        assert said.partition(" (")[0] in (results / name).read_text(), name


def test_a_fused_run_is_repeated_from_its_record(results):
    fused = records(results)[FUSED, 2]
    worker = (sys.executable, str(results.parent / "worker.py"))
    found = rerun(*find_run(fused.run_id, results), worker=worker, tell=str)
    assert found.agree, found.lines


def test_it_is_made_anew_where_a_part_was_and_says_so_until_then(results):
    before = records(results)
    append(results / RECORDS, replace(before["SASRec", 1], started="2026-02-02"))
    stale = {row.status for row in render(results).rows if row.model == FUSED and row.seeds == (1,)}
    assert stale == {"what it was made of has been run again since; run it again"}
    again = run(results, *expand(FUSED))
    assert (results / "started.txt").read_text().split().count(FUSED) == 3
    assert again[FUSED, 1].metrics == before[FUSED, 1].metrics and again[FUSED, 2] == before[FUSED, 2]


def test_a_part_of_an_earlier_version_is_refused_with_the_command_that_makes_it_new(results):
    older = replace(records(results)["SASRec", 1], valid_scores=None, train_counts=None, started="2025-01-01")
    append(results / RECORDS, older)
    status = run(results, *expand(FUSED))[FUSED, 1].status
    assert "keeps no validation scores" in status and "--models SASRec --seeds 1 --force" in status


def test_a_row_of_two_mllms_says_what_each_of_them_was(tmp_path):
    config = {"topk": [10], "metrics": ["NDCG"], "metric_decimal_place": 6, "mllm": "tiny", "finetune": "lora"}
    for label, kind, mode in (("MLLMMSR", "mllm", "recurrent"), ("TALLRec", "baseline", "none")):
        own = config | {"summary_mode": mode, "block_size": 4}
        run = plant_run(tmp_path, label, 1.0, kind, 1, run_id=label, config=own, keep_valid=True)
        append(tmp_path / RECORDS, replace(run, model="MLLMMSR"))
    job = {"parts": ["MLLMMSR", "TALLRec"], "run_id": "both", "model": "MLLMMSR", "label": "MLLMMSR+TALLRec"}
    job |= {"kind": "fused", "seed": 1, "dataset": "demo"}
    fused = fuse_runs(job, tmp_path, tmp_path / "runs" / "both", {"started": "2026-01-01"})
    modes = {name: own["summary_mode"] for name, own in fused.config["per_model"].items()}
    assert modes == {"MLLMMSR": "recurrent", "TALLRec": "none"}
    assert "blocks of 4" in setup_of([fused]).described


@pytest.mark.parametrize(("powers", "chosen"), [((0.0, 3.0), "second"), ((3.0, 0.0), "first")])
def test_the_ceiling_of_what_was_retrieved_is_that_of_the_mllms_order_alone(tmp_path, powers, chosen):
    ceiling = {"retriever": "Pop", "top_k": 10, "recall": 0.05, "fusion": 1.0}
    for label, kind, power in zip(("MLLMMSR", "SASRec"), ("mllm", "baseline"), powers, strict=True):
        config = {"topk": [10], "metrics": ["NDCG"], "metric_decimal_place": 6}
        run = plant_run(tmp_path, label, power, kind, 1, run_id=label, config=config, keep_valid=True)
        append(tmp_path / RECORDS, replace(run, retrieval=ceiling if kind == "mllm" else None))
    job = {"parts": ["MLLMMSR", "SASRec"], "run_id": "both", "model": "MLLMMSR", "label": FUSED, "kind": "fused"}
    fused = fuse_runs(job | {"seed": 1, "dataset": "demo"}, tmp_path, tmp_path / "runs" / "both", {"started": "2026"})
    assert fused.fusion["chosen"] == chosen and fused.retrieval == (ceiling if chosen == "first" else None)


def test_what_may_be_fused():
    assert expand("SASRec,MLLMMSR:zero-shot+SASRec") == ("SASRec", "MLLMMSR:zero-shot", "MLLMMSR:zero-shot+SASRec")
    entry = resolve("MLLMMSR:zero-shot+SASRecF:text")
    assert entry.kind == "fused" and [part.label for part in entry.parts] == ["MLLMMSR:zero-shot", "SASRecF:text"]
    for label in ("SASRec+MLLMMSR", "SASRec+GRU4Rec", "MLLMMSR+MLLMMSR:direct", "MLLMMSR+SASRec+Pop"):
        with pytest.raises(UserError, match="and one baseline"):
            resolve(label)
    with pytest.raises(UserError, match="unknown variant"):
        resolve("MLLMMSR:no+SASRec")
