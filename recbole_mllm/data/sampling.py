"""Draws that depend on a seed and raw ids alone, the same in every process; which pairs must not be drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

Keys = Callable[[Any, Any], Any]
"""Of internal (users, items) ``[B]``: int64 ``[B]`` that order equal scores (`tie_keys`)."""


def hash64(*parts: object) -> int:
    """Return 64 bits that depend on `parts` alone."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def hashes64(values: Any, *parts: object) -> Any:
    """Return ``hash64(*parts, value)`` of an array or list of raw ids, as uint64."""
    before = "\x1f".join(str(part) for part in (*parts, ""))
    texts = values.tolist() if isinstance(values, np.ndarray) else values
    digests = [hashlib.blake2b((before + text).encode(), digest_size=8).digest() for text in texts]
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)


def mix64(bits: Any) -> Any:
    """Return splitmix64's finaliser of uint64 `bits`: neighbours come out unrelated."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def tie_keys(users: Any, items: Any, seed: int) -> Keys:
    """Return keys of internal users and items that are made of raw ids and seed."""
    of_user, of_item = hashes64(users, "tie-user", seed), hashes64(items, "tie-item", seed)

    def keys(u: Any, i: Any) -> Any:
        # mixed, as pairs that share a user or an item must not share an order
        mixed = mix64(of_user[u] ^ (of_item[i] * np.uint64(0x9E3779B97F4A7C15)))
        return (mixed >> np.uint64(1)).astype(np.int64)

    return keys


def sample_users(users: Iterable[str], count: int | None, seed: int) -> set[str]:
    """Return `count` of the raw ids `users` (all of them for None or where there are fewer), the same for any order."""
    every = sorted(set(users), key=lambda user: (hash64("user", seed, user), user))
    return set(every if count is None else every[:count])


def limited_users(raw: Any, parts: Sequence[Any], count: int | None, seed: int) -> list[Any]:
    """Return, for each part of a split, which internal ids are among the `count` users it is limited to.

    The last part is the test part. Another one keeps the test users drawn that it has, and is filled up to `count` from
    its users who are not in the test part: none under leave-one-out, some under a temporal split, all where users are
    split instead of interactions.

    Args:
        raw: The raw id of every internal user id.
        parts: ``[rows]`` internal user ids of each part.
        count: None for all.
        seed: Of the sample.
    """
    present = [np.bincount(users, minlength=len(raw)) > 0 for users in parts]
    if count is None:
        return present
    drawn = np.isin(raw, list(sample_users(raw[present[-1]].tolist(), count, seed))) & present[-1]
    found = []
    for own in present:
        tested, others = own & drawn, own & ~present[-1]
        more = sample_users(raw[others].tolist(), max(0, count - int(tested.sum())), seed)
        found.append(tested | (np.isin(raw, list(more)) & others))
    return found


class Pairs:
    """Distinct (user, item) pairs of internal ids, each with the first phase it occurs in: one sorted column.

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

    def items_of(self, user: int, phase: int = 0) -> set[int]:
        """Return the items of one user up to `phase`."""
        low, high = np.searchsorted(self.keys, (user * self.width, (user + 1) * self.width))
        items = self.keys[low:high] - user * self.width
        return set((items if self.phase is None else items[self.phase[low:high] <= phase]).tolist())

    def most(self, users: int, phase: int = 0) -> int:
        """Return how many items the user with the most pairs up to `phase` has; `users` is above every user."""
        known = self.keys if self.phase is None else self.keys[self.phase <= phase]
        return int(np.bincount(known // self.width, minlength=users).max(initial=0))


def _first_of_equals(ordered: Any) -> Any:
    """Return which entries of a sorted array differ from the one before them."""
    new = np.ones(len(ordered), bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return new
