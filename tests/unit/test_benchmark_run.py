"""A benchmark survives its runs: crashes, kills and interruptions cost what was at work and nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import random_world
import yaml
from planted_runs import CANDIDATES

from recbole_mllm import preset
from recbole_mllm.benchmark.variants import PRESETS, SETS, expand, resolve
from recbole_mllm.benchmark.jobs import BenchmarkPlan, jobs_of
from recbole_mllm.benchmark.records import read_records
from recbole_mllm.benchmark.runner import benchmark
from recbole_mllm.benchmark.worker import digests_of, run_job
from recbole_mllm.config import config_paths, per_model
from recbole_mllm.errors import UserError
from recbole_mllm.evaluation import candidates
from recbole_mllm.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
POWERS = {"Pop": 0.1, "ItemKNN": 0.8, "SASRec": 1.0, "MLLMMSR": 2.0, "MLLMMSR:direct": 1.5}

WORKER = f"""
import json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from recbole_mllm.benchmark.records import append
from tests.planted_runs import plant_run
job = json.loads(Path(sys.argv[1]).read_text())
assert len(sys.argv) == 2
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


def test_every_model_and_seed_runs_once_and_the_leaderboard_stands(tmp_path, worker):
    lines: list[str] = []
    page = benchmark(plan(tmp_path, "Pop", "SASRec", "MLLMMSR:direct", seeds=(1, 2)), worker, lines.append)
    assert page.name == "leaderboard.html" and page.exists()
    assert [(row["model"], row["seeds"]) for row in board(tmp_path)["rows"]] == [
        ("MLLMMSR:direct", [1, 2]), ("SASRec", [1, 2]), ("Pop", [1, 2]),
    ]  # fmt: skip
    assert lines[0] == "[1/6] Pop seed 1 …" and lines[-1].startswith("[6/6] MLLMMSR:direct seed 2 … ")
    assert "NDCG@10 0." in lines[1]
    assert len(started(tmp_path)) == 6


def test_a_finished_run_is_kept_unless_forced_and_other_settings_are_another_run(tmp_path, worker):
    benchmark(plan(tmp_path, "Pop"), worker, print)
    lines: list[str] = []
    benchmark(plan(tmp_path, "Pop", "SASRec"), worker, lines.append)
    assert "kept from before, NDCG@10" in lines[0] and len(started(tmp_path)) == 2
    benchmark(plan(tmp_path, "Pop", force=True), worker, print)
    benchmark(plan(tmp_path, "Pop", overrides={"epochs": 9}), worker, print)
    first, _, again, other = started(tmp_path)
    assert first == again != other


FATES = {
    "SASRec": ("crash", "ValueError: the loss is"),
    "ItemKNN": ("oom", "SIGKILL"),
    "BPR": ("silent", "without a record"),
    "GRU4Rec": ("mistake", "no such dataset"),
}


def test_a_crash_costs_one_row_says_why_and_is_tried_again(tmp_path, worker):
    labels, failing = ("Pop", *FATES, "MLLMMSR"), {"fate": {label: fate for label, (fate, _) in FATES.items()}}
    benchmark(plan(tmp_path, *labels, overrides=failing), worker, print)
    good, bad = board(tmp_path)["rows"][:2], {row["model"]: row["status"] for row in board(tmp_path)["rows"][2:]}
    assert [row["model"] for row in good] == ["MLLMMSR", "Pop"] and bad.keys() == FATES.keys()
    for label, (_, words) in FATES.items():
        assert words in bad[label] and "\n" not in bad[label]
        log = tmp_path / "results" / bad[label].rpartition("log: ")[2].rstrip(")")
        assert f"epoch 1 of {label}" in log.read_text()
    benchmark(plan(tmp_path, *labels, overrides=failing), worker, print)
    assert [run.partition("-")[0] for run in started(tmp_path)] == [*labels, *FATES]
    assert len(board(tmp_path)["rows"]) == len(labels)


def test_jobs_at_once_leave_the_same_leaderboard(tmp_path, worker):
    labels = ("Pop", "SASRec", "MLLMMSR", "MLLMMSR:direct")
    benchmark(plan(tmp_path / "a", *labels, output_dir=tmp_path / "a" / "results"), worker, print)
    benchmark(plan(tmp_path / "b", *labels, output_dir=tmp_path / "b" / "results", jobs=3), worker, print)
    assert board(tmp_path / "a") == board(tmp_path / "b")


def start_elsewhere(tmp_path: Path, worker: tuple[str, ...]) -> subprocess.Popen[str]:
    """Start a benchmark whose second run waits, in a process of its own, and return once that run is at work."""
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
    return process


def child_of(tmp_path: Path) -> int:
    (folder,) = (tmp_path / "results" / "runs").glob("SASRec-*")
    return int((folder / "lock").read_text())


def ended(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{process}/stat").read_text().split()[2] == "Z"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_the_child_and_keeps_what_is_finished(tmp_path, worker, number):
    process = start_elsewhere(tmp_path, worker)
    child = child_of(tmp_path)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1 and ended(child)
    assert "stopped; 1 of 3 runs are finished and kept" in output
    assert [record.label for record in read_records(tmp_path / "results" / "runs.jsonl")] == ["Pop"]
    assert [row["model"] for row in board(tmp_path)["rows"]] == ["Pop"]


def test_kill_9_and_start_again_gives_the_leaderboard_it_would_have_been(tmp_path, worker):
    waiting = {"fate": {"SASRec": "wait"}}
    process = start_elsewhere(tmp_path, worker)
    child = child_of(tmp_path)
    process.kill()
    process.wait()
    os.kill(child, signal.SIGKILL)
    (tmp_path / "results" / "go").touch()
    with (tmp_path / "results" / "runs.jsonl").open("a") as file:
        file.write('{"run_id": "torn')
    benchmark(plan(tmp_path, "Pop", "SASRec", "MLLMMSR", overrides=waiting), worker, print)
    straight = tmp_path / "straight"
    straight.mkdir()
    for name in ("go", "runs.jsonl"):  # without the latter the folder would be somebody else's
        (straight / name).touch()
    benchmark(plan(tmp_path, "Pop", "SASRec", "MLLMMSR", overrides=waiting, output_dir=straight), worker, print)
    assert board(tmp_path) == json.loads((straight / "leaderboard.json").read_text())


def test_a_run_that_outlives_a_killed_benchmark_is_waited_for_not_repeated(tmp_path, worker):
    process = start_elsewhere(tmp_path, worker)
    process.kill()
    process.wait()
    lines: list[str] = []

    def hear(line: str) -> None:
        lines.append(line)
        if "waiting for it" in line:
            (tmp_path / "results" / "go").touch()

    benchmark(plan(tmp_path, "Pop", "SASRec", overrides={"fate": {"SASRec": "wait"}}), worker, hear)
    assert any("is still at this run" in line for line in lines)
    assert len(started(tmp_path)) == 2 and board(tmp_path)["rows"][0]["model"] == "SASRec"


def test_the_order_given_to_the_worker(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("epochs: 3")
    job, variant = jobs_of(
        plan(tmp_path, "SASRec", "MLLMMSR:no-image", config_files=(str(config),), limit_users=5,
             overrides={"epochs": 7, "use_image": True})
    )  # fmt: skip
    order = job.order()
    assert order["overrides"]["epochs"] == 7 and order["defaults"]["epochs"] == 50
    assert variant.order()["overrides"]["use_image"] is False, "a label must mean what it says"
    assert (order["model"], order["limit_users"], order["config_files"]) == ("SASRec", 5, [str(config)])


def test_a_quick_look_shortens_baselines_alone_and_the_command_line_wins(tmp_path):
    names = ("SASRec", "GRU4Rec", "ItemKNN", "TALLRec", "MLLMMSR")
    slow, quick = (
        {job.entry.label: job for job in jobs_of(plan(tmp_path, *names, quick=how))} for how in (False, True)
    )
    assert quick["SASRec"].order()["overrides"] == {"epochs": 3, "eval_step": 1}
    assert quick["GRU4Rec"].order()["overrides"]["epochs"] == 4
    for name in ("ItemKNN", "TALLRec", "MLLMMSR"):
        assert quick[name].order() == slow[name].order() and quick[name].run_id == slow[name].run_id
    assert quick["SASRec"].run_id != slow["SASRec"].run_id
    (given,) = jobs_of(plan(tmp_path, "SASRec", quick=True, overrides={"epochs": 9}))
    assert given.order()["overrides"]["epochs"] == 9


def test_the_posters_train_until_validation_stops_rising_unless_a_quick_look_is_asked_for(tmp_path):
    preset = str(config_paths(["ml-100k-posters"])[0])
    cap = per_model([preset], "SASRec")
    assert cap["epochs"] >= 50 and cap["stopping_step"] == 2 and cap["eval_step"] == 1
    (job,) = jobs_of(plan(tmp_path, "GRU4Rec", quick=True, config_files=(preset,)))
    assert job.order()["overrides"] == {"epochs": 4, "eval_step": 1, "train_batch_size": 1024}


def test_the_seeds_of_one_configuration_share_the_digest_and_a_changed_file_changes_it(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("epochs: 3")
    one, two = jobs_of(plan(tmp_path, "Pop", seeds=(1, 2), config_files=(str(config),)))
    assert one.run_id.startswith("Pop-1-") and one.run_id[-8:] == two.run_id[-8:]
    config.write_text("epochs: 4")
    assert jobs_of(plan(tmp_path, "Pop", seeds=(1,), config_files=(str(config),)))[0].run_id != one.run_id
    assert jobs_of(plan(tmp_path, "Pop", "Pop", seeds=(1, 1)))[0].number == 1
    assert len(jobs_of(plan(tmp_path, "Pop", "Pop", seeds=(1, 1)))) == 1


def test_presets_change_what_they_say():
    assert resolve("MLLMMSR").kind == "mllm" and not resolve("MLLMMSR").overrides
    assert resolve("MLLMMSR:block-5").overrides == {"block_size": 5}
    assert resolve("MLLMMSR:zero-shot").overrides == {"finetune": "none"}
    assert resolve("LightGCN").kind == "baseline"
    defaults = yaml.safe_load(Path(preset("MLLMMSR")).read_text())
    for entry in (resolve(f"MLLMMSR:{name}") for name in PRESETS):
        complete = defaults | entry.overrides
        Settings.from_config(complete)  # each key exists and each value is one of those it may have
        assert complete != defaults, "a variant must differ from what it varies"
    assert resolve("MLLMMSR:no-sft").overrides == resolve("MLLMMSR:zero-shot").overrides


def test_tallrec_is_a_baseline_that_reads_titles_alone():
    entry = resolve("TALLRec")
    assert (entry.label, entry.model, entry.kind) == ("TALLRec", "MLLMMSR", "baseline")
    assert entry.overrides == {"summary_mode": "none", "item_summary": "none", "use_image": False}


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("MLLMMSR:zeroshot", "MLLMMSR:zero-shot"),
        ("MLLMMSR:block-0", "block-N"),
        ("MLLMMSR:no-images", "did you mean MLLMMSR:no-image"),
        ("MLLMMSR:block3", "did you mean MLLMMSR:block-3"),
        ("Pop:direct", "only these have named variants: MLLMMSR:zero-shot"),
        ("", "no model"),
    ],
)
def test_an_unknown_label_is_refused_before_anything_runs(tmp_path, label, words):
    with pytest.raises(UserError, match=words):
        plan(tmp_path, "Pop", label)


@pytest.mark.parametrize("changes", [{"labels": ()}, {"seeds": ()}, {"jobs": 0}, {"limit_users": 0}])
def test_a_plan_that_cannot_run_is_refused(tmp_path, changes):
    with pytest.raises(UserError):
        plan(tmp_path, "Pop", **changes)


def test_a_file_that_decides_what_is_ranked_counts_by_what_it_holds(tmp_path):
    first, moved, config = tmp_path / "first.jsonl", tmp_path / "moved.jsonl", tmp_path / "given.yaml"
    first.write_text("one")
    moved.write_text("one")

    def named(**changes: Any) -> str:
        return jobs_of(plan(tmp_path, "Pop", **changes))[0].run_id

    told = [named(overrides={"candidates_file": str(file)}) for file in (first, moved)]
    config.write_text(f"candidates_file: {first}\n")
    told.append(named(config_files=(str(config),)))
    moved.write_text("another")
    first.write_text("another")
    after = [named(overrides={"candidates_file": str(file)}) for file in (first, moved)]
    after.append(named(config_files=(str(config),)))
    assert told[0] == told[1] != after[0] == after[1]
    assert told[2] != after[2], "named in a config file it counts by what it holds too"


def test_what_baselines_yaml_says_of_a_model_that_needs_no_training_holds_for_it_alone():
    assert resolve("ItemKNN").defaults == {"k": 200} and not resolve("Pop").defaults
    narm = resolve("NARM").defaults
    assert (narm["learning_rate"], narm["train_batch_size"]) == (0.005, 256)


def test_sets_of_models_are_what_the_field_is_made_of():
    assert expand("quick, TALLRec,Pop") == ("Pop", "ItemKNN", "SASRec", "GRU4Rec", "MLLMMSR", "TALLRec")
    assert {f"MLLMMSR:block-{size}" for size in range(1, 6)} <= set(expand("ablations"))
    for label in expand(",".join(SETS)):
        resolve(label)
    assert {"SASRecF:text", "GRU4RecF:image"} <= set(expand("features")) and len(expand("baselines")) == 11


def test_a_board_of_two_sets_of_candidates_is_refused_before_anything_starts(tmp_path, worker):
    def digests(jobs, compared):
        return {job["run_id"]: "aa" if job["label"] == "Pop" else "bb" for job in jobs}

    with pytest.raises(
        UserError, match=r"aa: Pop-2024-\w+; bb: SASRec-2024-\w+\); give one of them another --output_dir"
    ):
        benchmark(plan(tmp_path, "Pop", "SASRec"), worker, print, digests)
    assert not (tmp_path / "results").exists()


def test_runs_of_before_with_other_candidates_or_another_dataset_are_named_at_once(tmp_path, worker):
    benchmark(plan(tmp_path, "Pop"), worker, print)
    asked: list[bool] = []

    def digests(jobs, compared):
        asked.append(compared)
        return {job["run_id"]: "0123456789abcdef" for job in jobs}

    with pytest.raises(
        UserError, match=rf"{CANDIDATES}: Pop-.*; 0123456789abcdef: SASRec-.*{CANDIDATES} was drawn by the rules of"
    ):
        benchmark(plan(tmp_path, "Pop", "SASRec"), worker, print, digests)
    with pytest.raises(
        UserError, match="holds runs of dataset demo .Pop-.*give this one of other another --output_dir"
    ):
        benchmark(plan(tmp_path, "SASRec", dataset="other"), worker, print, digests)
    assert len(started(tmp_path)) == 1 and asked == [True]
    benchmark(plan(tmp_path, "Pop"), worker, print, digests)  # nothing is due, so nobody is asked
    benchmark(plan(tmp_path, "Pop", force=True), worker, print, digests)  # and what runs again stands in nobody's way
    assert len(started(tmp_path)) == 2 and asked == [True, False]


def test_the_digests_of_a_benchmark_are_those_its_runs_will_have(tmp_path, monkeypatch):
    random_world.write(tmp_path, "random", seed=11, users=50, items=60)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    file = tmp_path / "own.yaml"
    file.write_text("data_path: .\nper_model:\n  SASRec: {candidate_seed: 7}\n")

    def found(*labels: str) -> dict[str, str]:
        given = {"dataset": "random", "config_files": (str(file),), "overrides": {"mllm": "none"}}
        jobs = [job.order() for job in jobs_of(plan(tmp_path, *labels, **given))]
        known = digests_of(jobs, False)
        return {job["label"]: known[job["run_id"]] for job in jobs if known}

    read: list[str] = []
    stock = candidates.digest_of
    monkeypatch.setattr(candidates, "digest_of", lambda config: read.append(config["model"]) or stock(config))
    assert found("Pop", "BPR", "ItemKNN", "MLLMMSR") == {} and not read  # nothing they could be told apart by
    known = found("Pop", "BPR", "SASRec", "MLLMMSR")
    assert known["Pop"] == known["BPR"] == known["MLLMMSR"] != known["SASRec"] and len(set(read)) == 2
    monkeypatch.setattr(candidates, "digest_of", stock)
    for label in ("Pop", "SASRec"):
        (job,) = (job.order() for job in jobs_of(plan(tmp_path, label, dataset="random", config_files=(str(file),))))
        (tmp_path / "results/runs" / job["run_id"]).mkdir(parents=True)
        run_job({**job, "overrides": {"epochs": 1}})
        os.chdir(tmp_path)
        assert read_records(tmp_path / "results/runs.jsonl")[-1].candidates == known[label]
    with pytest.raises(UserError, match=f"its candidates are {known['Pop']}, and were 00 when the benchmark began"):
        (job,) = (job.order() for job in jobs_of(plan(tmp_path, "Pop", dataset="random", config_files=(str(file),))))
        run_job({**job, "candidates": "00"})
