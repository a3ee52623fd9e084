"""Which user has met which item: a sorted column of numbers instead of a million sets."""

from __future__ import annotations

from typing import Any

import numpy as np


class Pairs:
    """Distinct (user, item) pairs of internal ids, each with the first phase it occurs in.

    Args:
        users: ``[rows]``.
        items: ``[rows]``.
        width: Above every item.
        phases: ``[rows]``, non-decreasing; all 0 if absent.
    """

    def __init__(self, users: Any, items: Any, width: int, phases: Any = None) -> None:
        keys = np.asarray(users).astype(np.int64) * width + np.asarray(items)
        self.width = width
        if phases is None:
            keys.sort()
            self.keys, self.phase = keys[_first_of_equals(keys)], None
        else:  # of equal keys, the first has the lowest phase
            order = np.argsort(keys, kind="stable")
            order = order[_first_of_equals(keys[order])]
            self.keys, self.phase = keys[order], np.asarray(phases)[order]

    def contain(self, users: Any, items: Any, phase: int = 0) -> Any:
        """Return, for arrays of one shape, whether each pair occurs up to `phase`."""
        if not len(self.keys):
            return np.zeros(np.broadcast(users, items).shape, bool)
        asked = users * np.int64(self.width) + items
        place = np.minimum(np.searchsorted(self.keys, asked), len(self.keys) - 1)
        found = self.keys[place] == asked
        return found if self.phase is None else found & (self.phase[place] <= phase)

    def most(self, users: int, phase: int = 0) -> int:
        """Return how many items the user with the most pairs up to `phase` has; `users` is above every user."""
        kept = self.keys if self.phase is None else self.keys[self.phase <= phase]
        return int(np.bincount(kept // self.width, minlength=users).max(initial=0))


def _first_of_equals(ordered: Any) -> Any:
    """Return which entries of a sorted array differ from the one before them."""
    new = np.ones(len(ordered), bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return new
