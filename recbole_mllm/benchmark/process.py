"""One run in a process of its own, so that a crash, a lack of memory or a NaN costs one row and not the night."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_mllm.benchmark.records import plain_json
from recbole_mllm.common.files import write_text

WORKER = (sys.executable, "-m", "recbole_mllm.benchmark.worker")
LOG = "log.txt"
_HEARTBEAT_S = 60.0
_GRACE_S = 5.0
_POLL_S = 0.2
_STATUS_LENGTH = 300

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # which of a launcher's processes this is
_LAUNCHERS = ("MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_")
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|^\[rank\d+\]: ", re.MULTILINE)  # the second is torch's
# As Python writes a warning: where, which and what, then the line that drew it; that says nothing of the run
_WARNING = re.compile(r"^\S.*:\d+: \w*Warning: .*\n?(?:[ \t]+.*\n?)?", re.MULTILINE)
# Date and level of RecBole's log (utils/logger.py:92-94)
_PREFIX = re.compile(r"^\d+ \w+ [\d:]+ +[A-Z]+ +", re.MULTILINE)
# A long path, and all metrics of validation in 200 characters: the line before has the one that counts
_NO_NEWS = re.compile(r"Saving current: |Loading model structure and parameters from |valid result: *$|\w+@\d+ +: ")
_ERROR = re.compile(r"^(?:[A-Za-z_]\w*\.)*(\w*(?:Error|Exception|Interrupt|Exit)(?:: .*)?)$")

Tick = Callable[[float, str], None]
"""Called with the seconds since the start and the newest line of the log."""


class Stopped(Exception):
    """The benchmark is being stopped, and this run with it."""


@contextlib.contextmanager
def claim(folder: Path, stop: threading.Event, waiting: Callable[[str], None]) -> Iterator[int]:
    """Hold the run's folder for one process; yield the lock's descriptor, for the child to hold it too.

    A child that outlives a killed benchmark holds the lock, so a restart waits for that run instead of doing it twice
    in the same files; `waiting` is called once then, with the number of the process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, reported = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644), False
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not reported:
                    waiting(os.pread(descriptor, 32, 0).decode().strip() or "unknown")
                reported = True
                if stop.wait(_POLL_S):
                    raise Stopped from None
        yield descriptor
    finally:
        os.close(descriptor)


def write_order(folder: Path, order: Mapping[str, Any], name: str = "job.json") -> str:
    """Write a worker's order into the run's folder; return its absolute path."""
    path = folder.resolve() / name
    write_text(path, json.dumps(plain_json(order), indent=2))
    return str(path)


def run_child(
    command: Sequence[str],
    folder: Path,
    lock: int | None,
    stop: threading.Event,
    tick: Tick,
    *,
    environment: Mapping[str, str] | None = None,
    log: str = LOG,
) -> int:
    """Run `command` in `folder` to its end, with its output in the file `log`; return its exit code.

    The code is negative for a signal. It runs in `folder` because RecBole writes ``log/`` where it stands. Its
    environment is ours without what a launcher has put there, unless another one is given.

    Raises:
        Stopped: `stop` was set; the child, and all it has started, is ended then, as with whatever `tick` raises.
    """
    root = Path(__file__).resolve().parents[2]  # the package must be found from any working directory
    paths = [str(root), *(os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path)]
    given = without_launcher(os.environ) if environment is None else environment
    started = time.monotonic()
    with (folder / log).open("wb") as output:
        child = subprocess.Popen(
            list(command),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**given, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"},
            pass_fds=() if lock is None else (lock,),
            start_new_session=True,  # Ctrl-C reaches us alone, and we end the child with all it has started
        )
    if lock is not None:
        os.pwrite(lock, f"{child.pid:<31}\n".encode(), 0)
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return child.wait(timeout=_POLL_S)
            if stop.is_set():
                raise Stopped
            news = [line for line in _lines(folder / log) if not _NO_NEWS.match(line)]
            tick(time.monotonic() - started, news[-1] if news else "")
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):  # first politely
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(child.pid, number)
                    child.wait(timeout=_GRACE_S)


def heartbeat(say: Callable[[str], None]) -> Tick:
    """Return what says once a minute how long a run has taken and what it said last."""
    last = 0.0

    def tick(seconds: float, line: str) -> None:
        nonlocal last
        if seconds - last >= _HEARTBEAT_S:
            last = seconds
            say(f"{seconds:.0f} s  {line}")

    return tick


def without_launcher(given: Mapping[str, str]) -> dict[str, str]:
    """Return the environment `given` without what a launcher has put there."""
    return {name: value for name, value in given.items() if name not in PLACE and not name.startswith(_LAUNCHERS)}


def failure(log: Path, code: int) -> str:
    """Say in one line why a child failed: its last exception, else its last words, and the signal that ended it."""
    lines = _lines(log)
    errors = [found[1] for line in lines if (found := _ERROR.match(line))]
    words = errors[-1] if errors else next(reversed(lines), "it said nothing")
    if code < 0:
        name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
        memory = ", most often for lack of memory" if -code == signal.SIGKILL else ""
        words = f"ended by {name}{memory}" + (f"; last: {words}" if errors else "")
    elif code == 0:
        words = f"it ended without a record; last: {words}"
    return words if len(words) <= _STATUS_LENGTH else words[: _STATUS_LENGTH - 1] + "…"


def _lines(log: Path, tail: int = 1 << 16) -> list[str]:
    """Return the last lines of a log that say something of the run, as a terminal would show them."""
    if not log.exists():
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - tail))
        text = _PREFIX.sub("", _WARNING.sub("", _ESCAPES.sub("", file.read().decode(errors="replace"))))
    return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
