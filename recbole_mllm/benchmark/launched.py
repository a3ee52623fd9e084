"""A benchmark in several processes: MLLMMSR's runs are shared, each process starting a child of its own for each.

The children of one run form a group of their own at a port of their own, so a crash or a lack of memory costs that run
and not the benchmark. The main process decides what runs; the others follow. Baselines are the main process's alone,
and their children see nothing of the launcher.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole_mllm import ranks
from recbole_mllm.benchmark.child import PLACE, Tick, environment_alone, failure, run_child
from recbole_mllm.files import write_text

_CHECK_S = 1.0


class _OtherFailed(Exception):
    """The child of another process has failed; ours cannot finish."""


def environment_of_child(given: Mapping[str, str], port: int) -> dict[str, str]:
    """Return `given` for a child that forms a group at `port` with its like; the main process's child is the host."""
    kept = {name: given[name] for name in (*PLACE, "MASTER_ADDR") if name in given}
    return environment_alone(given) | kept | {"MASTER_PORT": str(port)}


@dataclass(frozen=True, slots=True)
class Report:
    """How a process's child ended: its exit code and, if it failed of itself, the how many-th to fail and why."""

    rank: int
    code: int
    turn: int = 0
    words: str = ""


class Orders:
    """What the main process tells the others to run, one order after the other; `follow` is their side."""

    def __init__(self) -> None:
        self._count = 0

    def run(
        self, worker: Sequence[str], job: Mapping[str, Any], folder: Path, lock: int, stop: threading.Event, tick: Tick
    ) -> tuple[int, str]:
        """Let every process run `worker` on `job`; return the exit code, and in words why it is not 0.

        The first child that failed of itself, and not because another one had, says why.
        """
        self._count += 1
        number, port = self._count, _free_port()
        order = {"number": number, "worker": list(worker), "job": dict(job), "folder": str(folder), "port": port}
        ranks.post(f"order/{number}", pickle.dumps(order))
        checked = time.monotonic()

        def watch(seconds: float, line: str) -> None:
            nonlocal checked
            if time.monotonic() - checked > _CHECK_S:
                checked = time.monotonic()
                if any(report.code for report in _reports(number)):
                    raise _OtherFailed
            tick(seconds, line)

        try:
            own = _run(order, folder / "job.json", "log.txt", lock, stop, watch)
        except BaseException:
            ranks.post(f"stop/{number}", b"1")
            raise
        if own.code:
            ranks.post(f"stop/{number}", b"1")
        others = [pickle.loads(ranks.read(f"report/{number}/{rank}")) for rank in range(1, ranks.world_size())]
        return _cause([own, *others])

    def end(self) -> None:
        """Let the others go."""
        ranks.post(f"order/{self._count + 1}", pickle.dumps(None))


def follow() -> int:
    """Do what the main process orders until it says that there is no more; return the exit code."""
    number = 0
    while True:
        number += 1
        order = pickle.loads(ranks.read(f"order/{number}"))
        if order is None:
            return 0
        folder, rank = Path(order["folder"]), ranks.rank()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"job.{rank}.json"
        write_text(path, json.dumps(order["job"], indent=2))
        checked = time.monotonic()

        def watch(seconds: float, line: str, number: int = number) -> None:
            nonlocal checked
            if time.monotonic() - checked > _CHECK_S:
                checked = time.monotonic()
                if ranks.is_posted(f"stop/{number}"):
                    raise _OtherFailed

        report = _run(order, path, f"log.{rank}.txt", None, threading.Event(), watch)
        ranks.post(f"report/{number}/{rank}", pickle.dumps(report))


def _run(
    order: Mapping[str, Any], path: Path, log: str, lock: int | None, stop: threading.Event, watch: Tick
) -> Report:
    """Run this process's child; say why it failed, if it did and not for another one's sake."""
    folder = Path(order["folder"])
    environment = environment_of_child(os.environ, order["port"])
    try:
        code = run_child([*order["worker"], str(path)], folder, lock, stop, watch, environment=environment, log=log)
    except _OtherFailed:
        return Report(ranks.rank(), ranks.LOST)
    if not code:
        return Report(ranks.rank(), 0)
    return Report(ranks.rank(), code, ranks.count(f"failed/{order['number']}"), failure(folder / log, code))


def _reports(number: int) -> list[Report]:
    keys = [f"report/{number}/{rank}" for rank in range(1, ranks.world_size())]
    return [pickle.loads(ranks.read(key)) for key in keys if ranks.is_posted(key)]


def _cause(reports: Sequence[Report]) -> tuple[int, str]:
    """Return the exit code and words of what failed first; a killed child had no word to say before the others."""
    failed = [report for report in reports if report.code]
    if not failed:
        return 0, ""
    first = min(failed, key=lambda report: (report.code == ranks.LOST, report.code != -signal.SIGKILL, report.turn))
    words = f"process {first.rank}: {first.words}; its log: log.{first.rank}.txt" if first.rank else first.words
    return first.code, words or "a process said nothing"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
