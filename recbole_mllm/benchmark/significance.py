"""How sure a number is: intervals over users, paired tests, and a correction for having asked many questions.

The user is the unit throughout: two pairs of one user are never taken for two observations. Metrics that exist per user
(Hit, MRR, NDCG, Recall, GAUC) get SciPy's percentile bootstrap of the mean and a paired t-test, which tests exactly
that mean (Wilcoxon tests another thing, on the many ties of top-k metrics). Pooled AUC has no per-user value; it gets a
cluster bootstrap, in which whole users, with all their pairs, are drawn again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

Floats = NDArray[np.float64]

DRAW_SEED = 2024
"""Seed of every bootstrap: the same records give the same leaderboard, to the last digit."""

CONFIDENCE = 0.95
RESAMPLES = 2000
BOOTSTRAP_BUDGET = 4e8  # drawn values (users x metrics x resamples), a few seconds; beyond, the normal interval
PAIR_BUDGET = 4e7  # drawn pairs (pairs x resamples) of one pooled AUC
BATCH_VALUES = 4e6  # values SciPy holds at once


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over users with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """How a row differs from the row it is held against, on the same users.

    Args:
        difference: Mean of (this row - the other row).
        ci95: Student's interval of it, on the same degrees of freedom as `p`: it holds 0 where `p` is above .05.
        p: Two-sided, not yet corrected for multiplicity.
        effect: Cohen's d of the paired differences (mean / standard deviation); None where it has no finite value.
    """

    difference: float
    ci95: tuple[float, float]
    p: float
    effect: float | None


def estimate_means(values: Floats, seed: int, budget: float = BOOTSTRAP_BUDGET) -> list[Estimate]:
    """Return mean and interval of each row of `values` ``[metrics, users]``.

    All metrics share the drawn users. Beyond `budget` drawn values, by default from some 16,000 users and 12 metrics
    on, the normal interval is taken: at that size it and the bootstrap agree to far below the digits shown, and 10^5
    users cost milliseconds.
    """
    n_metrics, n_users = values.shape
    means = values.mean(axis=1)
    if n_users < 2:
        return [Estimate(float(m), float(m), float(m)) for m in means]
    if n_metrics * n_users * RESAMPLES > budget:
        reach = stats.norm.ppf(0.5 + CONFIDENCE / 2) * stats.sem(values, axis=1)
        low, high = means - reach, means + reach
    else:
        low, high = stats.bootstrap(
            (values,), np.mean, axis=1, vectorized=True, n_resamples=RESAMPLES, confidence_level=CONFIDENCE,
            method="percentile", batch=max(1, int(BATCH_VALUES / values.size)), rng=np.random.default_rng(seed),
        ).confidence_interval  # fmt: skip
    return [Estimate(float(m), float(lo), float(hi)) for m, lo, hi in zip(means, low, high, strict=True)]


def jackknife(statistic: Callable[[NDArray[np.bool_]], float], n_users: int, seed: int, groups: int = 50) -> Estimate:
    """Return a statistic of all users with Student's interval of the delete-a-group jackknife (Kott, JOS 2001).

    Args:
        statistic: Of the users in a mask ``[users]``.
        n_users: How many there are.
        seed: Of the parting into groups.
        groups: How many are left out in turn; as many as users where there are fewer.
    """
    everyone = np.ones(n_users, dtype=bool)
    value, groups = statistic(everyone), min(groups, n_users)
    if n_users < 2:
        return Estimate(value, value, value)
    group = np.random.default_rng(seed).permutation(n_users) % groups
    without = np.array([statistic(group != left_out) for left_out in range(groups)])
    error = math.sqrt((groups - 1) / groups * float(((without - without.mean()) ** 2).sum()))
    return Estimate(value, *_student_interval(value, error, groups - 1))


def compare_paired(values: Floats, reference: Floats) -> Comparison:
    """Compare two ``[users]`` arrays of the same users, in the same order, by a paired t-test."""
    difference = values - reference
    mean = float(difference.mean())
    spread = float(difference.std(ddof=1)) if difference.size > 1 else 0.0
    if spread <= 1e-12:  # all users differ alike: t is 0/0 or infinite, but the sign test still has an answer
        if abs(mean) <= 1e-12:
            return Comparison(0.0, (0.0, 0.0), 1.0, 0.0)
        return Comparison(mean, (mean, mean), min(1.0, 2 * 0.5**difference.size), None)
    t, freedom = mean / spread * math.sqrt(difference.size), difference.size - 1
    interval = _student_interval(mean, spread / math.sqrt(difference.size), freedom)
    return Comparison(mean, interval, float(2 * special.stdtr(freedom, -abs(t))), mean / spread)


def _student_interval(difference: float, error: float, freedom: int) -> tuple[float, float]:
    reach = float(special.stdtrit(freedom, 0.5 + CONFIDENCE / 2)) * error
    return difference - reach, difference + reach


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct the p-values of one family by Holm's method: the chance of even one false mark stays below the level."""
    raw = np.asarray(p_values, dtype=float)
    order = np.argsort(raw, kind="stable")
    corrected = np.empty_like(raw)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(raw[order] * np.arange(raw.size, 0, -1)))
    return [float(p) for p in corrected]


@dataclass(frozen=True, slots=True)
class SortedPairs:
    """Scored (user, item) pairs of one run, sorted so that the AUC of any weighting of users is one cumulative sum.

    Build with `sort_pairs`. ``start`` and ``end`` say, for each positive, how many negatives score below it and how
    many score no higher: their mean counts a tie as half a win.
    """

    positive_user: NDArray[np.int64]
    negative_user: NDArray[np.int64]
    start: NDArray[np.int64]
    end: NDArray[np.int64]

    @property
    def size(self) -> int:
        """How many pairs there are."""
        return self.positive_user.size + self.negative_user.size


def sort_pairs(user: NDArray[np.int64], label: Floats, score: Floats) -> SortedPairs:
    """Sort ``[pairs]`` arrays once; `user` numbers the users from 0."""
    positive = label > 0
    negative_score = score[~positive]
    order = np.argsort(negative_score, kind="stable")
    ranked = negative_score[order]
    return SortedPairs(
        positive_user=user[positive],
        negative_user=user[~positive][order],
        start=np.searchsorted(ranked, score[positive], side="left"),
        end=np.searchsorted(ranked, score[positive], side="right"),
    )


def pooled_auc(pairs: SortedPairs, weights: Floats) -> float:
    """Return the AUC over all pairs when user `u` stands ``weights[u]`` times in the sample; NaN if a class is empty.

    A pair of a positive and a negative counts whether or not they belong to one user; ties count one half (midranks).
    """
    below = np.concatenate(([0.0], np.cumsum(weights[pairs.negative_user])))
    won = weights[pairs.positive_user]
    total = won.sum() * below[-1]
    return float(won @ (below[pairs.start] + below[pairs.end]) / 2 / total) if total > 0 else math.nan


def draw_users(n_users: int, n_pairs: int, seed: int) -> NDArray[np.uint16]:
    """Return ``[resamples, users]``: how often each user is drawn. The same seed and sizes give the same draw.

    Between 200 and 1000 resamples, fewer the more pairs there are.
    """
    resamples = int(min(1000, max(200, PAIR_BUDGET / max(1, n_pairs))))
    rng = np.random.default_rng(seed)
    draws = (np.bincount(rng.integers(0, n_users, n_users), minlength=n_users) for _ in range(resamples))
    return np.stack([draw.astype(np.uint16) for draw in draws])


def auc_replicates(runs: Sequence[SortedPairs], draws: NDArray[np.uint16]) -> Floats:
    """Return the pooled AUC in each draw, averaged over `runs` (the seeds of one row), as ``[resamples]``."""
    return np.array([np.mean([pooled_auc(pairs, draw.astype(np.float64)) for pairs in runs]) for draw in draws])


def estimate_auc(runs: Sequence[SortedPairs], replicates: Floats, n_users: int) -> Estimate:
    """Return the pooled AUC, averaged over `runs`, with the percentile interval of its replicates."""
    mean = float(np.mean([pooled_auc(pairs, np.ones(n_users)) for pairs in runs]))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.nanpercentile(replicates, [tail, 100 - tail])
    return Estimate(mean, float(low), float(high))


def compare_auc(difference: float, replicates: Floats, reference: Floats, n_users: int) -> Comparison:
    """Compare two rows' pooled AUC by replicates of the same draws of `n_users` users.

    The p-value is Student's of difference / bootstrap standard error: a share of a few hundred replicates could never
    be small enough to outlive Holm's correction. With n users the bootstrap's variance is (n - 1) / n of the true one,
    and the normal distribution's tails are too light: with 20 users 2 % of the tests of equal scorers came out at .01.
    """
    freedom = max(1, n_users - 1)
    error = float(np.nanstd(replicates - reference, ddof=1)) * math.sqrt((freedom + 1) / freedom)
    if error <= 1e-12:
        return Comparison(difference, (difference,) * 2, 1.0 if abs(difference) <= 1e-12 else 0.0, None)
    interval = _student_interval(difference, error, freedom)
    return Comparison(difference, interval, float(2 * stats.t.sf(abs(difference) / error, freedom)), None)
