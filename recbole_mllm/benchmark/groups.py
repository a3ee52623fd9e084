"""The ranking metric by groups of users: new and known targets, popularity, length of history, image or none.

Groups are cut once for the whole table, so that all rows show the same users side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recbole_mllm.benchmark.leaderboard import Dimension, GroupPart
from recbole_mllm.evaluation.significance import DRAW_SEED, Floats, estimate_means

FEW = 30
"""Below this many users a group's mean is an anecdote, and the reports say so."""

BUDGET = 4e6  # drawn values a group: from 2000 users on, the normal interval does

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Partition:
    """A dimension and the ``[users]`` mask of each of its groups."""

    dimension: Dimension
    masks: tuple[Mask, ...]


def partitions(columns: Mapping[str, NDArray[Any]]) -> tuple[Partition, ...]:
    """Part the users by each of the four dimensions; groups without users are left out."""
    count, length, image = columns["train_count"], columns["history_length"], columns["has_image"].astype(bool)
    return (
        _partition("warmth", "Cold and warm targets", "cold: the target has no interaction in training",
                   {"cold": count == 0, "warm": count > 0}),
        _partition("popularity", "Popularity of the target",
                   "interactions of the target in training, tenths of the users; equal counts stay together",
                   bands(count, 10)),
        _partition("history", "Length of the history",
                   "interactions of the user in training, quarters of the users; equal lengths stay together",
                   bands(length, 4)),
        _partition("image", "Image of the target", "whether the target has an image that can be read",
                   {"with image": image, "without image": ~image}),
    )  # fmt: skip


def bands(values: NDArray[Any], parts: int) -> dict[str, Mask]:
    """Cut users into up to `parts` groups of about one size by `values`, lowest first; equal values share a group."""
    edges = np.unique(np.quantile(values, np.arange(1, parts) / parts, method="lower"))
    band = np.searchsorted(edges, values, side="left")
    masks = [band == number for number in np.unique(band)]
    return {_range(values[mask].min(), values[mask].max()): mask for mask in masks}


def measure(values: Floats, partition: Partition) -> tuple[GroupPart, ...]:
    """Return mean and 95 % interval of ``[users]`` `values` in each group."""
    parts = []
    for mask in partition.masks:
        (estimate,) = estimate_means(values[mask][None], DRAW_SEED, BUDGET)
        parts.append(GroupPart(estimate.mean, estimate.low, estimate.high, int(mask.sum())))
    return tuple(parts)


def _partition(key: str, title: str, told: str, masks: Mapping[str, Mask]) -> Partition:
    there = {label: mask for label, mask in masks.items() if mask.any()}
    counts = tuple(int(mask.sum()) for mask in there.values())
    return Partition(Dimension(key, title, told, tuple(there), counts), tuple(there.values()))


def _range(low: Any, high: Any) -> str:
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"
