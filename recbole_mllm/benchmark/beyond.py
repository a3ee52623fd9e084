"""Beyond accuracy: how many of the items a model recommends, how unevenly, and how popular they are.

A user's recommendations are the ten best of what was ranked: of the drawn candidates, or of all items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recbole_mllm.benchmark.significance import DRAW_SEED, Estimate, Floats, estimate_means, jackknife
from recbole_mllm.evaluation.metrics import popular_head

DEPTH = 10
BEYOND = {
    f"Coverage@{DEPTH}": "share of the items that somebody is recommended",
    f"Gini@{DEPTH}": "how unevenly recommendations fall on the items: 0 = all alike, 1 = one item has them all",
    f"Popularity@{DEPTH}": "mean number of training interactions of what is recommended",
    f"Tail@{DEPTH}": "share of what is recommended that is in the long tail",
}
"""The measures and what they mean."""


@dataclass(frozen=True, slots=True)
class Recommended:
    """What one run recommends.

    Args:
        items: ``[users, DEPTH]`` places of the items in `counts`, best first; -1 where fewer were ranked.
        counts: ``[items]`` training interactions of every item of the dataset.
    """

    items: NDArray[np.int64]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, user: Any, item: Any, order: Any, n_users: int, names: Any, counts: Any) -> Recommended:
        """Take the best items of each user.

        Args:
            user: ``[pairs]`` number of the user.
            item: ``[pairs]`` raw id.
            order: ``[pairs]`` place or score, higher is better.
            n_users: How many users there are.
            names: ``[items]`` raw id of every item of the dataset.
            counts: ``[items]`` training interactions.
        """
        best_first = np.lexsort((-order, user))
        owner = user[best_first]
        rank = np.arange(len(owner)) - np.searchsorted(owner, owner)
        kept = rank < DEPTH
        sorter = np.argsort(names)
        items = np.full((n_users, DEPTH), -1)
        items[owner[kept], rank[kept]] = sorter[np.searchsorted(names, item[best_first][kept], sorter=sorter)]
        return cls(items, counts)


def measured(runs: Sequence[Recommended], pool: NDArray[np.bool_]) -> dict[str, Estimate]:
    """Return the measures of a row, averaged over its `runs` (seeds), with 95 % intervals over users.

    Coverage and Gini's index are of all users together and have no value of a single one's: their intervals come from
    leaving out groups of users (jackknife). The bootstrap would draw users twice, who recommend nothing new twice.

    Args:
        runs: Of the same users, in the same order.
        pool: ``[items]`` what could be recommended: items trained on, or recommended by any row of the table.
    """
    names = list(BEYOND)
    users = len(runs[0].items)

    def coverage(kept: NDArray[np.bool_]) -> float:
        return float(np.mean([(_times(run, kept)[pool] > 0).mean() for run in runs]))

    def gini(kept: NDArray[np.bool_]) -> float:
        return float(np.mean([gini_index(_times(run, kept)[pool]) for run in runs]))

    found = {}
    for name, of in zip(names[:2], (coverage, gini), strict=True):
        found[name] = within_bounds(jackknife(of, users, DRAW_SEED))
    rows = np.stack([np.mean([_of_items(run, run.counts) for run in runs], axis=0),
                     np.mean([_of_items(run, ~popular_head(run.counts)) for run in runs], axis=0)])  # fmt: skip
    return found | dict(zip(names[2:], estimate_means(rows, DRAW_SEED), strict=True))


def within_bounds(share: Estimate) -> Estimate:
    """Cut the interval of a value in [0, 1] there: Student's interval knows no bounds."""
    return replace(share, low=max(0.0, share.low), high=min(1.0, share.high))


def gini_index(times: NDArray[np.int64]) -> float:
    """Return Gini's index of how often each item is recommended (RecBole's GiniIndex, metrics.py:633)."""
    n, ordered = len(times), np.sort(times)
    return float(((2 * np.arange(1, n + 1) - n - 1) * ordered).sum() / (n * max(1, ordered.sum())))


def _times(run: Recommended, users: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return ``[items]`` how often each item is recommended to `users` ``[users]``."""
    items = run.items[users].ravel()
    return np.bincount(items[items >= 0], minlength=len(run.counts))


def _of_items(run: Recommended, values: NDArray[Any]) -> Floats:
    """Return ``[users]`` the mean of ``[items]`` `values` over what each user is recommended."""
    there = run.items >= 0
    means: Floats = np.where(there, values[run.items], 0).sum(1) / np.maximum(1, there.sum(1))
    return means
