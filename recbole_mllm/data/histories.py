"""Histories by name: which rows share one, and mappings from them that stay arrays until somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Generic, TypeVar

import numpy as np

Value = TypeVar("Value")

_FURTHER = "\t"  # between a user's id and the number of a further history: no raw id holds a tab


def user_of(history: str) -> str:
    """Return the raw id of the user to whom the history of this name belongs."""
    return history.partition(_FURTHER)[0]


class HistoryNames:
    """Names of histories, numbered user by user: the first bears the user's raw id, further ones a number behind it.

    Args:
        ids: Internal id of each raw user id.
        raw: Raw id of each internal user id.
        counts: ``[users]`` how many histories each user has; None for one each, whose number is the user's.
    """

    def __init__(self, ids: Mapping[str, int], raw: Any, counts: Any = None) -> None:
        self._ids, self._raw = ids, raw
        counts = np.ones(len(raw), int) if counts is None else counts
        self._starts = np.r_[0, np.cumsum(counts)]
        self.owners = np.repeat(np.arange(len(raw)), counts)

    def __len__(self) -> int:
        return len(self.owners)

    def name(self, number: int) -> str:
        """Return the name of a history."""
        owner = self.owners[number]
        further = number - self._starts[owner]
        return f"{self._raw[owner]}{_FURTHER}{further}" if further else str(self._raw[owner])

    def number(self, name: str) -> int:
        """Return the number of the history of this name, or raise a KeyError."""
        user, _, further = name.partition(_FURTHER)
        place = self._ids[user]
        number = int(self._starts[place]) + int(further or 0)
        if number >= self._starts[place + 1]:
            raise KeyError(name)
        return number


def raw_ids(raw: Any, numbers: list[int]) -> list[str]:
    """Return the raw ids that internal `numbers` stand for, `raw` being those of all."""
    return [str(name) for name in raw[numbers]]


class PerHistory(Mapping[str, Value], Generic[Value]):
    """Behaves as ``{name: make(values of the history, in order)}``, users in the order in which they first appear.

    A user's histories stand together. A million lists and sets of ten take gigabytes; the arrays behind them take 16
    bytes a value.

    Args:
        names: What the histories are called.
        owners: ``[rows]`` numbers of histories.
        values: ``[rows]`` whole numbers.
        make: Turns one history's values into what a look-up returns, at each one.
        empty: Whether a history without a value is there all the same.
    """

    def __init__(
        self, names: HistoryNames, owners: Any, values: Any, make: Callable[[list[int]], Value], *, empty: bool = False
    ) -> None:
        self._names, self._make, self._empty = names, make, empty
        self._values = values[np.argsort(owners, kind="stable")]
        self._bounds = np.r_[0, np.cumsum(np.bincount(owners, minlength=len(names)))]
        first = np.full(len(names), len(owners))
        first[owners[::-1]] = np.arange(len(owners))[::-1]
        present = np.arange(len(names)) if empty else np.flatnonzero(first < len(owners))
        users = names.owners[present]
        begun = np.full(int(names.owners.max(initial=-1)) + 1, len(owners))
        np.minimum.at(begun, users, first[present])
        self._present = present[np.lexsort((present, users, begun[users]))]

    def __getitem__(self, name: str) -> Value:
        number = self._names.number(name)
        low, high = self._bounds[number], self._bounds[number + 1]
        if low == high and not self._empty:
            raise KeyError(name)
        return self._make(self._values[low:high].tolist())

    def __iter__(self) -> Iterator[str]:
        return map(self._names.name, self._present.tolist())

    def __len__(self) -> int:
        return len(self._present)


def shared_histories(users: Any, lists: Sequence[Any]) -> tuple[Any, Any]:
    """Return which rows' lists stand for a user's histories, user by user, and the number of each row's history.

    A row shares the history of another row of its user whose list begins with its own, and no other's.

    Args:
        users: ``[rows]`` internal ids.
        lists: ``[rows]`` arrays of internal item ids, of one type.
    """
    order = np.argsort(users, kind="stable").tolist()
    holder = np.arange(len(users))
    owner = users.tolist()
    # as bytes, lists that begin alike stand together when sorted, the shorter one just before those that continue
    beginnings = [items.tobytes() for items in lists]
    for _, group in groupby(order, key=owner.__getitem__):
        rows = sorted(group, key=beginnings.__getitem__)
        for row, following in zip(rows[-2::-1], rows[:0:-1], strict=True):
            if beginnings[following].startswith(beginnings[row]):
                holder[row] = holder[following]
    holders = np.unique(holder)
    holders = holders[np.argsort(users[holders], kind="stable")]
    number = np.empty(len(users), int)
    number[holders] = np.arange(len(holders))
    return holders, number[holder]


def places_in_groups(keys: Any) -> Any:
    """Return the place ``[rows]`` of each row among those of its key, from 0; rows of a key stand together."""
    first = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]]) if len(keys) else np.array([], int)
    return places_within(np.diff(np.r_[first, len(keys)]))


def places_within(lengths: Any) -> Any:
    """Return 0, 1, … for each of groups of these ``[groups]`` lengths, one group after the other."""
    return np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
