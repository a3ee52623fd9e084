"""What every command line here shares: errors of one line, and what they mean as an exit code."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from recbole_mllm.common.errors import UserError, did_you_mean


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = action.help or ""
        silent = action.default is None or action.default is False or action.default == argparse.SUPPRESS
        if silent or "default" in said or not action.option_strings:
            return said
        return f"{said} (default: %(default)s)".lstrip()


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like every other mistake's; options are never abbreviated.

    `examples` are command lines, shown behind the options; help states defaults.
    """

    def __init__(self, *, examples: Sequence[str] = (), **settings: Any) -> None:
        shown = "\n".join(["examples:", *(f"  {line}" for line in examples)]) if examples else ""
        settings["epilog"] = "\n\n".join(filter(None, (shown, settings.get("epilog"))))
        super().__init__(**{"allow_abbrev": False, "formatter_class": _Help, **settings})

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a value that is no choice, with the nearest one."""
        if action.choices is not None and value not in action.choices:
            choices = list(map(str, action.choices))
            what = action.option_strings[0] if action.option_strings else "command"
            hint = did_you_mean(str(value), choices, "take one of these")
            self.error(f"{what} {value!r} is unknown; there are {', '.join(choices)}; {hint}")

    def error(self, message: str) -> Any:
        """Raise the error of every other mistake; an option that is none comes with the nearest one."""
        wrong = next((word for word in message.split() if word.startswith("--")), "")
        raise UserError(f"{message}; {self.hint(wrong) if 'unrecognized' in message else 'see --help'}")

    def hint(self, wrong: str) -> str:
        """Return what to do about an option that is none: take the nearest one, else read the help."""
        return did_you_mean(wrong.partition("=")[0], _options(self), "see --help")


def _options(parser: argparse.ArgumentParser) -> list[str]:
    """Return the options of a parser and of its commands."""
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found.update(*map(_options, action.choices.values()))
    return sorted(found)


def exit_code(run: Callable[[list[str]], int], words: Sequence[str]) -> int:
    """Return what `run` returns; 2 for a user's mistake, reported in one line (``--debug`` shows the traceback).

    What the machine refuses (a full disk, a folder that may not be written to, want of memory) is reported so too; a
    reader that has closed the pipe gets nothing.
    """
    debug = "--debug" in words
    with usable_streams():
        try:
            try:
                return run([word for word in words if word != "--debug"])
            finally:
                sys.stdout.flush()  # here, as what cannot be written at Python's end is reported in Python's words
        except (Exception, KeyboardInterrupt) as error:  # the outermost place; a fault of ours is raised again
            place = "standard output" if _leave_stdout() else ""
            reported = in_a_line(error, place)
            if reported is None or (debug and not isinstance(error, KeyboardInterrupt)):
                raise
            code, line = reported
            if line:
                with suppress(OSError, ValueError):
                    print(f"recbole-mllm: {' '.join(line.splitlines())}", file=sys.stderr, flush=True)
            return code


def in_a_line(error: BaseException, place: str = "") -> tuple[int, str] | None:
    """Return the exit code and the line for an error that is no fault of the program; None for one that is.

    The line is empty where nobody is there to read it. `place` is what could not be written to, where that is known.
    """
    said = " ".join(str(error).split())
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 1, "stopped; finished work is saved"
    if isinstance(error, BrokenPipeError):
        return 1, ""
    if isinstance(error, OSError):
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        what = " -> ".join(names) or place or "a file, or the standard output, could not be written"
        # a server that is gone is nothing the user has given; a full disk, or a folder that is a file, is
        code = 1 if isinstance(error, ConnectionError | TimeoutError) else 2
        return code, " ".join(f"{what}: {error.strerror or said or type(error).__name__}".split())
    if type(error).__name__ == "SafetensorError" and "I/O error" in said:  # no OSError, though it means one
        return 2, f"weights could not be written: {said}; make room on the disk there"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        what = said.partition(". ")[0]
        return 1, f"memory ran out{f' ({what})' if what else ''}; smaller batches, or fewer --jobs, need less"
    return None


@contextmanager
def usable_streams() -> Iterator[None]:
    """Let standard output and error take any text, and whatever is closed go nowhere, for the time of a command.

    A stream that is closed leaves its number to the next file that is opened, and what is then printed would end up in
    that file. A character that the terminal cannot show becomes a question mark.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # stays open, and takes its number
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
    raises, logging.raiseExceptions = logging.raiseExceptions, False  # a full disk costs a log its lines, and no more
    try:
        yield
    finally:
        logging.raiseExceptions = raises


def _leave_stdout() -> bool:
    """Return whether standard output takes no more; what is still to be written there then goes nowhere."""
    try:
        sys.stdout.flush()
        return False
    except (OSError, ValueError):
        with suppress(OSError, ValueError):  # a stand-in for the standard output may have no number
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        return True
