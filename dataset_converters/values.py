"""Raw text to values, where a wrong one is None."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

NO_NUMBER = "is no decimal number within 64 bits"
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_WHOLE = re.compile(r"[+-]?[0-9]{1,4000}")  # Python turns no longer text into an int


def number(text: str) -> int | float | None:
    """Return a decimal number as an exact int, or a float where it has a point or an exponent; else None.

    What 64 bits do not hold is none, nor is what else Python takes for a number: ``nan``, ``inf``, ``1_000``, digits
    of other scripts.
    """
    if text.isdigit() and text.isascii() and len(text) < 19:
        return int(text)
    text = text.strip()
    if _DECIMAL.fullmatch(text) is None:
        return None
    return within_64_bits(int(text) if _WHOLE.fullmatch(text) else float(text))


def within_64_bits(value: Any) -> int | float | None:
    """Return `value` where it is a number (True and False are none) that an int64 holds, rounded or not; else None."""
    known = value.__class__ is int or value.__class__ is float
    return value if known and -(2**63) <= value < 2**63 else None


def moment(text: str) -> int | float | None:
    """Return a time: a number as it is, an ISO 8601 date as seconds since 1970 (UTC where it names no zone)."""
    text = text.strip()
    if _DECIMAL.fullmatch(text):  # also where it is too large: Python takes some rows of digits for dates
        return number(text)
    try:
        date = datetime.fromisoformat(text)
        seconds = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None
    return int(seconds) if seconds.is_integer() else seconds
