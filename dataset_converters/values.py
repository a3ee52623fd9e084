"""Raw text to values, where a wrong one is None."""

from __future__ import annotations

import math
from datetime import UTC, datetime


def number(text: str) -> int | float | None:
    """Return an exact int where `text` is one that 64 bits hold, else a finite float, else None."""
    try:
        whole = int(text)
    except ValueError:
        pass
    else:
        return whole if -(2**63) <= whole < 2**63 else None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def moment(text: str) -> int | float | None:
    """Return a time: a number as it is, an ISO 8601 date as seconds since 1970 (UTC where it names no zone)."""
    value = number(text)
    if value is not None:
        return value
    try:
        date = datetime.fromisoformat(text.strip())
    except ValueError:
        return None
    seconds = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    return int(seconds) if seconds.is_integer() else seconds
