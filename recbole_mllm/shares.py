"""How a list of work is cut into one contiguous part a process, so that the costliest part is as cheap as can be."""

from __future__ import annotations

from typing import Any

import numpy as np


def cut(keys: Any, shared: Any, own: Any, parts: int) -> list[range]:
    """Return `parts` ranges that cover the list in order; some are empty where it is short.

    Args:
        keys: ``[n]``; neighbours with an equal key share a computation.
        shared: ``[n]`` int, what that computation costs, the same for an equal key; each part that has some of the
            neighbours pays it once.
        own: ``[n]`` int, what each entry costs beside, at least 1.
        parts: How many.
    """
    keys, shared, own = np.asarray(keys), np.asarray(shared, np.int64), np.asarray(own, np.int64)
    first = np.r_[True, keys[1:] != keys[:-1]][: len(keys)]
    total = np.r_[0, np.cumsum(own + np.where(first, shared, 0))]
    again = np.r_[np.where(first, 0, shared), 0]  # what a part pays that begins between neighbours

    def ends(limit: int) -> list[int]:
        out, at = [], 0
        for _ in range(parts):
            at = max(at, int(np.searchsorted(total, limit + total[at] - again[at], side="right")) - 1)
            out.append(at)
        return out

    low, high = 0, int(total[-1])
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if ends(middle)[-1] == len(keys) else (middle + 1, high)
    stops = ends(high)
    return [range(start, stop) for start, stop in zip([0, *stops[:-1]], stops, strict=True)]
