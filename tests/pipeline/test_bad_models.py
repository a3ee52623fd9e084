"""Real runs of models that fail: each costs its own row, which says why; the others stand, and their numbers hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_world
import torch
from bad_models import BAD, SECRET
from recbole.config import Config
from recbole.data.interaction import Interaction
from recbole.evaluator import Collector, Evaluator
from scipy import stats
from statsmodels.stats.multitest import multipletests

from recbole_mllm.benchmark.jobs import BenchmarkPlan
from recbole_mllm.benchmark.records import RECORDS, RunRecord, read_records
from recbole_mllm.benchmark.report import read_leaderboard
from recbole_mllm.benchmark.runner import benchmark

SCRIPT = Path(__file__).resolve().parents[1] / "bad_models.py"
GOOD = ("Pop", "Sound")
pytestmark = pytest.mark.slow  # seven processes, each of which loads RecBole


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home: Path = tmp_path_factory.mktemp("bad")
    small_world.write(home / "data", images=False)
    keys = {"data_path": str(home / "data"), "epochs": 4, "eval_step": 2, "metric_decimal_place": 7, "stopping_step": 9}
    plan = BenchmarkPlan("steps", (*GOOD, *BAD), (3,), home / "results", overrides=keys, jobs=2)
    benchmark(plan, (sys.executable, str(SCRIPT)), lambda line: None)
    return plan.output_dir


def latest(results: Path) -> dict[str, RunRecord]:
    return {run.label: run for run in read_records(results / RECORDS)}


def test_every_failure_has_a_row_of_one_line_that_says_why_and_names_no_folder(results: Path) -> None:
    runs = latest(results)
    words = {
        "Crashing": "cannot map …/table.bin",
        "NoNumber": "nan",
        "NoScore": "NaN",
        "Starved": "MemoryError",
        "Killed": "SIGKILL",
    }
    assert {label for label, run in runs.items() if not run.ok} == set(BAD)
    for label, word in words.items():
        assert word in runs[label].status and "\n" not in runs[label].status, runs[label].status
    told = {row["model"]: row["status"] for row in json.loads((results / "leaderboard.json").read_text())["rows"]}
    assert all(told[label] == runs[label].status for label in BAD) and told["Pop"] == told["Sound"] == "ok"
    for page in results.glob("leaderboard*"):
        assert str(Path(SECRET).parent) not in page.read_text(), page
        assert str(results.parent) not in page.read_text(), page


def test_recboles_own_evaluator_gives_the_recorded_metrics_on_the_kept_scores(results: Path) -> None:
    run = latest(results)["Sound"]
    with np.load(results / str(run.scores)) as kept:
        users, place, label = kept["user"], kept["place"], kept["label"]
    names, rows = np.unique(users, return_inverse=True)
    scores = torch.full((len(names), 22), -torch.inf)  # RecBole counts what stands before the first -inf
    column = np.array([np.sum(rows[:n] == rows[n]) for n in range(len(rows))])
    scores[rows, column] = torch.tensor(place, dtype=torch.float32)  # the places that broke the ties
    target = torch.tensor(np.array([column[(rows == n) & (label > 0)][0] for n in range(len(names))]))
    keys = {"metrics": ["Hit", "MRR", "NDCG", "Recall", "GAUC"], "topk": [3, 5, 10], "metric_decimal_place": 7}
    config = Config("Pop", "ml-100k", config_dict=keys | {"eval_args": {"mode": "uni20"}})
    collector = Collector(config)
    collector.eval_batch_collect(scores, Interaction({}), torch.arange(len(names)), target)
    theirs = Evaluator(config).evaluate(collector.get_data_struct())
    assert len(theirs) == 13
    for key, value in theirs.items():
        name = next(known for known in run.metrics if known.lower() == key)
        assert run.metrics[name] == pytest.approx(value, abs=1e-6), name


def test_the_tests_of_the_table_are_those_of_scipy_on_the_per_user_arrays(results: Path) -> None:
    runs, board = latest(results), read_leaderboard(results)
    arrays: dict[str, Any] = {}
    for label in GOOD:
        with np.load(results / str(runs[label].per_user)) as kept:
            order = np.argsort(kept["user"])
            arrays[label] = {name: kept[name][order] for name in kept.files}
    best = max(GOOD, key=lambda label: (runs[label].valid or {})["NDCG@10"])  # never by the test split
    (other,) = (label for label in GOOD if label != best)
    assert board.best_baseline == best
    row = next(row for row in board.rows if row.model == other)
    names = [name for name in row.scores if name != "AUC" and not name.startswith("Recall")]  # Recall is Hit here
    mine = {name: stats.ttest_rel(arrays[other][name], arrays[best][name]).pvalue for name in names}
    for name in names:
        assert row.scores[name].mean == pytest.approx(arrays[other][name].mean())
    # AUC's own p, a cluster bootstrap's, belongs to the family too: whatever it is, Holm keeps the order of the others
    told = {name: row.scores[name].p for name in names}
    bounds = [multipletests([*mine.values(), p], method="holm")[1][:-1] for p in (0.0, 1.0)]
    for name, low, high in zip(names, *bounds, strict=True):
        p = told[name]
        assert p is not None and min(low, high) - 1e-9 <= p <= max(low, high) + 1e-9
