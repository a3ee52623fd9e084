"""Run every model of a benchmark, each (model, seed) in a process of its own, and keep the leaderboard up to date.

Nothing finished is ever run again unless asked, and nothing that crashed is taken for finished: starting the same
benchmark again after an interruption, a crash or ``kill -9`` leads to the leaderboard it would have led to.

Under a launcher MLLMMSR's runs are shared: the main process decides what runs, the others `follow`, and each starts a
child of its own for a run. These form a group of their own at a port of their own, so a crash costs that run alone.
Baselines are the main process's, and their children see nothing of the launcher.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from recbole_mllm.benchmark.jobs import BenchmarkJob, BenchmarkPlan, jobs_of
from recbole_mllm.benchmark.leaderboard import VALID_METRIC
from recbole_mllm.benchmark.portable import said_anywhere
from recbole_mllm.benchmark.process import LOG, PLACE, Stopped, Tick, claim, failure, run_child, without_launcher
from recbole_mllm.benchmark.records import (
    CANDIDATE_RULES,
    RECORDS,
    RunRecord,
    append,
    latest,
    one_set_of_candidates,
    plain_json,
    read_records,
    records_of,
)
from recbole_mllm.benchmark.report import HTML, render, write_note
from recbole_mllm.benchmark.search import TRIALS
from recbole_mllm.common import distributed
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.files import BENCHMARK, check_folder, remove_file, write_text

WORKER = (sys.executable, "-m", "recbole_mllm.benchmark.worker")
HEARTBEAT_S = 60.0
_CHECK_S = 1.0
_CLEAR = "\r\x1b[K"

Digests = Callable[[Sequence[Mapping[str, Any]], bool], Mapping[str, str]]


def benchmark(
    plan: BenchmarkPlan,
    worker: Sequence[str] = WORKER,
    tell: Callable[[str], None] | None = None,
    digests: Digests | None = None,
) -> Path:
    """Run what is not finished yet and return the path of the HTML report; the other forms lie beside it.

    A run that fails gets a row that says why. Ctrl-C and SIGTERM end the runs at work, keep the finished ones and leave
    with exit code 1.

    Args:
        plan: What to run and where.
        worker: The command that gets the path of a ``job.json``; it appends the run's record and exits with 0.
        tell: Where each line for the user goes; default: standard output, live on a terminal.
        digests: Which candidates runs will meet (`worker.digests_of`), so that none starts in vain; None asks nobody.

    Raises:
        UserError: The runs, and those of before, could not share a leaderboard.
    """
    check_folder(plan.output_dir, BENCHMARK, "--output_dir")
    jobs = jobs_of(plan)
    expected = _check_comparable(plan, jobs, digests)
    plan.output_dir.mkdir(parents=True, exist_ok=True)
    (plan.output_dir / RECORDS).touch()  # which makes the folder ours, should this end before its first record
    if plan.note:
        write_note(plan.output_dir, plan.note)
    bench = _Bench(plan, worker, BenchmarkLines(len(jobs), plan.jobs == 1, tell), expected)
    try:
        with _terminable():
            bench.run_all(jobs)
    except KeyboardInterrupt:
        done = sum(bench.finished(job) is not None for job in jobs)
        bench.lines.say(f"stopped; {done} of {len(jobs)} runs are finished and kept: the same command resumes there")
        raise SystemExit(1) from None
    render(plan.output_dir, embed_images=plan.embed_images)
    return plan.output_dir / HTML


def _check_comparable(plan: BenchmarkPlan, jobs: Sequence[BenchmarkJob], digests: Digests | None) -> Mapping[str, str]:
    """Refuse a leaderboard of two datasets or two sets of candidates; return the runs' digests where they are known."""
    ours = {job.run_id for job in jobs}
    done = {run: record for run, record in latest(read_records(plan.output_dir / RECORDS)).items() if record.ok}
    stay = {run: record for run, record in done.items() if not (plan.force and run in ours)}
    for run, record in stay.items():
        if record.dataset != plan.dataset:
            raise UserError(
                f"{plan.output_dir} holds runs of dataset {record.dataset} ({run}), and a leaderboard is of one; give "
                f"this one of {plan.dataset} another --output_dir"
            )
    due = [job.order() for job in jobs if job.run_id not in stay]
    if digests is None or not due:
        return {}
    found = digests(due, bool(stay))
    sets: dict[str, list[str]] = {}
    for run, digest in [*((run, record.candidates) for run, record in stay.items()), *found.items()]:
        sets.setdefault(digest, []).append(run)
    older = {record.candidates for record in stay.values() if record.candidate_rules < CANDIDATE_RULES}
    one_set_of_candidates(sets, older)
    return found


class BenchmarkLines:
    """What the user sees: lines such as ``[2/5] SASRec seed 2024 … 34 s NDCG@10 0.412``.

    Args:
        total: How many runs there are.
        live: Whether one line may be rewritten in place; only ever done on a terminal.
        tell: Takes each finished line instead of standard output.
    """

    def __init__(self, total: int, live: bool, tell: Callable[[str], None] | None = None) -> None:
        self.total = total
        self._tell = tell
        self._live = live and tell is None and sys.stdout.isatty()
        self._lock = threading.Lock()
        self._last: dict[int, float] = {}

    def tick(self, job: BenchmarkJob, seconds: float, line: str) -> None:
        """Show how long a run has taken and what it said last; in a log file when it begins, then once a minute."""
        text = f" {seconds:.0f} s  {line}" if seconds else ""
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            with self._lock:
                sys.stdout.write(_CLEAR + f"{self._head(job)}{text}"[:width])
                sys.stdout.flush()
        elif not seconds or time.monotonic() - self._last[job.number] >= HEARTBEAT_S:
            self._last[job.number] = time.monotonic()
            self.say(f"{self._head(job)}{text}")

    def end(self, job: BenchmarkJob, result: str) -> None:
        """Say how a run went."""
        self.say(f"{self._head(job)} {result}")

    def say(self, line: str) -> None:
        """Print a line that stays."""
        with self._lock:
            if self._tell is not None:
                self._tell(line)
            else:
                print(_CLEAR + line if self._live else line, flush=True)

    def _head(self, job: BenchmarkJob) -> str:
        return f"[{job.number}/{self.total}] {job.name} …"


class _Bench:
    """The state that the jobs at work share."""

    def __init__(
        self, plan: BenchmarkPlan, worker: Sequence[str], lines: BenchmarkLines, expected: Mapping[str, str]
    ) -> None:
        self.plan = plan
        self.worker = worker
        self.lines = lines
        self.expected = expected
        self.records = plan.output_dir / RECORDS
        self.stop = threading.Event()
        self.rendering = threading.Lock()
        self.shared = 0  # how many runs all processes were asked to share

    def run_all(self, jobs: Sequence[BenchmarkJob]) -> None:
        """Run the jobs, `plan.jobs` at a time; whatever ends this ends all of them."""
        pool = ThreadPoolExecutor(self.plan.jobs)
        pending = {pool.submit(self.run_one, job) for job in jobs}
        try:
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
        finally:
            self.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            if distributed.is_launched():
                distributed.post(f"order/{self.shared + 1}", pickle.dumps(None))  # lets the others go

    def finished(self, job: BenchmarkJob) -> RunRecord | None:
        """Return the job's record if its last run succeeded."""
        records = records_of(self.records, job.run_id)
        return records[-1] if records and records[-1].ok else None

    def run_one(self, job: BenchmarkJob) -> None:
        """Do one job unless it is done, and put it into the leaderboard."""
        number = f"[{job.number}/{self.lines.total}] {job.name}"

        def waiting(process: str) -> None:
            self.lines.say(f"{number}: process {process} is still at this run; waiting for it")

        with contextlib.suppress(Stopped), claim(job.folder, self.stop, waiting) as lock:
            if not self.plan.force and (record := self.finished(job)) is not None:
                self.lines.end(job, f"finished before, {_headline(record)}")
                return
            if self.stop.is_set():
                raise Stopped
            self._work(job, lock)
            with self.rendering:
                render(self.plan.output_dir, embed_images=self.plan.embed_images)

    def _work(self, job: BenchmarkJob, lock: int) -> None:
        """Start the child, under a launcher one of each process for MLLMMSR; see to it that it leaves a record."""
        if self.plan.force:
            remove_file(job.folder / TRIALS)
        order = {**job.order(), "candidates": self.expected.get(job.run_id), "home": str(Path.cwd())}
        started, clock = datetime.now().astimezone(), time.monotonic()
        known = records_of(self.records, job.run_id)

        def tick(seconds: float, line: str) -> None:
            self.lines.tick(job, seconds, line)

        tick(0, "")
        if distributed.is_launched() and job.entry.kind == "mllm":
            self.shared += 1
            reason = _share(self.shared, self.worker, order, job.folder.resolve(), lock, self.stop, tick)
        else:
            code = run_child([*self.worker, write_order(job.folder, order)], job.folder, lock, self.stop, tick)
            reason = failure(job.folder / LOG, code) if code else ""
        if len(records_of(self.records, job.run_id)) == len(known):
            append(self.records, _failed(job, reason or failure(job.folder / LOG, 0), started))
        self.lines.end(job, f"{time.monotonic() - clock:.0f} s {_headline(records_of(self.records, job.run_id)[-1])}")


def write_order(folder: Path, order: Mapping[str, Any], name: str = "job.json") -> str:
    """Write a worker's order into the run's folder; return its absolute path."""
    path = folder.resolve() / name
    write_text(path, json.dumps(plain_json(order), indent=2))
    return str(path)


def _failed(job: BenchmarkJob, reason: str, started: datetime) -> RunRecord:
    return RunRecord(
        run_id=job.run_id,
        model=job.entry.model,
        label=job.entry.label,
        kind=job.entry.kind,
        seed=job.seed,
        dataset=job.plan.dataset,
        status=f"{said_anywhere(reason)} (log: {(job.folder / LOG).relative_to(job.plan.output_dir)})",
        started=started.isoformat(timespec="seconds"),
        config=job.order(),
        world_size=distributed.world_size() if job.entry.kind == "mllm" else 1,
    )


def _headline(record: RunRecord) -> str:
    if not record.ok:
        return f"failed: {record.status}"
    metric = VALID_METRIC if VALID_METRIC in record.metrics else next(iter(record.metrics))
    mode = (record.config.get("eval_args") or {}).get("mode", "")
    told = mode.get("test", "") if isinstance(mode, Mapping) else mode
    return f"{metric} {record.metrics[metric]:.3f} on test" + (f" ({told})" if told else "")


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Treat SIGTERM and SIGHUP as Ctrl-C, so that they too leave no child behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Runs that several processes share


class _OtherFailed(Exception):
    """The child of another process has failed; ours cannot finish."""


@dataclass(frozen=True, slots=True)
class _Ended:
    """How a process's child ended: its exit code and, if it failed of itself, the how many-th to fail and why."""

    process: int
    code: int
    turn: int = 0
    words: str = ""


def _share(
    number: int,
    worker: Sequence[str],
    job: Mapping[str, Any],
    folder: Path,
    lock: int,
    stop: threading.Event,
    tick: Tick,
) -> str:
    """Let every process run `worker` on `job`; return why it failed, or "".

    The first child that failed of itself, and not because another one had, says why; one that was killed had no word
    to say before the others.
    """
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = int(probe.getsockname()[1])
    order = {"worker": list(worker), "job": dict(job), "folder": str(folder), "port": port}
    distributed.post(f"order/{number}", pickle.dumps(order))
    own = _run_part(number, order, lock, stop, tick)
    others = [
        pickle.loads(distributed.read(f"report/{number}/{process}")) for process in range(1, distributed.world_size())
    ]
    failed = [ended for ended in (own, *others) if ended.code]
    if not failed:
        return ""
    first = min(failed, key=lambda ended: (ended.code == distributed.LOST, ended.code != -signal.SIGKILL, ended.turn))
    words = (
        f"process {first.process}: {first.words}; its log: log.{first.process}.txt" if first.process else first.words
    )
    return words or "a process said nothing"


def follow() -> int:
    """Run what the main process orders until it says that there is no more; return the exit code."""
    number = 0
    while True:
        number += 1
        order = pickle.loads(distributed.read(f"order/{number}"))
        if order is None:
            return 0
        ended = _run_part(number, order, None, threading.Event(), lambda seconds, line: None)
        distributed.post(f"report/{number}/{distributed.rank()}", pickle.dumps(ended))


def _run_part(number: int, order: Mapping[str, Any], lock: int | None, stop: threading.Event, tick: Tick) -> _Ended:
    """Run this process's child of the shared run `number`; as soon as one process's has failed, the others' end."""
    folder, process = Path(order["folder"]), distributed.rank()
    folder.mkdir(parents=True, exist_ok=True)
    name, log = ("job.json", LOG) if distributed.is_main() else (f"job.{process}.json", f"log.{process}.txt")
    command = [*order["worker"], write_order(folder, order["job"], name)]
    failed, checked = f"stop/{number}", time.monotonic()

    def watch(seconds: float, line: str) -> None:
        nonlocal checked
        if time.monotonic() - checked > _CHECK_S:
            checked = time.monotonic()
            if distributed.is_posted(failed):
                raise _OtherFailed
        tick(seconds, line)

    try:
        code = run_child(
            command, folder, lock, stop, watch, environment=_environment_of_part(os.environ, order["port"]), log=log
        )
    except _OtherFailed:
        return _Ended(process, distributed.LOST)
    except BaseException:
        distributed.post(failed, b"1")
        raise
    if not code:
        return _Ended(process, 0)
    distributed.post(failed, b"1")
    return _Ended(process, code, distributed.count(f"failed/{number}"), failure(folder / log, code))


def _environment_of_part(given: Mapping[str, str], port: int) -> dict[str, str]:
    """Return `given` for a child that forms a group at `port` with its like; the main process's child is the host."""
    group = {name: given[name] for name in (*PLACE, "MASTER_ADDR") if name in given}
    return without_launcher(given) | group | {"MASTER_PORT": str(port)}
