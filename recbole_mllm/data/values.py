"""What may stand in an atomic file: free text made fit for it, and the reasons why a value or an id is not.

RecBole reads with ``pd.read_csv(engine="python")`` and default quoting (data/dataset/dataset.py:486). So a value that
starts with ``"`` loses its quotes or swallows the lines behind it, a line break makes a row more, and a value beyond
the ``csv`` module's field limit, which our import raises, stops the reading; inner quotes, spaces and any other
character are kept.
"""

from __future__ import annotations

import re
import time
import unicodedata
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

MAX_CHARACTERS = 16_777_216  # what RecBole's reader is let take (compat/frames.py); a longer value is no text
MAX_ID_CHARACTERS = 1_000  # RecBole keeps ids in a numpy array, where each takes the room of the longest
PAD = "[PAD]"  # RecBole's own token for id 0 (data/dataset/dataset.py:1213)

# Cc control, Cf format (zero-width marks, bidirectional controls, tags), Co private use (prompts mark filled-in texts
# with it), Cs lone surrogates
_UNWANTED = {"Cc", "Cf", "Co", "Cs"}
_JOINERS = "\u200c\u200d"  # spelling in Persian and Indic words, one picture out of several in emoji
_SPACES = re.compile(r"\s+")
_JOINED = re.compile(f"[{_JOINERS}]{{2,}}")
_JOINED_SPACES = re.compile(rf"[{_JOINERS}]?\s[\s{_JOINERS}]*")
_QUOTES = "\"'"
_EDGES = ("", " ", *_QUOTES)
_UNITS = (1.0, 1e3, 1e6, 1e9)  # a second in seconds, milliseconds, microseconds, nanoseconds
_A_DATE = 1e8  # seconds since 1970: March 1973; less is a small number rather than a date
_DAY = 86_400.0
_ORDINARY_ID = re.compile(r"[!#-Z\\-~][!-~]{0,999}")


def clean(text: str) -> str:
    """Return `text` as it may stand in an atomic file: one line, no control or invisible character, no leading quote.

    Letters of any script, emoji with their joiners and inner quotes stay; white space becomes single spaces. Cleaning
    twice changes nothing. A title that is fit already is returned as it is.
    """
    if text.isprintable() and "  " not in text and text[:1] not in _EDGES and text[-1:] != " ":
        return text  # printable: no control, format, private or surrogate character, and no space but U+0020
    unwanted = {c for c in set(text) if unicodedata.category(c) in _UNWANTED and not c.isspace() and c not in _JOINERS}
    kept = text.translate(dict.fromkeys(map(ord, unwanted))) if unwanted else text
    if "\u200c" in kept or "\u200d" in kept:
        kept = _JOINED_SPACES.sub(" ", _JOINED.sub(lambda run: run[0][0], kept))
    return _without_leading_quotes(_SPACES.sub(" ", kept).strip(" " + _JOINERS))


def _without_leading_quotes(text: str) -> str:
    """Strip quotes at the start, and at the end the one that would be left without its partner."""
    bare = text.lstrip(_QUOTES + " " + _JOINERS)
    if text.startswith('"') and bare.endswith('"') and bare.count('"') % 2:
        return bare[:-1].rstrip(" " + _JOINERS)
    return bare


def id_problem(text: str) -> str | None:
    """Return why `text` cannot be an id, or None where RecBole's reader and ours both keep it as it is, as a ``token``.

    Inner spaces are kept, but in a ``token_seq`` (a history) they would make two ids of one: see `word_problem`.
    """
    if _ORDINARY_ID.fullmatch(text):
        return None
    if not text:
        return "is empty"
    if text == PAD:
        return f"is {PAD}, which RecBole reserves"
    if (problem := value_problem(text)) is not None:
        return problem
    if text[0] == "\ufeff":  # files strung together: the same id would be two
        return "starts with a byte order mark"
    if text != text.strip():
        return "starts or ends with white space"
    control = next((c for c in text if unicodedata.category(c) == "Cc"), None)
    if control is not None:
        return f"holds the control character U+{ord(control):04X}"
    if len(text) > MAX_ID_CHARACTERS:
        return f"has {len(text):,} characters, more than {MAX_ID_CHARACTERS:,}"
    return None


def word_problem(text: str) -> str | None:
    """Return why `text` cannot be an id inside a ``token_seq`` such as ``item_id_list``, or None."""
    return "holds a space, which separates ids in a token_seq" if " " in text else id_problem(text)


def value_problem(text: str) -> str | None:
    """Return why `text` cannot be a value of any column, or None."""
    if text.startswith('"'):
        return "starts with a quote"
    if "\t" in text or "\n" in text or "\r" in text:
        return "holds a tab or newline"
    if "\0" in text:
        return "holds a NUL character"
    if len(text) > MAX_CHARACTERS:
        return f"has {len(text):,} characters, more than the {MAX_CHARACTERS:,} that RecBole's reader takes"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "holds a lone surrogate, which UTF-8 cannot write"
    return None


def impossible_times(times: ArrayLike) -> tuple[int, int]:
    """Return how many of `times` are at or before the first second of 1970, and how many lie after tomorrow.

    Args:
        times: ``[N]`` numbers since 1970, in seconds, milliseconds or finer: what most of them are is told by their
            size. NaN counts as neither. Places in an order (whole numbers from 0 to at most N) are no dates: (0, 0).
    """
    early, late = find_impossible_times(times)
    return int(early.sum()), int(late.sum())


def find_impossible_times(times: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return two masks ``[N]`` of `times`: those at or before 1970, those after tomorrow (see `impossible_times`)."""
    values = np.asarray(times, np.float64)
    early = values <= 0
    positive = values[values > 0]
    if not positive.size or (not (values < 0).any() and positive.max() <= len(values)):
        none = np.zeros(len(values), bool)
        return (none if positive.size else early), none
    typical = float(np.median(positive))
    unit = next((unit for unit in reversed(_UNITS) if typical >= unit * _A_DATE), 1.0)
    return early, values > (time.time() + _DAY) * unit
