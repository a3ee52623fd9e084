"""Run every model of a benchmark, each (model, seed) in a process of its own, and keep the leaderboard up to date.

Nothing finished is ever run again unless asked, and nothing that crashed is taken for finished: starting the same
benchmark again after an interruption, a crash or ``kill -9`` leads to the leaderboard it would have led to.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from datetime import datetime
from pathlib import Path
from typing import Any

from recbole_mllm import ranks
from recbole_mllm.benchmark.child import LOG, Stopped, claim, failure, run_child
from recbole_mllm.benchmark.jobs import BenchmarkPlan, Job, jobs_of
from recbole_mllm.benchmark.launched import Orders
from recbole_mllm.benchmark.leaderboard import VALID_METRIC
from recbole_mllm.benchmark.portable import said_anywhere
from recbole_mllm.benchmark.progress import Progress
from recbole_mllm.benchmark.records import (
    CANDIDATE_RULES,
    RECORDS,
    RunRecord,
    append,
    different_candidates,
    latest,
    plain_json,
    read_records,
)
from recbole_mllm.benchmark.report import HTML, render, write_note
from recbole_mllm.benchmark.tuning import TRIALS
from recbole_mllm.errors import UserError
from recbole_mllm.files import BENCHMARK, check_folder, remove_file, write_text

WORKER = (sys.executable, "-m", "recbole_mllm.benchmark.worker")


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
    expected = _refuse_other_candidates(plan, jobs, digests)
    plan.output_dir.mkdir(parents=True, exist_ok=True)
    (plan.output_dir / RECORDS).touch()  # which makes the folder ours, should this end before its first record
    if plan.note:
        write_note(plan.output_dir, plan.note)
    bench = _Bench(plan, tuple(worker), Progress(len(jobs), live=plan.jobs == 1, tell=tell), expected)
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


def _refuse_other_candidates(plan: BenchmarkPlan, jobs: Sequence[Job], digests: Digests | None) -> Mapping[str, str]:
    """Refuse a leaderboard of two datasets or two sets of candidates; return the runs' digests where they are known."""
    ours = {job.run_id for job in jobs}
    done = {run: record for run, record in latest(read_records(plan.output_dir / RECORDS)).items() if record.ok}
    kept = {run: record for run, record in done.items() if not (plan.force and run in ours)}
    for run, record in kept.items():
        if record.dataset != plan.dataset:
            raise UserError(
                f"{plan.output_dir} holds runs of dataset {record.dataset} ({run}), and a leaderboard is of one; give "
                f"this one of {plan.dataset} another --output_dir"
            )
    due = [job.order() for job in jobs if job.run_id not in kept]
    if digests is None or not due:
        return {}
    found = digests(due, bool(kept))
    sets: dict[str, list[str]] = {}
    for run, digest in [*((run, record.candidates) for run, record in kept.items()), *found.items()]:
        sets.setdefault(digest, []).append(run)
    if len(sets) > 1:
        raise different_candidates(
            sets, {record.candidates for record in kept.values() if record.candidate_rules < CANDIDATE_RULES}
        )
    return found


class _Bench:
    """The state that the jobs at work share."""

    def __init__(
        self, plan: BenchmarkPlan, worker: tuple[str, ...], progress: Progress, expected: Mapping[str, str]
    ) -> None:
        self.plan = plan
        self.worker = worker
        self.progress = progress
        self.expected = expected
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
            remove_file(job.folder / TRIALS)
        told = plain_json({**job.order(), "candidates": self.expected.get(job.run_id)})
        write_text(order, json.dumps(told, indent=2))
        started, clock = datetime.now().astimezone(), time.monotonic()
        known = self._records_of(job)
        self.progress.start(job.number, job.name)
        reason = self._child(job, order, told, lock)
        if len(self._records_of(job)) == len(known):
            append(self.records, _failed(job, reason or failure(job.folder / LOG, 0), started))
        record = self._records_of(job)[-1]
        self.progress.end(job.number, job.name, f"{time.monotonic() - clock:.0f} s {_headline(record)}")

    def _child(self, job: Job, order: Path, told: Mapping[str, Any], lock: int) -> str:
        """Run the job in a child, under a launcher in one of each process for MLLMMSR; return why it failed, or ""."""

        def tick(seconds: float, line: str) -> None:
            self.progress.tick(job.number, job.name, seconds, line)

        if ranks.is_launched() and job.entry.kind == "mllm":
            _, reason = self.orders.run(self.worker, told, job.folder, lock, self.stop, tick)
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
        world_size=ranks.world_size() if job.entry.kind == "mllm" else 1,
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
