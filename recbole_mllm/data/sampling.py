"""Draws that depend on a seed and raw ids alone, so every model and process makes the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np


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


def tie_keys(users: Any, items: Any, seed: int) -> Callable[[Any, Any], Any]:
    """Return a function of internal (users, items) ``[B]`` giving int64 keys ``[B]`` made of raw ids and seed."""
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

    The last part is the test part. A part that shares users with it is limited to the test users drawn; one that does
    not (users split instead of interactions) is drawn from itself.

    Args:
        raw: The raw id of every internal user id.
        parts: ``[rows]`` internal user ids of each part.
        count: None for all.
        seed: Of the sample.
    """
    present = [np.bincount(users, minlength=len(raw)) > 0 for users in parts]
    if count is None:
        return present
    drawn = [np.isin(raw, list(sample_users(raw[own].tolist(), count, seed))) & own for own in present]
    return [drawn[-1] if (own & present[-1]).any() else apart for own, apart in zip(present, drawn, strict=True)]
