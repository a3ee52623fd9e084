"""Run every model of a benchmark, each (model, seed) in a process of its own, and keep the leaderboard up to date.

Nothing finished is ever run again unless asked, and nothing that crashed is taken for finished: starting the same
benchmark again after an interruption, a crash or ``kill -9`` leads to the leaderboard it would have led to.

Under a launcher MLLMMSR's runs are shared: the main process decides what runs, the others `follow`, and each starts a
child of its own for a run. These form a group of their own at a port of their own, so a crash costs that run alone.
Baselines are the main process's, and their children see nothing of the launcher.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from datetime import datetime
from pathlib import Path
from typing import Any

from recbole_mllm.benchmark.jobs import BenchmarkJob, BenchmarkPlan, given_to, jobs_of, shared_rates
from recbole_mllm.benchmark.process import (
    LOG,
    PLACE,
    WORKER,
    Stopped,
    Tick,
    claim,
    failure,
    heartbeat,
    run_child,
    without_launcher,
    write_order,
)
from recbole_mllm.benchmark.records import (
    RECORDS,
    WHO,
    RunRecord,
    append,
    latest,
    one_set_of_candidates,
    one_set_of_data,
    read_records,
    records_of,
    said_anywhere,
)
from recbole_mllm.benchmark.report import render, write_note
from recbole_mllm.benchmark.rerun import weights_now
from recbole_mllm.benchmark.search import TRIALS
from recbole_mllm.common import distributed
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.files import BENCHMARK, check_folder, remove_file
from recbole_mllm.common.model_names import is_same
from recbole_mllm.common.settings import MODELS

_CHECK_S = 1.0
_EXACT = re.compile(r"#[0-9a-f]{16}$|@[0-9a-f]{40}(?=:|$)")  # a digest of files, or a commit
_CLEAR = "\r\x1b[K"

Digests = Callable[[Sequence[Mapping[str, Any]], bool], Mapping[str, str]]


def benchmark(
    plan: BenchmarkPlan,
    worker: Sequence[str] = WORKER,
    tell: Callable[[str], None] | None = None,
    digests: Digests | None = None,
) -> list[str]:
    """Run what is not finished yet, write the report, and return the names of the runs that have failed.

    A run that fails gets a row that says why; the others continue. Ctrl-C and SIGTERM end the runs at work, keep the
    finished ones and leave with exit code 1.

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
    bench = _Bench(plan, worker, tell, len(jobs), expected)
    if line := shared_rates(plan):
        bench.say(line)
    try:
        with _terminable():
            bench.run_all(jobs)
    except KeyboardInterrupt:
        done = sum(bench.finished(job) is not None for job in jobs)
        bench.say(f"stopped; {done} of {len(jobs)} runs are finished; the same command resumes")
        raise
    render(plan.output_dir, embed_images=plan.embed_images)
    return [job.name for job in jobs if bench.finished(job) is None]


def _check_comparable(plan: BenchmarkPlan, jobs: Sequence[BenchmarkJob], digests: Digests | None) -> Mapping[str, str]:
    """Refuse a leaderboard of two datasets or two sets of candidates; return the runs' digests where they are known."""
    ours = {job.run_id for job in jobs} if plan.force else set()
    records = latest(read_records(plan.output_dir / RECORDS))
    stay = {run: record for run, record in records.items() if record.ok and run not in ours}
    for run, record in stay.items():
        if record.dataset != plan.dataset:
            raise UserError(
                f"{plan.output_dir} holds runs of dataset {record.dataset} ({run}), and a leaderboard is of one; give "
                f"this one of {plan.dataset} another --output_dir"
            )
    one_set_of_data(stay.values())
    asked = {}  # a run of each configuration and weights: the others are its seeds
    for job in jobs:
        finished = stay.get(job.run_id)
        if finished is not None and not job.entry.parts:
            asked[job.entry.label, repr(finished.weights)] = job, finished
    for job, finished in asked.values():
        _check_weights(job, finished)
    due = [job.order() for job in jobs if job.run_id not in stay and not job.entry.parts]
    if digests is None or not due:
        return {}
    found = digests(due, bool(stay))
    one_set_of_candidates(stay.values(), found)
    return found


def _check_weights(job: BenchmarkJob, record: RunRecord) -> None:
    """Refuse a finished run of other weights than it would have now, where both are known.

    Raises:
        UserError: A local model's files are others, or a hub's branch has moved.
    """
    given = given_to(job.entry, job.plan)
    for said, weights, now in weights_now(record, {key: given.get(key) for key in (f"{m}_revision" for m in MODELS)}):
        known = _EXACT.search(weights) and _EXACT.search(now)  # else the hub is out of reach, or the folder gone
        if known and not is_same(weights, now):
            raise UserError(
                f"{job.name} is finished with {said} as {weights}, which is {now} now; put the earlier one back, run "
                "again with --force, or give another --output_dir"
            )


class _Bench:
    """A benchmark at work. Its lines read ``[2/5] SASRec seed 2024 … 34 s NDCG@10 0.412``.

    On a terminal the line of the one run at work is rewritten in place; elsewhere it comes once a minute.
    """

    def __init__(
        self,
        plan: BenchmarkPlan,
        worker: Sequence[str],
        tell: Callable[[str], None] | None,
        total: int,
        expected: Mapping[str, str],
    ) -> None:
        self.plan, self.worker, self.total, self.expected = plan, worker, total, expected
        self.records = plan.output_dir / RECORDS
        self.stop = threading.Event()
        self.tell, self.live = tell, tell is None and plan.jobs == 1 and sys.stdout.isatty()
        self.printing, self.rendering = threading.Lock(), threading.Lock()
        self.shared = 0  # how many runs all processes were asked to share

    def say(self, line: str) -> None:
        """Print a line that stays."""
        with self.printing:
            if self.tell is not None:
                self.tell(line)
            else:
                print(_CLEAR + line if self.live else line, flush=True)

    def show(self, head: str) -> Tick:
        """Begin the line of a run at work; return what shows how long it has taken and what it said last."""
        if not self.live:
            self.say(head)
            return heartbeat(lambda line: self.say(f"{head} {line}"))

        def rewrite(seconds: float, line: str) -> None:
            with self.printing:
                shown = f"{head} {seconds:.0f} s  {line}"[: shutil.get_terminal_size().columns - 1]
                print(_CLEAR + shown, end="", flush=True)

        return rewrite

    def run_all(self, jobs: Sequence[BenchmarkJob]) -> None:
        """Run the jobs, `plan.jobs` at a time, and then those that fuse them; whatever ends this ends all of them."""
        pool = ThreadPoolExecutor(self.plan.jobs)
        try:
            for fused in (False, True):
                pending = {pool.submit(self.run_one, job) for job in jobs if bool(job.entry.parts) == fused}
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
        """Return the job's record if its last run succeeded, and what it was made of has not been run again since."""
        known = latest(read_records(self.records))
        record = known.get(job.run_id)
        if record is None or not record.ok:
            return None
        made_of = (record.fusion or {}).get("parts", {})
        return record if all(part in known and known[part].started == at for part, at in made_of.items()) else None

    def run_one(self, job: BenchmarkJob) -> None:
        """Do one job unless it is done, and put it into the leaderboard."""
        head = f"[{job.number}/{self.total}] {job.name}"

        def waiting(process: str) -> None:
            self.say(f"{head}: process {process} is still at this run; waiting for it")

        with contextlib.suppress(Stopped), claim(job.folder, self.stop, waiting) as lock:
            if not self.plan.force and (record := self.finished(job)) is not None:
                self.say(f"{head} … finished before, {_headline(record)}")
                return
            if self.stop.is_set():
                raise Stopped
            started = time.monotonic()
            record = self._work(job, lock, f"{head} …")
            self.say(f"{head} … {time.monotonic() - started:.0f} s {_headline(record)}")
            with self.rendering:
                try:
                    render(self.plan.output_dir, embed_images=self.plan.embed_images)
                except Exception as error:  # it is written once more at the end; the runs still due must not pay for it
                    self.say(f"the report cannot be written: {type(error).__name__}: {error}; the other runs continue")

    def _work(self, job: BenchmarkJob, lock: int, head: str) -> RunRecord:
        """Run the job in a child, MLLMMSR's in one of each process; return the record it left, or of its failure."""
        if self.plan.force:
            remove_file(job.folder / TRIALS)
        order = {**job.order(), "candidates": self.expected.get(job.run_id), "home": str(Path.cwd())}
        started, known = datetime.now().astimezone(), len(records_of(self.records, job.run_id))
        tick = self.show(head)
        shared = distributed.is_launched() and job.entry.kind == "mllm"
        if shared:
            reason = self._share(order, job.folder.resolve(), lock, tick)
        else:
            code = run_child([*self.worker, write_order(job.folder, order)], job.folder, lock, self.stop, tick)
            reason = failure(job.folder / LOG, code) if code else ""
        if len(records_of(self.records, job.run_id)) == known:
            reason = said_anywhere(reason or failure(job.folder / LOG, 0))
            failed = RunRecord(
                **{key: order[key] for key in WHO},
                status=f"{reason} (log: {(job.folder / LOG).relative_to(self.plan.output_dir)})",
                started=started.isoformat(timespec="seconds"),
                config=job.order(),
                world_size=distributed.world_size() if shared else 1,
            )
            append(self.records, failed)
        return records_of(self.records, job.run_id)[-1]

    def _share(self, job: Mapping[str, Any], folder: Path, lock: int, tick: Tick) -> str:
        """Let every process run the worker on `job`; return why it failed, or "".

        The first child that failed of itself, and not because another one had, says why; one that was killed had no
        word to say before the others.
        """
        self.shared += 1
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = int(probe.getsockname()[1])
        order = {"worker": list(self.worker), "job": dict(job), "folder": str(folder), "port": port}
        distributed.post(f"order/{self.shared}", pickle.dumps(order))
        own = _run_part(self.shared, order, lock, self.stop, tick)
        others = [
            pickle.loads(distributed.read(f"report/{self.shared}/{other}"))
            for other in range(1, distributed.world_size())
        ]
        failed = [ended for ended in (own, *others) if ended is not None]
        return (min(failed)[-1] or "a process said nothing") if failed else ""


def _headline(record: RunRecord) -> str:
    if not record.ok:
        return f"failed: {record.status}"
    metric = record.ranking_metric or ""
    mode = (record.config.get("eval_args") or {}).get("mode", "")
    drawn = mode.get("test", "") if isinstance(mode, Mapping) else mode
    return f"{metric} {record.metrics[metric]:.3f} on test" + (f" ({drawn})" if drawn else "")


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Treat SIGTERM and SIGHUP as Ctrl-C, so that they too leave no child behind."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            before[number] = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Runs that several processes share

_Failure = tuple[bool, bool, int, str]
"""How a child failed: whether for want of another's, whether not by SIGKILL, as which of all, and why."""


class _OtherFailed(Exception):
    """The child of another process has failed; ours cannot finish."""


def follow() -> int:
    """Run what the main process orders until it says that there is no more; return the exit code."""
    for number in itertools.count(1):
        order = pickle.loads(distributed.read(f"order/{number}"))
        if order is None:
            break
        ended = _run_part(number, order, None, threading.Event(), lambda seconds, line: None)
        distributed.post(f"report/{number}/{distributed.process_index()}", pickle.dumps(ended))
    return 0


def _run_part(
    number: int, order: Mapping[str, Any], lock: int | None, stop: threading.Event, tick: Tick
) -> _Failure | None:
    """Run this process's child of the shared run `number`; as soon as one process's has failed, the others' end."""
    folder, process = Path(order["folder"]), distributed.process_index()
    folder.mkdir(parents=True, exist_ok=True)
    name, log = (f"job.{process}.json", f"log.{process}.txt") if process else ("job.json", LOG)
    failed, checked = f"stop/{number}", 0.0

    def watch(seconds: float, line: str) -> None:
        nonlocal checked
        if seconds - checked > _CHECK_S:
            checked = seconds
            if distributed.is_posted(failed):
                raise _OtherFailed
        tick(seconds, line)

    # a group at the order's port, whose host is the main process's child
    group = {key: os.environ[key] for key in (*PLACE, "MASTER_ADDR") if key in os.environ}
    environment = without_launcher(os.environ) | group | {"MASTER_PORT": str(order["port"])}
    command = [*order["worker"], write_order(folder, order["job"], name)]
    try:
        code = run_child(command, folder, lock, stop, watch, environment=environment, log=log)
    except _OtherFailed:
        return True, True, 0, ""
    except BaseException:
        distributed.post(failed, b"1")
        raise
    if not code:
        return None
    distributed.post(failed, b"1")
    words = failure(folder / log, code)
    words = f"process {process}: {words}; its log: {log}" if process else words
    return code == distributed.LOST, code != -signal.SIGKILL, distributed.count(f"failed/{number}"), words
