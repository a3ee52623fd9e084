"""Interactions as columns: what a converter reads, narrows, sorts and writes."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from recbole_mllm.common.errors import UserError
from recbole_mllm.data.atomic import find_impossible_times, id_problem
from recbole_mllm.data.histories import places_in_groups
from recbole_mllm.data.sampling import sample_users

from .source import Intake

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
    out = np.empty(len(inter), np.int64)
    out[order] = places_in_groups(inter.users[order]) + 1
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


@dataclass(frozen=True, slots=True)
class Step:
    """Counts after one step; what a step dropped is the difference to the step before."""

    name: str
    users: int
    items: int
    interactions: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What to keep.

    Args:
        earliest: Of a user's interactions with one item, the earliest alone.
        k_core: Least interactions of a user and of an item.
        max_history: The latest interactions of a user.
        limit_users: Size of a sample of users, drawn by `seed` as the evaluation's own sample is.
    """

    min_rating: float | None = None
    earliest: bool = False
    k_core: tuple[int, int] | None = None
    max_history: int | None = None
    limit_users: int | None = None
    seed: int = 2024


def count(name: str, inter: Interactions) -> Step:
    """Return the counts of `inter`."""
    return Step(name, int((inter.per_user() > 0).sum()), int((inter.per_item() > 0).sum()), len(inter))


def narrow(inter: Interactions, limits: Limits) -> tuple[Interactions, list[Step]]:
    """Apply `limits` to interactions in time order; return what is left and the counts after each step.

    Raises:
        UserError: A step leaves nothing, or asks for ratings that are not there.
    """
    steps = [count("read", inter)]
    for name, keep in _filters(limits):
        inter = keep(inter)
        steps.append(count(name, inter))
        if not len(inter):
            raise UserError(f"nothing is left after {name}; there were {steps[-2].interactions} interactions before it")
    return inter, steps


def _filters(limits: Limits) -> Iterator[tuple[str, Callable[[Interactions], Interactions]]]:
    if limits.min_rating is not None:
        least = limits.min_rating
        yield f"--min-rating {least:g}", lambda inter: _at_least(inter, least)
    if limits.earliest:
        yield "a user's earliest interaction with an item", earliest
    if limits.k_core is not None:
        user, item = limits.k_core
        yield f"--k-core {user},{item}", lambda inter: k_core(inter, user, item)
    if limits.max_history is not None:
        longest = limits.max_history
        yield (
            f"--max-history {longest}",
            lambda inter: inter.take(places(inter) > inter.per_user()[inter.users] - longest),
        )
    if limits.limit_users is not None:
        users, seed = limits.limit_users, limits.seed
        yield f"--limit-users {users} (seed {seed})", lambda inter: of_sample(inter, users, seed)


def _at_least(inter: Interactions, rating: float) -> Interactions:
    if inter.ratings is None:
        raise UserError("--min-rating: the raw data has no rating for every interaction; leave the option out")
    return inter.take(inter.ratings >= rating)


def earliest(inter: Interactions) -> Interactions:
    """Keep the first of a user's interactions with an item, in the order given; one at an impossible time last."""
    pairs = inter.users.astype(np.int64) * len(inter.item_names) + inter.items
    early, late = find_impossible_times(np.empty(0) if inter.times is None else inter.times)
    order = np.argsort(early | late, kind="stable") if early.any() else np.arange(len(pairs))
    _, first = np.unique(pairs[order], return_index=True)
    return inter.take(np.sort(order[first]))


def k_core(inter: Interactions, user: int, item: int) -> Interactions:
    """Drop users with fewer than `user` and items with fewer than `item` interactions until none is left."""
    while True:
        keep = (inter.per_user()[inter.users] >= user) & (inter.per_item()[inter.items] >= item)
        if keep.all():
            return inter
        inter = inter.take(keep)


def of_sample(inter: Interactions, users: int, seed: int) -> Interactions:
    """Keep a seeded sample of users, the same for any order of the file."""
    there = np.flatnonzero(inter.per_user())
    chosen = sample_users([inter.user_names[u] for u in there], users, seed)
    mask = np.array([name in chosen for name in inter.user_names], bool)
    return inter.take(mask[inter.users])
