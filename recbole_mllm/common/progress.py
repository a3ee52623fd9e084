"""How far long work is: a bar with rate and time left on a terminal or in a notebook, elsewhere plain log lines."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from functools import lru_cache
from typing import Self

from recbole_mllm.common import distributed

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a notebook without ipywidgets has a bar of text
    from tqdm.auto import tqdm

EVERY_S = 30.0


class Progress:
    """Counts work that is done; a context manager, so that the bar is closed whatever happens."""

    def __init__(self, total: float, what: str, unit: str) -> None:
        self.total, self.what, self.unit = total, what, unit
        self.done: float = 0
        self._started = self._reported = time.monotonic()
        live = (sys.stderr.isatty() or _in_notebook()) and distributed.is_main()
        width = None if _in_notebook() else 100
        self._bar: tqdm[None] | None = tqdm(total=total, desc=what, unit=unit, ncols=width) if live and total else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.close()

    def update(self, count: float, note: str = "") -> None:
        """Note that `count` more are done; `note` is shown behind the rate."""
        self.done += count
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(min(count, self.total - self._bar.n))  # a sum of floats may exceed it
            return
        now = time.monotonic()
        if now - self._reported >= EVERY_S:
            self._reported = now
            rate = self.done / (now - self._started)
            left = (self.total - self.done) / rate if rate else float("inf")
            text = (
                f"{self.what}: {self.done:.0f} of {self.total:.0f}, {rate:.1f} {self.unit}/s, {left:.0f} s left"
                + f", {note}" * bool(note)
            )
            logging.getLogger().info(text)


def _in_notebook() -> bool:
    """Return whether a notebook shows what is printed: its standard error is no terminal, and can show a bar."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config


def log_to_terminal() -> None:
    """Show log lines of a command that runs without RecBole, which has a logger of its own."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)


@lru_cache
def warn_once(line: str) -> None:
    """Log `line` as a warning, the first time it is given."""
    logging.getLogger().warning(line)
