"""Real runs of models that fail: each costs its own row, which says why; the others stand, and their numbers hold."""

import json
import sys
from pathlib import Path

import pytest
import small_world
from bad_models import BAD, SECRET

from recbole_mllm.benchmark.jobs import BenchmarkPlan
from recbole_mllm.benchmark.records import RECORDS, RunRecord, read_records
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
