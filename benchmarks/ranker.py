"""Two rules of ranking on demo worlds that nothing was tuned on: fusion with a baseline, and three negatives or one.

A world a call: `python benchmarks/ranker.py` takes the first of `--worlds` that is not finished, and a killed call
resumes. In each world SASRec and MLLMMSR are run on the same candidates and `MLLMMSR+SASRec` is fused from what they
have kept; with `--negatives` MLLMMSR is also fine-tuned on three negatives a positive. `--summary` runs nothing. Ends
in one JSON line of all finished worlds: how far the fused row is from each part, and three negatives from one, as means
of paired differences of NDCG@10 with 95 % intervals over users, of all, cold and warm targets; and seconds of training.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import numpy as np

from recbole_mllm.benchmark.jobs import BenchmarkPlan, jobs_of
from recbole_mllm.benchmark.records import RECORDS, RunRecord, latest, read_arrays, read_records
from recbole_mllm.benchmark.runner import benchmark
from recbole_mllm.benchmark.significance import DRAW_SEED, estimate_means
from recbole_mllm.benchmark.variants import expand
from recbole_mllm.common.config import config_paths

WORLDS = "101,102,103,104,105"
FUSED = "MLLMMSR+SASRec"
THREE = {"distribution": "uniform", "sample_num": 3, "alpha": 1.0, "dynamic": False, "candidate_num": 0}


def plans(world: int, out: Path, limit: int | None) -> tuple[BenchmarkPlan, BenchmarkPlan]:
    """Return what is run of a world: the fused row and its parts, and MLLMMSR on three negatives."""
    name = f"demo-{world}"
    keys = {"data_path": str(out / "dataset"), "resume": "auto", "checkpoint_every_steps": 20}
    files = tuple(config_paths(["demo"]))
    one, three = (
        BenchmarkPlan(name, labels, (2024,), out / name, files, keys | more, limit_users=limit)
        for labels, more in ((expand(FUSED), {}), (("MLLMMSR",), {"train_neg_sample_args": THREE}))
    )
    return one, three


def finished(plan: BenchmarkPlan) -> dict[str, RunRecord] | None:
    """Return the plan's records by label, None where one is missing."""
    known = latest(read_records(plan.output_dir / RECORDS))
    jobs = jobs_of(plan)
    found = {job.entry.label: known[job.run_id] for job in jobs if job.run_id in known and known[job.run_id].ok}
    return found if len(found) == len(jobs) else None


def compared(results: Path, one: RunRecord, other: RunRecord) -> dict[str, Any]:
    """Return mean, low and high of the paired differences of NDCG@10, and how many users, by kind of target."""
    mine, theirs = (
        read_arrays(results / str(run.per_user), ("user", "train_count", "NDCG@10")) for run in (one, other)
    )
    mine, theirs = ({n: column[np.argsort(own["user"])] for n, column in own.items()} for own in (mine, theirs))
    difference = mine["NDCG@10"] - theirs["NDCG@10"]
    cold = mine["train_count"] == 0
    told = {}
    for name, users in (("all", cold | ~cold), ("cold", cold), ("warm", ~cold)):
        if users.any():
            (found,) = estimate_means(difference[users][None], DRAW_SEED)
            told[name] = [round(value, 4) for value in (found.mean, found.low, found.high)] + [int(users.sum())]
    return told


def summary(world: int, out: Path, limit: int | None) -> dict[str, Any] | None:
    """Return what a finished world shows."""
    one, three = plans(world, out, limit)
    runs, more = finished(one), finished(three)
    if runs is None:
        return None
    fused, mllm = runs[FUSED], runs["MLLMMSR"]
    told: dict[str, Any] = {name: round(run.metrics["NDCG@10"], 4) for name, run in runs.items()}
    told["fusion"] = {name: fused.fusion[name] for name in ("chosen", "alpha", "rho", "offset", "gain", "error")}
    told |= {f"fused - {name}": compared(one.output_dir, fused, runs[name]) for name in ("MLLMMSR", "SASRec")}
    if more is not None:
        told["three negatives - one"] = compared(one.output_dir, more["MLLMMSR"], mllm)
        told["train_s"] = {"one": round(mllm.train_s or 0), "three": round(more["MLLMMSR"].train_s or 0)}
    return told


def main() -> None:
    """Run a world that is not finished, and print what all finished ones show."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", default=WORLDS, help="seeds of demo worlds")
    parser.add_argument("--out", type=Path, default=Path("results/ranker"))
    parser.add_argument("--limit_users", type=int, help="evaluate a sample, and fine-tune on it")
    parser.add_argument("--full", action="store_true", help="run all worlds, not one")
    parser.add_argument("--summary", action="store_true", help="run nothing")
    parser.add_argument("--negatives", action="store_true", help="also run three negatives")
    args = parser.parse_args()
    worlds, out = [int(word) for word in args.worlds.split(",")], args.out.resolve()
    wanted = [(world, plans(world, out, args.limit_users)[: 1 + args.negatives]) for world in worlds]
    due = [(world, plan) for world, parts in wanted for plan in parts if finished(plan) is None]
    for world, plan in [] if args.summary else due:
        if args.full or world == due[0][0]:
            benchmark(plan)
    told = {world: summary(world, out, args.limit_users) for world in worlds}
    print(json.dumps({str(world): found for world, found in told.items() if found is not None}))


if __name__ == "__main__":
    main()
