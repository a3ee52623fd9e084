"""Numbers as people read them."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from recbole_mllm.health.order import Order

QUANTILES = (("min", 0.0), ("5 %", 0.05), ("25 %", 0.25), ("50 %", 0.5), ("75 %", 0.75), ("95 %", 0.95), ("max", 1.0))
SORTED = {
    "file": "sorted by time",
    "users": "each user's rows are sorted by time, the file as a whole is not",
    "no": "not sorted by time",
}


def many(count: int, one: str, several: str) -> str:
    """Return the count with its noun."""
    return f"{count:,} {one if count == 1 else several}"


def share(part: int, whole: int) -> str:
    """Return `part` of `whole` as a percentage that is 0 or 100 only where it is exact."""
    if not whole or part in (0, whole):
        return "100 %" if whole and part == whole else "0 %"
    percent = 100 * part / whole
    return "< 0.1 %" if percent < 0.1 else "> 99.9 %" if percent > 99.9 else f"{percent:.1f} %"


def of(part: int, whole: int) -> str:
    """Return ``part of whole (share)``."""
    return f"{part:,} of {whole:,} ({share(part, whole)})"


def quantiles(ascending: NDArray[np.int64]) -> list[tuple[str, int]]:
    """Return named quantiles that are values of the sample themselves (the lower one, between two)."""
    if not len(ascending):
        return []
    return [(name, int(ascending[int(q * (len(ascending) - 1))])) for name, q in QUANTILES]


def moment(time: float) -> str:
    """Return a time as a date where it can be one, in seconds or milliseconds since 1970, else as a number."""
    for unit in (1.0, 1e3, 1e6):
        if 1e8 <= time / unit < 5e9:
            return datetime.fromtimestamp(time / unit, UTC).strftime("%Y-%m-%d")
    return f"{time:,.15g}"


def span(order: Order) -> str:
    """Return the range of times."""
    return f"{moment(order.first)} to {moment(order.last)}"
