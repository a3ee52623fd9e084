"""The scores of an MLLM and of another model as one ranking, by shares that validation has chosen.

The MLLM judges items by what they show, the other model by who took them: of an item without an interaction in training
it knows nothing, and puts it anywhere, mostly at the end. Validation under leave-one-out holds few such targets, so a
share chosen there without care rewards whatever pushes new items down. Hence, for each row (a user's candidates, or
those items of a full ranking that the MLLM was asked about)::

    m = z(log-odds of the MLLM)                       over the row's items
    b = z(score of the other model)                   over its known items: those with an interaction in training
    b = rho * m + offset                              for the others, which it cannot know
    fused = alpha * m + (1 - alpha) * b

``z`` subtracts the mean and divides by the standard deviation, 0 where that is 0. ``rho`` is the correlation of m and b
over all known items of validation, labels unseen, 0 where it is negative. ``offset`` is half of what b - rho * m is for
the known targets of validation on average, 0 where that is negative: what is no evidence, neither for the item being
the target nor against it, if both kinds have normal scores of one variance. (Without it new items sink, as every known
item that is no target is lower on average than one of which nothing is known.)

The choice is made on validation among known items alone, in NDCG@10. ``alpha`` is the best of 0.1, 0.2, …, 0.9, if that
mixture is ahead of the better one of the two models by more than two standard errors of the paired difference. Else the
better model is taken alone: alpha is 1, and the ranking the MLLM's own, or 0. Then it is the other model's own too,
unless the MLLM puts known targets of validation above the mean of their row by more than two standard errors: if so, it
places the items that the other model cannot know, by the formula.

Validation may have new targets too, as under a temporal split. From ten of them on they decide how far unknown items
are lifted, as every lift is paid by known targets: the least of no formula at all, 0, 1/16, 2/16, … of the offset with
which new targets are, in mean NDCG@10, not below where the MLLM alone has them; the whole offset if there is none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from recbole_mllm.common.errors import UserError

SHARES = tuple(n / 10 for n in range(1, 10))
GUARD = 2.0
"""How many standard errors a mixture must be ahead, and an MLLM above chance."""

LIFTS = tuple(n / 16 for n in range(16))
LEAST_NEW = 10
"""How many new targets validation must have to decide how far unknown items are lifted."""

DEPTH = 10

Chosen = Literal["mixture", "first", "second", "second, unknown items by the first"]


@dataclass(frozen=True, slots=True)
class ScoredPairs:
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
        offset: What an unknown item gets for its missing score.
        chosen: A mixture, or one of the two alone.
        gain: How far the best mixture was ahead of the better of the two, in NDCG@10 among known items.
        error: The standard error of that.
    """

    alpha: float
    rho: float
    offset: float
    chosen: Chosen
    gain: float
    error: float

    def scores(self, of: ScoredPairs) -> Any:
        """Return ``[P]`` the fused scores, NaN where the MLLM was not asked."""
        first, second = _parts(of)
        return self.alpha * first + (1 - self.alpha) * np.where(of.known, second, self.rho * first + self.offset)

    def places(self, of: ScoredPairs) -> Any:
        """Return ``[P]`` places: what the MLLM was asked about stands in the fused order, all else where it stood.

        Equal scores keep the MLLM's order.
        """
        asked = np.flatnonzero(of.asked)
        row, place = of.row[asked], of.place[asked]
        out = of.place.copy()
        out[asked[np.lexsort((place, self.scores(of)[asked], row))]] = place[np.lexsort((place, row))]
        return out


def choose_fusion(valid: ScoredPairs) -> Fusion:
    """Return what is best on the candidates of validation.

    Raises:
        UserError: Fewer than two users have a known target there.
    """
    first, second = _parts(valid)
    both, target = valid.asked & valid.known, valid.label > 0
    rows = np.unique(valid.row[target & valid.known])
    if len(rows) < 2:
        raise UserError("validation has no two users whose target occurs in training, so nothing can be chosen there")
    rho = _agreement(first[both], second[both])
    hits = both & target
    offset = max(0.0, float((second - rho * first)[hits].mean()) / 2) if hits.any() else 0.0
    mixtures = [Fusion(alpha, rho, offset, "mixture", 0.0, 0.0) for alpha in SHARES]
    means = [_among_known(valid, mixture.places(valid), rows) for mixture in mixtures]
    alone = [_among_known(valid, place, rows) for place in (valid.place, valid.second_place)]
    best = max(range(len(SHARES)), key=lambda n: (means[n].mean(), SHARES[n]))
    is_first = bool(alone[0].mean() >= alone[1].mean())
    gain, error = _mean_and_error(means[best] - (alone[0] if is_first else alone[1]))
    found = replace(mixtures[best], gain=gain, error=error)
    new = np.unique(valid.row[target & ~valid.known])
    if gain > GUARD * error:
        return _lifted(found, valid, new)
    if is_first:
        return replace(found, alpha=1.0, chosen="first")
    alone_too = replace(found, alpha=0.0, chosen="second")
    placed = replace(alone_too, chosen="second, unknown items by the first")
    if len(new) >= LEAST_NEW:
        needs_none = (ndcg(valid, valid.second_place) - ndcg(valid, valid.place))[new].mean() >= 0
        return alone_too if needs_none else _lifted(placed, valid, new)
    above, its_error = _mean_and_error(first[hits]) if hits.sum() > 1 else (0.0, 0.0)
    return placed if above > GUARD * its_error else alone_too


def _lifted(found: Fusion, valid: ScoredPairs, new: Any) -> Fusion:
    """Return `found` with the least offset under which the rows `new` are not below where the MLLM has them."""
    if len(new) >= LEAST_NEW:
        mine = ndcg(valid, valid.place)[new].mean()
        for lift in LIFTS:
            less = replace(found, offset=lift * found.offset)
            if ndcg(valid, less.places(valid))[new].mean() >= mine:
                return less
    return found


def _among_known(of: ScoredPairs, place: Any, rows: Any) -> Any:
    """Return NDCG@10 of `rows`, unknown items left out of the rankings of ``[P]`` `place`."""
    order = np.lexsort((-place, of.row))
    unknown = (~of.known)[order]
    before = np.cumsum(unknown) - unknown  # those of earlier rows too
    starts = np.searchsorted(of.row[order], of.row[order])
    above = np.empty(len(order), np.int64)
    above[order] = before - before[starts]
    return ndcg(replace(of, label=np.where(of.known, of.label, 0)), place + above)[rows]


def ndcg(of: ScoredPairs, place: Any) -> Any:
    """Return ``[rows]`` NDCG@10 of rankings given by ``[P]`` `place`; 0 of a row without a target."""
    hit = of.label > 0
    rank = (of.among - 1 - place)[hit]
    gain = np.where(rank < DEPTH, 1 / np.log2(np.maximum(rank, 0) + 2), 0.0)
    rows = int(of.row.max()) + 1
    targets = np.minimum(np.bincount(of.row[hit], minlength=rows), DEPTH)
    ideal = np.concatenate([[1.0], np.cumsum(1 / np.log2(np.arange(DEPTH) + 2))])
    return np.bincount(of.row[hit], gain, rows) / ideal[targets]


def align_candidates(first: Mapping[str, Any], second: Mapping[str, Any], known: Any) -> ScoredPairs:
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
    first, second = sorted_scores(first), sorted_scores(second)
    if ("among" in first) != ("among" in second):
        raise UserError("one of them ranked all items, the other one candidates")
    users, row = np.unique(first["user"], return_inverse=True)
    if not np.array_equal(users, np.unique(second["user"])):
        raise UserError("they scored other users")
    about = {"row": row, "label": first["label"], "known": known(first["item"]), "place": first["place"]}
    if "among" not in first:
        if any(not np.array_equal(first[name], second[name]) for name in ("user", "item", "label")):
            raise UserError("they scored other items")
        log_odds, scores = first["score"].astype(float), second["score"].astype(float)
        among = np.bincount(row)[row]
        return ScoredPairs(**about, first=log_odds, second=scores, second_place=second["place"], among=among)
    at, found = _places_of(first, second)
    best = _among_best(second)
    lowest = np.full(len(users), np.inf)
    np.minimum.at(lowest, np.searchsorted(users, second["user"][best]), second["score"][best])
    return ScoredPairs(
        **about,
        first=np.where(_among_best(first), first["answer"], np.nan),
        second=np.where(found & best[at], second["score"][at], lowest[row]),
        second_place=np.where(found, second["place"][at], -1),
        among=first["among"],
    )


def sorted_scores(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a file of scores in the order of `align_candidates`: by user, item and label."""
    order = np.lexsort((scores["label"], scores["item"], scores["user"]))
    return {name: column[order] for name, column in scores.items()}


def _places_of(asked: Mapping[str, Any], among: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return where each (user, item) of `asked` stands in `among`, both sorted, and whether it is there at all."""
    codes = []
    for name in ("user", "item"):
        both = np.unique(np.concatenate([asked[name], among[name]]), return_inverse=True)[1]
        codes.append(both.astype(np.int64))
    pairs = codes[0] * (codes[1].max() + 1) + codes[1]
    wanted, there = pairs[: len(asked["user"])], pairs[len(asked["user"]) :]
    at = np.minimum(np.searchsorted(there, wanted), len(there) - 1)
    return at, there[at] == wanted


def _among_best(scores: Mapping[str, Any]) -> Any:
    """Return whether a file of a full ranking would hold the item whatever its label."""
    rank = scores["among"] - 1 - scores["place"]
    return rank <= rank[scores["label"] <= 0].max(initial=-1)


def _parts(of: ScoredPairs) -> tuple[Any, Any]:
    """Return m and b of the formula, b at known items alone."""
    asked = of.asked
    return _standardised(of.first, of.row, asked), _standardised(of.second, of.row, asked & of.known)


def _standardised(values: Any, row: Any, used: Any) -> Any:
    """Return ``[P]`` the z-score of each value among the `used` ones of its row, 0 in a row of equal values."""
    owner, own, rows = row[used], values[used], int(row.max()) + 1
    count = np.maximum(np.bincount(owner, minlength=rows), 1)
    centred = own - (np.bincount(owner, own, rows) / count)[owner]
    spread = np.sqrt(np.bincount(owner, centred**2, rows) / count)
    size = np.zeros(rows)
    np.maximum.at(size, owner, np.abs(own))
    spread = np.where(spread > 1e-9 * size, spread, np.inf)  # what is left of equal values are rounding errors
    out = np.full(len(values), np.nan)
    out[used] = centred / spread[owner]
    return out


def _agreement(first: Any, second: Any) -> float:
    """Return the correlation of the two, 0 where it is negative or cannot be had."""
    if not (first.size and first.std() and second.std()):
        return 0.0
    return max(0.0, float(np.corrcoef(first, second)[0, 1]))


def _mean_and_error(values: Any) -> tuple[float, float]:
    """Return the mean and its standard error."""
    return float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))
