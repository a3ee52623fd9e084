"""In which order a dataset's interactions stand, by the exact time and as RecBole sorts them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recbole_mllm.health.interactions import Interactions
from recbole_mllm.health.sample import Sample


@dataclass(frozen=True, slots=True)
class Order:
    """What the times say.

    Attributes:
        first, last: The range of times, in the file's unit.
        missing: Interactions without a time; RecBole gives them the mean.
        sorted: "file", "users" (each user's rows stand in order, the file does not) or "no".
        ties: Users with two interactions at the same time, whose order is the file's.
        reordered: Users whose items stand in another order in RecBole than by exact time, then place in the file.
        other_last: Those of them whose last item, the one a leave-one-out test asks for, is another.
    """

    first: float
    last: float
    missing: int
    sorted: str
    ties: int
    reordered: Sample
    other_last: int


def measure_order(inter: Interactions) -> Order | None:
    """Compare the exact order with RecBole's, which sorts float32 times, stably (data/interaction.py:307-346).

    Float32 counts whole numbers up to 16,777,216 only: today's seconds come in steps of 128, milliseconds of 131,072.
    """
    if inter.time is None or not len(inter.time) or np.isnan(inter.time).all():
        return None
    gaps = np.isnan(inter.time)
    time = np.where(gaps, np.nanmean(inter.time), inter.time) if gaps.any() else inter.time
    exact = np.lexsort((time, inter.user))
    user, at = inter.user[exact], time[exact]
    same_user = user[1:] == user[:-1]
    ties = np.unique(user[1:][same_user & (at[1:] == at[:-1])]).size
    items = inter.item[exact]
    in_recbole = inter.item[np.lexsort((time.astype(np.float32), inter.user))]
    differs = np.unique(user[items != in_recbole])
    ends = np.flatnonzero(np.append(~same_user, True))
    return Order(
        first=float(np.nanmin(inter.time)),
        last=float(np.nanmax(inter.time)),
        missing=int(gaps.sum()),
        sorted=_sortedness(time, np.diff(exact)[same_user]),
        ties=int(ties),
        reordered=Sample(int(differs.size), inter.users[differs[0]] if differs.size else ""),
        other_last=int((items[ends] != in_recbole[ends]).sum()),
    )


def _sortedness(time: NDArray[np.float64], steps: NDArray[np.intp]) -> str:
    """Return how far the file is sorted; `steps` lead from each interaction of a user to the next, in rows."""
    if bool((time[1:] >= time[:-1]).all()):
        return "file"
    return "users" if bool((steps > 0).all()) else "no"
