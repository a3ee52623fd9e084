"""Interactions as columns: what a converter reads, narrows, sorts and writes."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from dataset_converters.intake import Intake
from recbole_mllm.data.values import id_problem

Column = np.ndarray[Any, Any]


class Row(NamedTuple):
    """One interaction as the raw file has it; a source gives times to all of its rows or to none, ratings likewise."""

    user: str
    item: str
    time: int | float | None = None
    rating: float | None = None


@dataclass(frozen=True, slots=True)
class Interactions:
    """N interactions; `users` and `items` are int32 indices into the names.

    Args:
        times: int64, or float64 where the source has fractions; None where it has no times: the order is the file's.
        ratings: float64, or None.
    """

    users: Column
    items: Column
    times: Column | None
    ratings: Column | None
    user_names: list[str]
    item_names: list[str]

    def __len__(self) -> int:
        return len(self.users)

    def take(self, rows: Column) -> Interactions:
        """Return the interactions `rows` picks, a mask or indices."""
        times = None if self.times is None else self.times[rows]
        ratings = None if self.ratings is None else self.ratings[rows]
        return replace(self, users=self.users[rows], items=self.items[rows], times=times, ratings=ratings)

    def per_user(self) -> Column:
        """Return how many interactions each name in `user_names` has."""
        return np.bincount(self.users, minlength=len(self.user_names))

    def per_item(self) -> Column:
        """Return how many interactions each name in `item_names` has."""
        return np.bincount(self.items, minlength=len(self.item_names))


def collect(rows: Iterable[Row], intake: Intake) -> Interactions:
    """Read all `rows`, in their order.

    Raises:
        UserError: An id would not survive RecBole's reader (file and line are named), or there is no row at all.
    """
    users: dict[str, int] = {}
    items: dict[str, int] = {}
    of_user, of_item = array("i"), array("i")
    times: array[Any] = array("q")
    ratings: array[Any] = array("d")
    for user, item, time, rating in rows:
        u, i = users.get(user), items.get(item)
        if u is None and (u := _admit(users, user, "user", intake)) is None:
            continue
        if i is None and (i := _admit(items, item, "item", intake)) is None:
            continue
        of_user.append(u)
        of_item.append(i)
        if time is not None:
            if isinstance(time, float) and times.typecode == "q":
                times = array("d", times)
            times.append(time)
        if rating is not None:
            ratings.append(rating)
    return Interactions(
        _column(of_user), _column(of_item), _whole(times, of_user), _whole(ratings, of_user), list(users), list(items)
    )


def _admit(known: dict[str, int], name: str, what: str, intake: Intake) -> int | None:
    problem = id_problem(name)
    if problem is not None:
        intake.refuse(f"{what} id {name[:60]!r} {problem}")
        return None
    return known.setdefault(name, len(known))


def _column(values: array[Any]) -> Column:
    kind = {"i": np.int32, "q": np.int64, "d": np.float64}[values.typecode]
    return np.frombuffer(values, dtype=kind) if len(values) else np.empty(0, kind)


def _whole(values: array[Any], rows: array[Any]) -> Column | None:
    return _column(values) if len(values) and len(values) == len(rows) else None


def in_time_order(inter: Interactions) -> Interactions:
    """Sort by exact time; equal times keep the file's order, and without times the file's order is all there is."""
    return inter if inter.times is None else inter.take(np.argsort(inter.times, kind="stable"))


def places(inter: Interactions) -> Column:
    """Return each interaction's place in its user's own history, from 1; `inter` is in time order."""
    order = np.argsort(inter.users, kind="stable")
    sorted_users = inter.users[order]
    first = np.searchsorted(sorted_users, sorted_users, side="left")
    out = np.empty(len(inter), np.int64)
    out[order] = np.arange(len(inter)) - first + 1
    return out


def float32_confuses(inter: Interactions) -> int:
    """Return how many users have different times that are equal as the float32 RecBole sorts (data/dataset.py:1012)."""
    if inter.times is None:
        return 0
    order = np.argsort(inter.users, kind="stable")
    users, times = inter.users[order], inter.times[order]
    same = (users[1:] == users[:-1]) & (times[1:] != times[:-1])
    lost = same & (times[1:].astype(np.float32) == times[:-1].astype(np.float32))
    return len(np.unique(users[1:][lost]))
