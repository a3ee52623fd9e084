"""A benchmark under a launcher: one crash costs one row, baselines know nothing of it, and the numbers are the same."""

import json
from pathlib import Path

import launched_runs
import pytest
import small_world
import tiny_models
from launching import ROOT, launched

from recbole_mllm.benchmark.jobs import BenchmarkPlan
from recbole_mllm.benchmark.records import read_records
from recbole_mllm.common.errors import UserError

WORKER = f"""
import json, os, signal, sys
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}]
from recbole_mllm.benchmark.records import append
from recbole_mllm.common import distributed
from recbole_mllm.common.distributed import child_code
from tests.planted_runs import plant_run
job = json.loads(Path(sys.argv[1]).read_text())
out, rank = Path(job["home"]) / job["output_dir"], os.environ.get("RANK")
fate = job["overrides"]["fate"].get(job["label"])
def run():
    if job["kind"] == "baseline":
        assert not [name for name in os.environ if name.startswith(("MASTER_", "GROUP_", "TORCHELASTIC_"))], os.environ
        assert not {{"RANK", "WORLD_SIZE", "LOCAL_RANK"}} & set(os.environ)
    else:
        assert sorted(distributed.gather_objects(rank)) == ["0", "1"]
    if fate == "crash" and rank == "1":
        raise ValueError("the loss is no number")
    if fate == "killed" and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if fate:
        distributed.barrier()  # as long as the other lives
    if rank in (None, "0"):
        append(out / "runs.jsonl", plant_run(out, job["label"], 1.0, job["kind"], job["seed"], run_id=job["run_id"]))
    return 0
sys.exit(child_code(run))
"""
BENCH = """
import sys
from pathlib import Path
from recbole_mllm.common import distributed
from recbole_mllm.common.distributed import exit_code
from recbole_mllm.benchmark.jobs import BenchmarkPlan
from recbole_mllm.benchmark.runner import benchmark, follow
labels = ("Pop", "MLLMMSR:direct", "MLLMMSR:no-image", "MLLMMSR")
fate = {"MLLMMSR:direct": "crash", "MLLMMSR:no-image": "killed"}
plan = BenchmarkPlan("demo", labels, (1,), Path("results"), overrides={"fate": fate})
def run(words):
    if distributed.is_main():
        benchmark(plan, (sys.executable, str(Path("worker.py").resolve())))
        return 0
    return follow()
sys.exit(exit_code(run, []))
"""


@pytest.mark.slow
def test_a_crash_in_any_process_costs_one_row(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "bench.py").write_text(BENCH)
    done = launched(2, [tmp_path / "bench.py"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    records = {record.label: record for record in read_records(tmp_path / "results" / "runs.jsonl")}
    assert records["Pop"].ok and records["MLLMMSR"].ok, records
    assert records["MLLMMSR:direct"].status.startswith("process 1: ValueError: the loss is no number; its log: log.1")
    assert records["MLLMMSR:no-image"].status.startswith("process 1: ended by SIGKILL")
    assert done.stdout.count("[4/4] MLLMMSR seed 1 … ") == 1
    assert [records[f"MLLMMSR:{name}"].world_size for name in ("direct", "no-image")] == [2, 2]


def test_jobs_at_a_time_are_refused(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="processes of a launcher share one run at a time; leave --jobs out"):
        BenchmarkPlan("steps", ("Pop",), (1,), Path("results"), jobs=2)


@pytest.mark.slow
def test_the_leaderboard_is_that_of_one_process(tmp_path):
    small_world.write(tmp_path / "data")
    tiny_models.llama(tmp_path / "llama")
    keys = launched_runs.settings(tmp_path, tmp_path, {"mllm": "llama", "epochs": 1})
    del keys["checkpoint_dir"], keys["show_progress"], keys["frozen_candidates"], keys["seed"]
    words = ["benchmark", "--dataset=steps", "--models=Pop,MLLMMSR", "--seeds=3"]
    words += [f"--{key}={json.dumps(value).replace(' ', '')}" for key, value in keys.items()]
    found = {}
    for count in (1, 2):
        folder = tmp_path / f"n{count}"
        folder.mkdir()
        done = launched(count, [ROOT / "run_recbole_mllm.py", *words, f"--output_dir={folder}"], tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("report: ") == 1
        board = json.loads((folder / "leaderboard.json").read_text())
        found[count] = {r.label: r for r in read_records(folder / "runs.jsonl")}, board["rows"]
    (one, rows), (two, same_rows) = found[1], found[2]
    assert {label: record.world_size for label, record in two.items()} == {"Pop": 1, "MLLMMSR": 2}
    assert {label: record.world_size for label, record in one.items()} == {"Pop": 1, "MLLMMSR": 1}
    for label in one:
        assert one[label].ok and two[label].ok
        assert one[label].metrics == two[label].metrics and one[label].candidates == two[label].candidates
    for a, b in zip(rows, same_rows, strict=True):
        assert (a["model"], a["metrics"]) == (b["model"], b["metrics"])
