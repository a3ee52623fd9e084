"""The scores of an MLLM and of another model as one ranking, by shares that validation has chosen.

The MLLM judges items by what they show, the other model by who took them: of an item without an interaction in training
it knows nothing, and puts it anywhere. Validation under leave-one-out holds no such target, so a share chosen there
without care rewards whatever pushes new items down. Hence, for each row (a user's candidates, or the items of a full
ranking that the MLLM was asked about)::

    m = z(log-odds of the MLLM)                       over the row's items
    b = z(score of the other model)                   over its known items: those with an interaction in training
    b = rho * m                                       for the others, which it cannot know
    fused = alpha * m + (1 - alpha) * b

``z`` subtracts the mean and divides by the standard deviation, 0 where that is 0. ``rho`` is the correlation of m and b
over all known items of validation, 0 where it is negative: the best linear guess of what the other model would say.
``alpha`` is the one of 0.1, 0.2, …, 0.9 with the highest NDCG@10 on validation, if it is ahead of the better one of the
two models by more than two standard errors of the paired difference. Else the better model alone is taken: alpha is 1,
the MLLM's own ranking, or 0, which still puts the items that the other model cannot know by the MLLM. That costs ranks
of known items, so where it is behind the other model's own ranking by more than two standard errors, this is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from recbole_mllm.common.errors import UserError

SHARES = tuple(n / 10 for n in range(1, 10))
GUARD = 2.0
"""How many standard errors a mixture must be ahead, and unknown items may cost."""

DEPTH = 10

Chosen = Literal["mixture", "first", "second", "second as it is"]


@dataclass(frozen=True, slots=True)
class Candidates:
    """What two models have made of the same items, sorted by row; ``[P]`` arrays.

    Args:
        row: Number of the user, non-decreasing.
        label: Above 0 for a target.
        first: The MLLM's log-odds; NaN where it was not asked.
        second: The other model's score.
        known: Whether the other model has met the item in training.
        place: The item's place in the first's ranking, 0 for the worst of `among`, without ties.
        second_place: The same in the second's.
        among: How many items of the row were ranked.
    """

    row: Any
    label: Any
    first: Any
    second: Any
    known: Any
    place: Any
    second_place: Any
    among: Any

    @property
    def asked(self) -> Any:
        """``[P]`` whether the item is one of those that are put in another order."""
        return ~np.isnan(self.first)


@dataclass(frozen=True, slots=True)
class Fusion:
    """What validation has chosen, see the head of this file.

    Args:
        alpha: The MLLM's share.
        rho: The correlation of the two over known items.
        chosen: A mixture, or which of the two alone.
        gain: How far the best mixture was ahead of the better of the two on validation, in NDCG@10.
        error: The standard error of that.
        valid: NDCG@10 on validation of what was chosen.
    """

    alpha: float
    rho: float
    chosen: Chosen
    gain: float
    error: float
    valid: float


def fuse_scores(of: Candidates, alpha: float, rho: float) -> Any:
    """Return ``[P]`` the fused scores, NaN where the MLLM was not asked."""
    first, second = _parts(of)
    return alpha * first + (1 - alpha) * np.where(of.known, second, rho * first)


def fuse_places(of: Candidates, alpha: float, rho: float) -> Any:
    """Return ``[P]`` places: what the MLLM was asked about stands in the fused order, all else where it stood.

    Equal scores keep the MLLM's order.
    """
    asked = np.flatnonzero(of.asked)
    row, place = of.row[asked], of.place[asked]
    out = of.place.copy()
    out[asked[np.lexsort((place, fuse_scores(of, alpha, rho)[asked], row))]] = place[np.lexsort((place, row))]
    return out


def choose_fusion(valid: Candidates) -> Fusion:
    """Return what is best on the candidates of validation; needs two rows at least."""
    rho = _agreement(valid)
    alone = [ndcg(valid, valid.place), ndcg(valid, valid.second_place)]
    mixtures = [ndcg(valid, fuse_places(valid, alpha, rho)) for alpha in SHARES]
    best = max(range(len(SHARES)), key=lambda n: (mixtures[n].mean(), SHARES[n]))
    is_first = bool(alone[0].mean() >= alone[1].mean())
    gain, error = _paired(mixtures[best], alone[0] if is_first else alone[1])
    told = {"rho": rho, "gain": gain, "error": error}
    if gain > GUARD * error:
        return Fusion(SHARES[best], chosen="mixture", valid=float(mixtures[best].mean()), **told)
    if is_first:
        return Fusion(1.0, chosen="first", valid=float(alone[0].mean()), **told)
    placed = ndcg(valid, fuse_places(valid, 0.0, rho))
    loss, its_error = _paired(alone[1], placed)
    if loss > GUARD * its_error:
        return Fusion(0.0, chosen="second as it is", valid=float(alone[1].mean()), **told)
    return Fusion(0.0, chosen="second", valid=float(placed.mean()), **told)


def ndcg(of: Candidates, place: Any) -> Any:
    """Return ``[rows]`` NDCG@10 of rankings given by ``[P]`` `place`, rows in the order of their numbers."""
    _, row = np.unique(of.row, return_inverse=True)
    hit = of.label > 0
    rank = (of.among - 1 - place)[hit]
    gain = np.where(rank < DEPTH, 1 / np.log2(np.maximum(rank, 0) + 2), 0.0)
    rows = row.max() + 1
    ideal = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(DEPTH) + 2))])
    return np.bincount(row[hit], gain, rows) / ideal[np.minimum(np.bincount(row[hit], minlength=rows), DEPTH)]


def align_candidates(first: Mapping[str, Any], second: Mapping[str, Any], known: Any) -> Candidates:
    """Return the items of the file of scores `first`, an MLLM's, with what `second` says of them.

    Of a full ranking the files hold each user's best items and target. The target is looked at no closer than other
    items: where a file holds it for its label alone it counts as not asked, or as the lowest of the best.

    Args:
        first: ``user``, ``item``, ``label``, ``score``, ``place``, of a full ranking ``among`` and ``answer`` too.
        second: The same of another model.
        known: Of raw item ids ``[P]``: which of them the other model has met.

    Raises:
        UserError: They are not about the same users and items.
    """
    first, second = _sorted(first), _sorted(second)
    users, row = np.unique(first["user"], return_inverse=True)
    if not np.array_equal(users, np.unique(second["user"])):
        raise UserError("the two runs have scored other users")
    full = "among" in first
    if full != ("among" in second):
        raise UserError("one of the two runs has ranked all items, the other one candidates")
    at, found = _places_in(second, first)
    if not full:
        if not (found.all() and len(first["item"]) == len(second["item"])):
            raise UserError("the two runs have scored other items")
        among = np.bincount(row)[row]
        return Candidates(row, first["label"], first["score"].astype(float), second["score"][at].astype(float),
                          known(first["item"]), first["place"], second["place"][at], among)  # fmt: skip
    asked = _among_best(first)
    theirs = np.where(found, second["score"][at].astype(float), np.nan)
    theirs[~(found & _among_best(second)[at])] = np.nan
    lowest = np.full(len(users), np.inf)
    inside = _among_best(second)
    np.minimum.at(lowest, np.searchsorted(users, second["user"][inside]), second["score"][inside])
    theirs = np.where(np.isnan(theirs), lowest[row], theirs)
    answer = np.where(asked, first["answer"].astype(float), np.nan)
    second_place = np.where(found, second["place"][at], -1)
    return Candidates(
        row, first["label"], answer, theirs, known(first["item"]), first["place"], second_place, first["among"]
    )
