"""Which preference summaries the rows will read, and what each may have read: pure index arithmetic, no text.

A row at position p follows p interactions. Its summary is a state of a chain over the user's history: the chain starts
at `start`, reads blocks of `block_size` items, and each state has read ``[start, seen)`` with ``seen <= p``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from recbole_mllm.common.settings import SummarySettings


class State(NamedTuple):
    """A preference that has read interactions ``[start, seen)`` of one user, in the last step those from `since` on."""

    start: int
    since: int
    seen: int

    @property
    def is_first(self) -> bool:
        """Whether no earlier state comes before it."""
        return self.since == self.start


def state_at(position: int, settings: SummarySettings) -> State | None:
    """Return the state a row at `position` reads, or None before the first block (cold start)."""
    start = 0 if settings.max_history is None else max(0, position - settings.max_history)
    length = position - start
    if settings.summary_mode == "direct":
        return State(start, start, position) if length else None
    size = settings.block_size
    if not settings.partial_block:
        length -= length % size
    if not length:
        return None
    return State(start, start + (length - 1) // size * size, start + length)


def before(state: State, settings: SummarySettings) -> State | None:
    """Return the state `state` continues, a chain's full block before it; None at the chain's first step."""
    if state.is_first:
        return None
    return State(state.start, state.since - settings.block_size, state.since)


def steps(states: Iterable[State], settings: SummarySettings) -> list[list[State]]:
    """Return `states` and all they build on, each once, by step: the n-th list needs only the lists before."""
    wanted: set[State] = set()
    for state in states:
        current: State | None = state
        while current is not None and current not in wanted:
            wanted.add(current)
            current = before(current, settings)
    levels: dict[int, list[State]] = {}
    for state in sorted(wanted):
        levels.setdefault((state.since - state.start) // settings.block_size, []).append(state)
    return [levels[n] for n in sorted(levels)]


def history_digest(items: Sequence[str]) -> str:
    """Return the digest of exactly these raw item ids in this order (16 hex digits)."""
    return hashlib.sha256("\n".join(items).encode()).hexdigest()[:16]
