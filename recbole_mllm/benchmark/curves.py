"""Metrics at every cut-off, from where each user's target was ranked.

With one target a user, which is what a leaderboard takes, a rank says it all: Hit@k is whether rank < k, MRR@k is
1 / (rank + 1) and NDCG@k is 1 / log2(rank + 2) where it is (RecBole metrics.py:39-205), with 0 for the best rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CURVES = ("NDCG", "Hit", "MRR")
DEEPEST = 20


@dataclass(frozen=True, slots=True)
class Ranks:
    """``[users]`` ranks of the targets, 0 for the best, among at least `candidates` items each."""

    rank: NDArray[np.int64]
    candidates: int


def target_ranks(user: NDArray[Any], label: NDArray[Any], order: NDArray[Any], n_users: int) -> Ranks | None:
    """Return where each user's target was ranked, or None where the arrays do not tell.

    They do not tell it of users with several targets, nor where a target's score is tied and no places were kept.

    Args:
        user: ``[pairs]`` index of the user.
        label: ``[pairs]`` above 0 for the target.
        order: ``[pairs]`` place or score, higher is better.
        n_users: How many users there are.
    """
    positive = label > 0
    if not (np.bincount(user[positive], minlength=n_users) == 1).all():
        return None
    target = np.empty(n_users, dtype=order.dtype)
    target[user[positive]] = order[positive]
    if (order[~positive] == target[user[~positive]]).any():
        return None
    rank = np.bincount(user[order > target[user]], minlength=n_users)
    return Ranks(rank, int(np.bincount(user, minlength=n_users).min()))


def metric_curves(seeds: Sequence[Ranks]) -> dict[str, tuple[float, ...]]:
    """Return each metric at k = 1, 2, …, averaged over users and seeds; nothing where no ranks are known.

    The last k leaves one candidate out, as with all of them every Hit is 1.
    """
    if not seeds:
        return {}
    k = np.arange(1, max(2, min(DEEPEST + 1, min(one.candidates for one in seeds))))
    rank = np.concatenate([one.rank for one in seeds])[:, None]
    hit = rank < k
    gains = {"NDCG": 1 / np.log2(rank + 2), "Hit": np.ones_like(rank, dtype=float), "MRR": 1 / (rank + 1)}
    return {name: tuple((hit * gains[name]).mean(axis=0).tolist()) for name in CURVES}
