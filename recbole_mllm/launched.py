"""The end of a process that is one of several: the first to fail speaks, the others end with its exit code."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from recbole_mllm import ranks
from recbole_mllm.arguments import in_a_line, usable_streams


def exit_code(run: Callable[[list[str]], int], words: Sequence[str]) -> int:
    """Return what `run` returns, and what `arguments.exit_code` does for a mistake; anything else raised is 1."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _ended_by_launcher)
    if not ranks.is_main():
        warnings.simplefilter("ignore")  # the main process has shown them
    debug = "--debug" in words
    with usable_streams():
        try:
            code = run([word for word in words if word != "--debug"])
            sys.stdout.flush()
            ranks.stop()
            return code
        except KeyboardInterrupt:
            return end(1, "recbole-mllm: stopped; what was finished is kept")
        except Exception as error:
            lost = ranks.lost_another(error)
            told = (1, str(lost)) if lost else in_a_line(error)
            code, line = told or (1, "")
            return end(code, traceback.format_exc() if debug or not told else line and f"recbole-mllm: {line}")


def end(code: int, words: str) -> int:
    """Print `words` if this process is the first to fail; return the exit code to leave with."""
    if ranks.report_failure(code):
        print(words.rstrip(), end="\n" * bool(words), file=sys.stderr, flush=True)
    else:
        code = ranks.failure_code(code)
    return abandon(code)


def child_code(run: Callable[[], int]) -> int:
    """Return what `run` returns, for a child that a benchmark has started in each of its processes.

    `ranks.LOST` is for one that could not finish for want of another; why that one failed stands in its own log.
    """
    if not ranks.is_launched():
        return run()
    try:
        code = run()
        if code == 0:
            ranks.stop()
            return 0
    except Exception as error:
        code = ranks.LOST if ranks.lost_another(error) else 1
        if code == 1:
            traceback.print_exc()
    ranks.report_failure(code)
    return abandon(code)


def abandon(code: int) -> int:
    """Leave at once where a process group is open: torn down without its members, it aborts the process at random."""
    if ranks.is_joined():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _ended_by_launcher(number: int, frame: object) -> NoReturn:
    raise ranks.LostProcess("the launcher has ended this process, as another one has ended; what was finished is kept")
