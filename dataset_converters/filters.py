"""What is left out on request, one step after the other, each counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dataset_converters.interactions import Interactions, places
from recbole_mllm.data.sampling import sample_users
from recbole_mllm.data.values import find_impossible_times
from recbole_mllm.errors import UserError


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
        yield f"--min-rating {least:g}", lambda inter: at_least(inter, least)
    if limits.earliest:
        yield "a user's earliest interaction with an item", earliest
    if limits.k_core is not None:
        user, item = limits.k_core
        yield f"--k-core {user},{item}", lambda inter: k_core(inter, user, item)
    if limits.max_history is not None:
        longest = limits.max_history
        yield f"--max-history {longest}", lambda inter: latest(inter, longest)
    if limits.limit_users is not None:
        users, seed = limits.limit_users, limits.seed
        yield f"--limit-users {users} (seed {seed})", lambda inter: of_sample(inter, users, seed)


def at_least(inter: Interactions, rating: float) -> Interactions:
    """Keep interactions rated `rating` or better."""
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


def latest(inter: Interactions, longest: int) -> Interactions:
    """Keep each user's last `longest` interactions."""
    return inter.take(places(inter) > inter.per_user()[inter.users] - longest)


def of_sample(inter: Interactions, users: int, seed: int) -> Interactions:
    """Keep a seeded sample of users, the same for any order of the file."""
    there = np.flatnonzero(inter.per_user())
    chosen = sample_users([inter.user_names[u] for u in there], users, seed)
    mask = np.array([name in chosen for name in inter.user_names], bool)
    return inter.take(mask[inter.users])
