"""RecBole's own complaints about a configuration or a dataset, told in one line as the user's mistake that they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from recbole_mllm.errors import UserError

# RecBole checks what it is given with exceptions of all kinds, or trips over it
_COMPLAINTS = (
    AssertionError, AttributeError, FileNotFoundError, IndexError, KeyError, NotImplementedError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip


@contextmanager
def told_in_a_line(what: str) -> Iterator[None]:
    """Turn what RecBole itself raises within into a complaint that it cannot do `what`.

    What this project's code raises goes through as it is, and so does a subclass of those errors, such as want of
    memory.

    Raises:
        UserError: Says RecBole's own words.
    """
    try:
        yield
    except _COMPLAINTS as error:
        if type(error) not in _COMPLAINTS or not _is_recboles(error.__traceback__):
            raise
        raise UserError(f"RecBole cannot {what}: {_words(error)} (--debug shows where)") from error


def _is_recboles(traceback: TracebackType | None) -> bool:
    """Whether the innermost code of RecBole's and of ours is RecBole's."""
    theirs = False
    while traceback:
        package = str(traceback.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        theirs = package == "recbole" if package in ("recbole", "recbole_mllm") else theirs
        traceback = traceback.tb_next
    return theirs


def _words(error: Exception) -> str:
    said = " ".join(str(error).split())
    if isinstance(error, KeyError):
        return f"there is no {said}"
    plain = isinstance(error, NotImplementedError | FileNotFoundError) or type(error) in (ValueError, RuntimeError)
    return said if plain and said else f"{type(error).__name__} {said}"
