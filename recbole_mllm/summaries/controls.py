"""Controls: something wrong in place of what a row would read, to see whether the model uses it (key ``control``).

Training and scoring read through `Preferences`, so both see the control.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.settings import SummarySettings
from recbole_mllm.data.histories import user_of
from recbole_mllm.data.sampling import hash64
from recbole_mllm.summaries.chains import state_at
from recbole_mllm.summaries.user_summaries import SummaryRequests

_ROW = "\t@"  # between a history's name and a position: the history of that row alone


def controlled(requests: SummaryRequests, settings: SummarySettings) -> SummaryRequests:
    """Return what `settings.control` lets the rows of `requests` read of their users; without one, `requests`.

    Raises:
        UserError: There is no other user whose summary could be read.
    """
    if settings.control == "shuffled-history":
        return _shuffled(requests, settings)
    if settings.control == "wrong-summary":
        return replace(requests, rows=_rows_of_others(requests, settings.summary_seed))
    return requests


def other_images(images: Mapping[str, Path], seed: int) -> dict[str, Path]:
    """Return another item's image for each item that has one, each image once.

    Raises:
        UserError: There are fewer than two images.
    """
    if len(images) < 2:
        raise UserError("control: wrong-image needs two items with images; leave it out")
    order = sorted(images, key=lambda item: (hash64("control", seed, item), item))
    return {item: images[other] for item, other in zip(order, [*order[1:], order[0]], strict=True)}


class _ShuffledHistories(Mapping[str, Sequence[str]]):
    """A history for each row: the items that the row reads in a random order, those it does not where they were."""

    def __init__(
        self, names: Collection[str], histories: Mapping[str, Sequence[str]], settings: SummarySettings
    ) -> None:
        self._names, self._histories, self._settings = names, histories, settings

    def __getitem__(self, name: str) -> Sequence[str]:
        history, _, place = name.rpartition(_ROW)
        position, s = int(place), self._settings
        start, stop = max(0, position - s.history_titles), position
        if s.summary_mode != "none":
            state = state_at(position, s)
            start, stop = (state.start, state.seen) if state is not None else (0, 0)
        items = list(self._histories[history][:position])
        order = np.random.default_rng(hash64("control", s.summary_seed, history, position)).permutation(stop - start)
        items[start:stop] = [items[start + place] for place in order.tolist()]
        return items

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _shuffled(requests: SummaryRequests, settings: SummarySettings) -> SummaryRequests:
    """Give each row a history of its own, in an order of its own.

    Rows of one user cannot share a chain: whatever order a later row read, the items of an earlier one would stand
    first in it, and so what was recent would stay so.
    """
    rows = {
        (history, place): (f"{history}{_ROW}{place}", place)
        for history, places in requests.positions.items()
        for place in sorted(places)
    }
    positions = {name: {place} for name, place in rows.values()}
    return SummaryRequests(_ShuffledHistories(positions, requests.histories, settings), positions, rows)


def _rows_of_others(requests: SummaryRequests, seed: int) -> dict[tuple[str, int], tuple[str, int]]:
    """Return a row of another user at the same position or the nearest one that any other user has, for each row.

    By row and not by user: another user's summaries, always the same one's, would be a name that training learns.
    """
    rows = sorted((place, name) for name, places in requests.positions.items() for place in places)
    users = [user_of(name) for _, name in rows]
    if len(set(users)) < 2:
        raise UserError("control: wrong-summary needs the rows of two users; leave it out")
    drawn = np.random.default_rng(hash64("control", seed)).random(len(rows))
    order = np.lexsort((drawn, np.array([place for place, _ in rows]))).tolist()
    after = _nearest_other(order, users)
    before = _nearest_other(order[::-1], users)
    found: dict[tuple[str, int], tuple[str, int]] = {}
    for row, (place, name) in enumerate(rows):
        others = [rows[other] for other in (after.get(row), before.get(row)) if other is not None]
        there, other_name = min(others, key=lambda other: abs(other[0] - place))
        found[name, place] = other_name, there
    return found


def _nearest_other(order: Sequence[int], users: Sequence[str]) -> dict[int, int]:
    """Return, for each row of `order`, the first row behind it that is of another user; none for the last ones."""
    found: dict[int, int] = {}
    for row, following in zip(order[-2::-1], order[:0:-1], strict=True):
        other = following if users[following] != users[row] else found.get(following)
        if other is not None:
            found[row] = other
    return found
