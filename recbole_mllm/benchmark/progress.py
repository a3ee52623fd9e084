"""What the user sees while a benchmark runs: one line a run, alive on a terminal, plain in a log file."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable

HEARTBEAT_S = 60.0
CLEAR = "\r\x1b[K"


class Progress:
    """Lines such as ``[2/5] SASRec seed 2024 … 34 s NDCG@10 0.412``.

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
        self._heard: dict[int, float] = {}

    def start(self, number: int, name: str) -> None:
        """Say that a run has begun."""
        self._heard[number] = time.monotonic()
        if self._live:
            self._rewrite(self._head(number, name))
        else:
            self.say(self._head(number, name))

    def tick(self, number: int, name: str, seconds: float, line: str) -> None:
        """Show how long a run has taken and what it said last; in a log file, once a minute."""
        text = f"{self._head(number, name)} {seconds:.0f} s  {line}"
        if self._live:
            self._rewrite(text)
        elif time.monotonic() - self._heard.get(number, 0.0) >= HEARTBEAT_S:
            self._heard[number] = time.monotonic()
            self.say(text)

    def end(self, number: int, name: str, result: str) -> None:
        """Say how a run went."""
        self.say(f"{self._head(number, name)} {result}")

    def say(self, line: str) -> None:
        """Print a line that stays."""
        with self._lock:
            if self._tell is not None:
                self._tell(line)
            else:
                print(CLEAR + line if self._live else line, flush=True)

    def _head(self, number: int, name: str) -> str:
        return f"[{number}/{self.total}] {name} …"

    def _rewrite(self, line: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        with self._lock:
            sys.stdout.write(CLEAR + line[:width])
            sys.stdout.flush()
