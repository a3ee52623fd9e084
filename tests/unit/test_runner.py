"""A benchmark survives its runs: crashes, kills and interruptions cost what was at work and nothing else."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import random_world
from planted_runs import CANDIDATES, plant_run

from recbole_mllm.benchmark.jobs import BenchmarkPlan, jobs_of
from recbole_mllm.benchmark.process import LOG, failure, run_child
from recbole_mllm.benchmark.records import append, data_digests, one_set_of_data, read_records
from recbole_mllm.benchmark.runner import benchmark
from recbole_mllm.benchmark.worker import digests_of, run_job
from recbole_mllm.common.config import benchmark_defaults
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.model_names import identity_of
from recbole_mllm.evaluation import candidates

ROOT = Path(__file__).resolve().parents[2]
POWERS = {"Pop": 0.1, "ItemKNN": 0.8, "SASRec": 1.0, "MLLMMSR": 2.0, "MLLMMSR:direct": 1.5}

WORKER = f"""
import json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from recbole_mllm.benchmark.records import append
from tests.planted_runs import plant_run
job = json.loads(Path(sys.argv[1]).read_text())
assert len(sys.argv) == 2 and Path.cwd() == Path(sys.argv[1]).parent, "RecBole writes where it stands"
out = Path(job["output_dir"])
with (out / "started.txt").open("a") as file:
    file.write(job["run_id"] + "\\n")
fate = job["overrides"].get("fate", {{}}).get(job["label"])
print("epoch 1 of", job["model"], flush=True)
if fate == "crash":
    raise ValueError("the loss is\\nnot a number")
if fate == "oom":
    os.kill(os.getpid(), signal.SIGKILL)
if fate == "silent":
    sys.exit(0)
if fate == "mistake":
    print("UserError: no such dataset", file=sys.stderr)
    sys.exit(2)
if fate == "wait":
    while not (out / "go").exists():
        time.sleep(0.05)
power = {POWERS!r}[job["label"]]
record = plant_run(out, job["label"], power, job["kind"], job["seed"], run_id=job["run_id"])
append(out / "runs.jsonl", record)
"""


def test_weights_that_have_changed_since_a_run_are_told_before_anything_starts(tmp_path, worker):
    (model := tmp_path / "model").mkdir()
    (model / "model.safetensors").write_text("A")
    given = plan(tmp_path, "MLLMMSR", overrides={"mllm": str(model)})
    (job,) = jobs_of(given)
    weights = dict.fromkeys(("mllm", "item_summarizer", "user_summarizer"), identity_of(str(model)))
    config = {"mllm": str(model), "provenance": {"weights": weights}}
    record = plant_run(given.output_dir, "MLLMMSR", 1.0, "mllm", run_id=job.run_id, config=config)
    append(given.output_dir / "runs.jsonl", replace(record, dataset="demo"))
    assert benchmark(given, worker, str) == [] and not (given.output_dir / "started.txt").exists()
    (model / "model.safetensors").write_text("B")
    with pytest.raises(
        UserError, match=r"MLLMMSR seed 2024 is finished with \w+ .* as model#\w+, which is model#\w+ now"
    ):
        benchmark(given, worker, str)
    shutil.rmtree(model)
    assert benchmark(given, worker, str) == [], "a model that is gone makes no finished run worthless"
    for named, known in (
        ({"mllm": "org/model", "mllm_revision": "v1"}, f"org/model@{'a' * 40}"),
        ({}, "encoder#0123456789abcdef"),
    ):
        config = {**named, "provenance": {"weights": dict.fromkeys(weights, known)}}
        append(given.output_dir / "runs.jsonl", replace(record, dataset="demo", config=config))
        assert benchmark(given, worker, str) == [], "what cannot be known, or was not asked, has not changed"


@pytest.fixture
def worker(tmp_path) -> tuple[str, ...]:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    return sys.executable, str(script)


def plan(tmp_path: Path, *labels: str, **changes: Any) -> BenchmarkPlan:
    values: dict[str, Any] = {"dataset": "demo", "labels": labels, "seeds": (2024,), "output_dir": tmp_path / "results"}
    return BenchmarkPlan(**(values | changes))


def started(tmp_path: Path) -> list[str]:
    return (tmp_path / "results" / "started.txt").read_text().split()


def board(tmp_path: Path) -> Any:
    return json.loads((tmp_path / "results" / "leaderboard.json").read_text())


def test_each_run_is_done_once_unless_forced(tmp_path, worker):
    lines: list[str] = []
    assert benchmark(plan(tmp_path, "Pop", "MLLMMSR:direct", seeds=(1, 2), jobs=2), worker, lines.append) == []
    assert (tmp_path / "results" / "leaderboard.html").exists()
    assert "[1/4] Pop seed 1 …" in lines and any("[4/4] MLLMMSR:direct seed 2 … " in line for line in lines)
    assert len(started(tmp_path)) == 4 and sum(" s NDCG@10 0." in line for line in lines) == 4
    assert [(row["model"], row["seeds"]) for row in board(tmp_path)["rows"]] == [
        ("MLLMMSR:direct", [1, 2]), ("Pop", [1, 2]),
    ]  # fmt: skip
    lines.clear()
    benchmark(plan(tmp_path, "Pop", seeds=(1,)), worker, lines.append)
    assert "finished before, NDCG@10" in lines[0] and len(started(tmp_path)) == 4
    lines.clear()
    shared = plan(tmp_path, "Pop", "MLLMMSR:direct", seeds=(1,), overrides={"learning_rate": 5e-5})
    benchmark(shared, worker, lines.append)
    assert lines[0].startswith(
        "MLLMMSR and baselines are both trained with learning_rate: 5e-05; what is meant for one"
    )
    benchmark(plan(tmp_path, "Pop", seeds=(1,), force=True), worker, str)
    benchmark(plan(tmp_path, "Pop", seeds=(1,), overrides={"epochs": 9}), worker, str)
    *first, again, other = started(tmp_path)
    assert again in first and other not in first, "other settings are another run"


def test_runs_of_other_data_share_no_leaderboard(tmp_path, worker):
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "demo.inter").write_text("A")
    given = plan(tmp_path, "Pop", "SASRec")
    config = {"data_path": str(folder), "benchmark_filename": None}
    for job in jobs_of(given)[:1]:
        record = plant_run(given.output_dir, "Pop", 1.0, run_id=job.run_id, config=config)
        append(given.output_dir / "runs.jsonl", replace(record, data=data_digests(config, reads_items=True)))
    (folder / "demo.item").write_text("not read by Pop")
    (folder / "demo.inter").write_text("B")
    with pytest.raises(
        UserError, match=rf"{record.run_id} was run on another demo.inter than .*/demo holds now.* --force"
    ):
        benchmark(given, worker, str)
    assert not (given.output_dir / "started.txt").exists()
    other = replace(record, run_id="SASRec-1", data={"demo.inter": "b"})
    with pytest.raises(UserError, match=rf"SASRec-1 was run on another demo.inter than {record.run_id} was"):
        one_set_of_data([*read_records(given.output_dir / "runs.jsonl"), other])
    assert benchmark(replace(given, force=True), worker, str) == []
    shutil.rmtree(folder)
    assert benchmark(given, worker, str) == [], "data that are gone make no finished run worthless"


def test_a_part_of_eval_args_is_named_by_what_it_comes_to(tmp_path):
    """So that a run of before, to which RecBole gave its random order, is not taken for it."""
    whole = benchmark_defaults()["eval_args"] | {"mode": "full"}
    ids = {
        jobs_of(plan(tmp_path, "Pop", overrides={"eval_args": given}))[0].run_id
        for given in ({"mode": "full"}, {"mode": "full", "order": "TO"}, whole)
    }
    assert len(ids) == 1


def test_a_report_that_cannot_be_written_costs_no_run(tmp_path, worker, monkeypatch):
    def broken(*_: Any, **__: Any) -> None:
        raise IndexError("a chart")

    monkeypatch.setattr("recbole_mllm.benchmark.runner.render", broken)
    lines: list[str] = []
    with pytest.raises(IndexError):
        benchmark(plan(tmp_path, "Pop", "SASRec"), worker, lines.append)
    assert len(started(tmp_path)) == 2 == len(read_records(tmp_path / "results" / "runs.jsonl"))
    assert lines.count("the report cannot be written: IndexError: a chart; the other runs continue") == 2


FATES = {
    "SASRec": ("crash", "ValueError: the loss is"),
    "ItemKNN": ("oom", "SIGKILL"),
    "BPR": ("silent", "without a record"),
    "GRU4Rec": ("mistake", "no such dataset"),
}


def test_a_crash_costs_one_row_says_why_and_is_tried_again(tmp_path, worker):
    labels, failing = ("Pop", *FATES, "MLLMMSR"), {"fate": {label: fate for label, (fate, _) in FATES.items()}}
    assert benchmark(plan(tmp_path, *labels, overrides=failing), worker, print) == [
        f"{name} seed 2024" for name in FATES
    ]
    good, bad = board(tmp_path)["rows"][:2], {row["model"]: row["status"] for row in board(tmp_path)["rows"][2:]}
    assert [row["model"] for row in good] == ["MLLMMSR", "Pop"] and bad.keys() == FATES.keys()
    for label, (_, words) in FATES.items():
        assert words in bad[label] and "\n" not in bad[label]
        log = tmp_path / "results" / bad[label].rpartition("log: ")[2].rstrip(")")
        assert f"epoch 1 of {label}" in log.read_text()
    benchmark(plan(tmp_path, *labels, overrides=failing), worker, print)
    assert [run.partition("-")[0] for run in started(tmp_path)] == [*labels, *FATES]
    assert len(board(tmp_path)["rows"]) == len(labels)


WAITING = {"overrides": {"fate": {"SASRec": "wait"}}}


def start_elsewhere(tmp_path: Path, worker: tuple[str, ...]) -> tuple[subprocess.Popen[str], int]:
    """Start a benchmark whose second run waits; once that is at work, return both processes."""
    script = (
        "import sys; from pathlib import Path\n"
        "from recbole_mllm.benchmark.runner import BenchmarkPlan, benchmark\n"
        "benchmark(BenchmarkPlan('demo', ('Pop', 'SASRec', 'MLLMMSR'), (2024,), Path(sys.argv[1]),"
        " overrides={'fate': {'SASRec': 'wait'}}), sys.argv[2:])"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "results"), *worker]
    # a shell's background job, as which the tests may run, passes on that Ctrl-C is ignored
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "results" / "started.txt").exists() or len(started(tmp_path)) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    (folder,) = (tmp_path / "results" / "runs").glob("SASRec-*")
    return process, int((folder / "lock").read_text())


def straight(tmp_path: Path, worker: tuple[str, ...]) -> Any:
    """Return the leaderboard of the same benchmark without an interruption."""
    folder = tmp_path / "straight"
    folder.mkdir()
    for name in ("go", "runs.jsonl"):  # without the latter the folder would be somebody else's
        (folder / name).touch()
    benchmark(plan(tmp_path, "Pop", "SASRec", "MLLMMSR", output_dir=folder, **WAITING), worker, print)
    return json.loads((folder / "leaderboard.json").read_text())


def test_an_interruption_ends_the_child_keeps_what_is_finished_and_is_resumed(tmp_path, worker):
    process, child = start_elsewhere(tmp_path, worker)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    stat = Path(f"/proc/{child}/stat")
    assert process.returncode == -signal.SIGINT and (not stat.exists() or stat.read_text().split()[2] == "Z")
    assert "stopped; 1 of 3 runs are finished; the same command resumes" in output
    assert [record.label for record in read_records(tmp_path / "results" / "runs.jsonl")] == ["Pop"]
    assert [row["model"] for row in board(tmp_path)["rows"]] == ["Pop"]
    (tmp_path / "results" / "go").touch()
    benchmark(plan(tmp_path, "Pop", "SASRec", "MLLMMSR", **WAITING), worker, print)
    assert board(tmp_path) == straight(tmp_path, worker)


def test_after_kill_9_a_run_that_outlives_its_benchmark_is_waited_for_not_repeated(tmp_path, worker):
    process, _ = start_elsewhere(tmp_path, worker)
    process.kill()
    process.wait()
    lines: list[str] = []

    def hear(line: str) -> None:
        lines.append(line)
        if "waiting for it" in line:
            (tmp_path / "results" / "go").touch()

    with (tmp_path / "results" / "runs.jsonl").open("a") as file:
        file.write('{"run_id": "torn')
    benchmark(plan(tmp_path, "Pop", "SASRec", **WAITING), worker, hear)
    assert any("is still at this run" in line for line in lines)
    assert len(started(tmp_path)) == 2 and board(tmp_path)["rows"][0]["model"] == "SASRec"


def test_the_line_shown_and_the_last_words_are_the_runs_own_and_no_warning(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(
        'import time, warnings\nprint("\\x1b[0m30 Nov 18:36    INFO  epoch 3 training\\x1b[0m")\n'
        'print("30 Nov 18:36    INFO  valid result: \\nhit@3 : 0.262    ndcg@10 : 0.3166")\n'
        'print("30 Nov 18:36    INFO  Saving current: /far/away.pth", flush=True)\n'
        'warnings.warn("old ways are deprecated", FutureWarning)\ntime.sleep(0.6)\nraise SystemExit(3)\n'
    )
    shown: list[str] = []
    command = [sys.executable, str(script)]
    code = run_child(command, tmp_path, None, threading.Event(), lambda seconds, line: shown.append(line))
    log = tmp_path / LOG
    assert "worker.py:5: FutureWarning: old ways" in log.read_text() and 'warnings.warn("old' in log.read_text()
    assert shown[-1] == "epoch 3 training" and set(shown) <= {"", "epoch 3 training"}
    assert code == 3 and failure(log, code) == "Saving current: /far/away.pth"


def test_a_board_of_two_datasets_or_sets_of_candidates_is_refused_before_anything_starts(tmp_path, worker):
    asked: list[bool] = []

    def digests(jobs, compared):
        asked.append(compared)
        return {job["run_id"]: "aa" if job["label"] == "Pop" else "bb" for job in jobs}

    two = r"aa: Pop-2024-\w+; bb: SASRec-2024-\w+\); give one of them another --output_dir"
    with pytest.raises(UserError, match=two):
        benchmark(plan(tmp_path, "Pop", "SASRec"), worker, print, digests)
    assert not (tmp_path / "results").exists()
    benchmark(plan(tmp_path, "Pop"), worker, print)
    with pytest.raises(UserError, match=rf"{CANDIDATES}: Pop-.*; bb: SASRec-.*{CANDIDATES} was drawn by the rules of"):
        benchmark(plan(tmp_path, "Pop", "SASRec"), worker, print, digests)
    with pytest.raises(UserError, match="of dataset demo .Pop-.*give this one of other another --output_dir"):
        benchmark(plan(tmp_path, "SASRec", dataset="other"), worker, print, digests)
    assert len(started(tmp_path)) == 1 and asked == [False, True]
    benchmark(plan(tmp_path, "Pop"), worker, print, digests)  # nothing is due, so nobody is asked
    benchmark(plan(tmp_path, "Pop", force=True), worker, print, digests)  # and what runs again stands in nobody's way
    assert len(started(tmp_path)) == 2 and asked == [False, True, False]


def test_the_digests_of_a_benchmark_are_those_its_runs_will_have(tmp_path, monkeypatch):
    random_world.write(tmp_path, "random", seed=11, users=50, items=60)
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text("data_path: .\nper_model:\n  SASRec: {candidate_seed: 7}\n")
    given = {"dataset": "random", "config_files": ("own.yaml",)}

    def found(*labels: str) -> dict[str, str]:
        jobs = [job.order() for job in jobs_of(plan(tmp_path, *labels, **given, overrides={"mllm": "none"}))]
        known = digests_of(jobs, False)
        return {job["label"]: known[job["run_id"]] for job in jobs if known}

    read: list[str] = []
    stock = candidates.digest_of
    monkeypatch.setattr(candidates, "digest_of", lambda config: read.append(config["model"]) or stock(config))
    assert found("Pop", "BPR", "ItemKNN", "MLLMMSR") == {} and not read  # nothing they could be told apart by
    known = found("Pop", "BPR", "SASRec", "MLLMMSR")
    assert known["Pop"] == known["BPR"] == known["MLLMMSR"] != known["SASRec"] and len(set(read)) == 2
    monkeypatch.setattr(candidates, "digest_of", stock)
    for job in [job.order() for job in jobs_of(plan(tmp_path, "Pop", "SASRec", **given))]:
        folder = tmp_path / "results/runs" / job["run_id"]
        folder.mkdir(parents=True)
        monkeypatch.chdir(folder)  # as a worker does, whose paths start from where the user stood
        run_job({**job, "home": str(tmp_path), "overrides": {"epochs": 1}})
        assert read_records(tmp_path / "results/runs.jsonl")[-1].candidates == known[job["label"]]
        assert not (folder / "log").exists() and not (tmp_path / "log").exists()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"its candidates are {known['Pop']}, and were 00 when the benchmark began"):
        run_job({**jobs_of(plan(tmp_path, "Pop", **given))[0].order(), "candidates": "00"})
