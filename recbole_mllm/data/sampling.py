"""Draws that depend on a seed and raw ids alone, so every model and process makes the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def hash64(*parts: object) -> int:
    """Return 64 bits that depend on `parts` alone."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def sample_users(users: Iterable[str], count: int | None, seed: int) -> set[str]:
    """Return `count` of the raw ids `users` (all of them for None or where there are fewer), the same for any order."""
    every = sorted(set(users), key=lambda user: (hash64("user", seed, user), user))
    return set(every if count is None else every[:count])
