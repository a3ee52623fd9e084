"""A mapping from raw user ids to what each user has, kept as arrays until somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import numpy as np

Value = TypeVar("Value")


class Named:
    """Turns numbers into the raw ids they stand for."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def __call__(self, numbers: list[int]) -> list[str]:
        return [str(name) for name in self._raw[numbers]]


class PerUser(Mapping[str, Value], Generic[Value]):
    """Behaves as ``{user: make(values of the user, in order)}``, users in the order in which they first appear.

    A million lists and sets of ten take gigabytes; the arrays behind them take 16 bytes a value.

    Args:
        ids: Internal id of each raw user id.
        raw: Raw id of each internal user id.
        owners: ``[rows]`` internal user ids.
        values: ``[rows]`` whole numbers.
        make: Turns one user's values into what a look-up returns, anew each time.
    """

    def __init__(
        self, ids: Mapping[str, int], raw: Any, owners: Any, values: Any, make: Callable[[list[int]], Value]
    ) -> None:
        self._ids, self._raw, self._make = ids, raw, make
        self._values = values[np.argsort(owners, kind="stable")]
        self._bounds = np.r_[0, np.cumsum(np.bincount(owners, minlength=len(raw)))]
        first = np.full(len(raw), len(owners))
        first[owners[::-1]] = np.arange(len(owners))[::-1]
        self._users = np.argsort(first, kind="stable")[: int((first < len(owners)).sum())]

    def __getitem__(self, user: str) -> Value:
        place = self._ids[user]
        low, high = self._bounds[place], self._bounds[place + 1]
        if low == high:
            raise KeyError(user)
        return self._make(self._values[low:high].tolist())

    def __iter__(self) -> Iterator[str]:
        return iter(self._raw[self._users].tolist())

    def __len__(self) -> int:
        return len(self._users)
