"""Run every model of a benchmark, each (model, seed) in a process of its own, and keep the leaderboard up to date.

Nothing finished is ever run again unless asked, and nothing that crashed is taken for finished: starting the same
benchmark again after an interruption, a crash or ``kill -9`` leads to the leaderboard it would have led to.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from recbole_mllm import ranks
from recbole_mllm.benchmark.child import LOG, Stopped, claim, failure, run_child
from recbole_mllm.benchmark.field import Entry, resolve
from recbole_mllm.benchmark.launched import Orders
from recbole_mllm.benchmark.leaderboard import VALID_METRIC
from recbole_mllm.benchmark.portable import said_anywhere
from recbole_mllm.benchmark.progress import Progress
from recbole_mllm.benchmark.records import RECORDS, RunRecord, append, latest, plain_json, read_records
from recbole_mllm.benchmark.report import HTML, render, write_note
from recbole_mllm.benchmark.tuning import TRIALS
from recbole_mllm.config import file_keys
from recbole_mllm.errors import UserError

DECISIVE_FILES = ("candidates_file", "retriever_checkpoint", "prompt_style")
WORKER = (sys.executable, "-m", "recbole_mllm.benchmark.worker")


@dataclass(frozen=True, slots=True)
class BenchmarkPlan:
    """What to run, where, and with which settings.

    Args:
        labels: Model names or variants, see `field.resolve`.
        config_files: As RecBole takes them; they and `overrides` apply to every model.
        force: Run again what is finished.
        embed_images: Whether the report's case studies show thumbnails.
        limit_users: Evaluate a seeded sample of this many users.
        tune: How many configurations each model may try on validation first; 0 = none.
        note: A sentence about the data that every report must carry.
    """

    dataset: str
    labels: tuple[str, ...]
    seeds: tuple[int, ...]
    output_dir: Path
    config_files: tuple[str, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    jobs: int = 1
    force: bool = False
    embed_images: bool = True
    limit_users: int | None = None
    tune: int = 0
    note: str = ""

    def __post_init__(self) -> None:
        """Refuse a plan that could not run, before anything does."""
        if not self.labels or not self.seeds:
            raise UserError("a benchmark needs at least one model and one seed: --models Pop,SASRec --seeds 2024")
        if self.jobs < 1:
            raise UserError(f"--jobs {self.jobs}: at least one run must be at work at a time")
        if self.jobs > 1 and ranks.is_launched():
            raise UserError(
                f"--jobs {self.jobs}: under a launcher its processes share one run at a time; leave --jobs out"
            )
        if self.tune < 0:
            raise UserError(f"--tune {self.tune}: give how many configurations each model may try, or 0")
        if self.limit_users is not None and self.limit_users < 1:
            raise UserError(f"--limit_users {self.limit_users}: at least one user must be evaluated")
        for label in self.labels:
            resolve(label)


@dataclass(frozen=True, slots=True)
class Job:
    """One (model, seed) of a plan and its place in the order."""

    number: int
    entry: Entry
    seed: int
    run_id: str
    plan: BenchmarkPlan

    @property
    def name(self) -> str:
        """How the job is called on the screen."""
        return f"{self.entry.label} seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Where the job's own files lie: its order, log, checkpoints and arrays."""
        return self.plan.output_dir / "runs" / self.run_id

    def order(self) -> dict[str, Any]:
        """Return what the worker is told: `defaults` stand below the config files, `overrides` above them."""
        return {
            "run_id": self.run_id,
            "model": self.entry.model,
            "label": self.entry.label,
            "kind": self.entry.kind,
            "seed": self.seed,
            "dataset": self.plan.dataset,
            "config_files": list(self.plan.config_files),
            "defaults": dict(self.entry.defaults),
            "overrides": {**self.plan.overrides, **self.entry.overrides},
            "output_dir": str(self.plan.output_dir),
            "limit_users": self.plan.limit_users,
            "tune": self.plan.tune,
        }


def jobs_of(plan: BenchmarkPlan) -> list[Job]:
    """Return the plan's jobs in order, one seed after the other, so that a whole table stands early."""
    entries = list(dict.fromkeys(plan.labels))
    pairs = [(resolve(label), seed) for seed in dict.fromkeys(plan.seeds) for label in entries]
    return [
        Job(number, entry, seed, run_id(entry, seed, plan), plan) for number, (entry, seed) in enumerate(pairs, start=1)
    ]


def run_id(entry: Entry, seed: int, plan: BenchmarkPlan) -> str:
    """Name a run readably; the digest covers everything that decides its outcome except the seed, which stands beside.

    So the seeds of one configuration share the digest and are averaged, and another configuration is another row.
    Config files, and files that decide what is ranked and how, count by what they hold and not by where they lie.
    """
    files = [*plan.config_files, *_files_named(plan)]
    contents = [hashlib.sha256(Path(f).read_bytes()).hexdigest() if Path(f).is_file() else f for f in files]
    keys = {key: value for key, value in plan.overrides.items() if str(value) not in files or key not in DECISIVE_FILES}
    decisive = [entry.model, plan.dataset, entry.defaults, {**keys, **entry.overrides}, contents, plan.limit_users]
    text = json.dumps(plain_json([*decisive, *([plan.tune] if plan.tune else [])]), sort_keys=True)
    readable = re.sub(r"[^A-Za-z0-9]+", "-", entry.label)
    return f"{readable}-{seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _files_named(plan: BenchmarkPlan) -> list[str]:
    """Return the files that the command line and the config files name, such as ``candidates_file``, where they are."""
    said = [file_keys(name) for name in plan.config_files if Path(name).is_file()]
    named = [keys[key] for keys in (*said, plan.overrides) for key in DECISIVE_FILES if keys.get(key)]
    return [str(name) for name in named if Path(str(name)).is_file()]


def benchmark(plan: BenchmarkPlan, worker: Sequence[str] = WORKER, tell: Callable[[str], None] | None = None) -> Path:
    """Run what is not finished yet and return the path of the HTML report; the other forms lie beside it.

    A run that fails gets a row that says why. Ctrl-C and SIGTERM end the runs at work, keep the finished ones and leave
    with exit code 1.

    Args:
        plan: What to run and where.
        worker: The command that gets the path of a ``job.json``; it appends the run's record and exits with 0.
        tell: Where each line for the user goes; default: standard output, live on a terminal.
    """
    plan.output_dir.mkdir(parents=True, exist_ok=True)
    if plan.note:
        write_note(plan.output_dir, plan.note)
    jobs = jobs_of(plan)
    bench = _Bench(plan, tuple(worker), Progress(len(jobs), live=plan.jobs == 1, tell=tell))
    try:
        with _terminable():
            bench.run_all(jobs)
    except KeyboardInterrupt:
        done = sum(bench.finished(job) is not None for job in jobs)
        bench.progress.say(
            f"stopped; {done} of {len(jobs)} runs are finished and kept: the same command goes on from there"
        )
        raise SystemExit(1) from None
    render(plan.output_dir, embed_images=plan.embed_images)
    return plan.output_dir / HTML


class _Bench:
    """The state that the jobs at work share."""

    def __init__(self, plan: BenchmarkPlan, worker: tuple[str, ...], progress: Progress) -> None:
        self.plan = plan
        self.worker = worker
        self.progress = progress
        self.records = plan.output_dir / RECORDS
        self.stop = threading.Event()
        self.rendering = threading.Lock()
        self.orders = Orders()

    def run_all(self, jobs: Sequence[Job]) -> None:
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
            if ranks.is_launched():
                self.orders.end()

    def finished(self, job: Job) -> RunRecord | None:
        """Return the job's record if its last run succeeded."""
        record = latest(read_records(self.records)).get(job.run_id)
        return record if record is not None and record.ok else None

    def run_one(self, job: Job) -> None:
        """Do one job unless it is done, and put it into the leaderboard."""
        with contextlib.suppress(Stopped), claim(job.folder, self.stop, self._waiting(job)) as lock:
            kept = None if self.plan.force else self.finished(job)
            if kept is not None:
                self.progress.end(job.number, job.name, f"kept from before, {_headline(kept)}")
                return
            self._work(job, lock)
            with self.rendering:
                render(self.plan.output_dir, embed_images=self.plan.embed_images)

    def _work(self, job: Job, lock: int) -> None:
        """Start the child and see to it that it leaves a record, good or bad."""
        if self.stop.is_set():
            raise Stopped
        order = job.folder / "job.json"
        if self.plan.force:
            (job.folder / TRIALS).unlink(missing_ok=True)
        order.write_text(json.dumps(plain_json(job.order()), indent=2))
        started, clock = datetime.now().astimezone(), time.monotonic()
        known = self._records_of(job)
        self.progress.start(job.number, job.name)
        reason = self._child(job, order, lock)
        if len(self._records_of(job)) == len(known):
            append(self.records, _failed(job, reason or failure(job.folder / LOG, 0), started))
        record = self._records_of(job)[-1]
        self.progress.end(job.number, job.name, f"{time.monotonic() - clock:.0f} s {_headline(record)}")

    def _child(self, job: Job, order: Path, lock: int) -> str:
        """Run the job in a child, under a launcher in one of each process for MLLMMSR; return why it failed, or ""."""

        def tick(seconds: float, line: str) -> None:
            self.progress.tick(job.number, job.name, seconds, line)

        if ranks.is_launched() and job.entry.kind == "mllm":
            _, reason = self.orders.run(self.worker, plain_json(job.order()), job.folder, lock, self.stop, tick)
            return reason
        code = run_child([*self.worker, str(order)], job.folder, lock, self.stop, tick)
        return failure(job.folder / LOG, code) if code else ""

    def _records_of(self, job: Job) -> list[RunRecord]:
        return [record for record in read_records(self.records) if record.run_id == job.run_id]

    def _waiting(self, job: Job) -> Callable[[str], None]:
        text = f"[{job.number}/{self.progress.total}] {job.name}: process {{}} is still at this run; waiting for it"
        return lambda process: self.progress.say(text.format(process))


def _failed(job: Job, reason: str, started: datetime) -> RunRecord:
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
    )


def _headline(record: RunRecord) -> str:
    if not record.ok:
        return f"failed: {record.status}"
    metric = VALID_METRIC if VALID_METRIC in record.metrics else next(iter(record.metrics))
    return f"{metric} {record.metrics[metric]:.3f}"


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
