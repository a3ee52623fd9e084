"""What a run has shown, user by user: its arrays, checked, aligned by raw user id and averaged over seeds.

From them come the metrics at every cut-off, the ranking metric by groups of users (new and known targets, popularity,
length of history, image or none), and what a model recommends beyond accuracy: how many of the items, how unevenly, how
popular ones. Groups are cut once for the whole table, so that all rows show the same users side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recbole_mllm.benchmark import significance as sig
from recbole_mllm.benchmark.leaderboard import Dimension
from recbole_mllm.benchmark.records import PAIR_COLUMNS, USER_COLUMNS, Arrays, RunRecord, read_arrays
from recbole_mllm.benchmark.significance import Estimate, Floats, SortedPairs
from recbole_mllm.common.errors import UserError
from recbole_mllm.evaluation.metrics import METRICS, popular_head

POOLED = "AUC"
CURVES = {metric.name: metric.gain for metric in METRICS if metric.gain is not None}
DEEPEST = 20  # cut-off of the curves
FEW = 30
"""Below this many users a group's mean is an anecdote, and the reports say so."""

BUDGET = 4e6  # drawn values a group: from 2000 users on, the normal interval does

Mask = NDArray[np.bool_]

DEPTH = 10


@dataclass(frozen=True, slots=True)
class Ranks:
    """``[users]`` ranks of the targets, 0 for the best, among at least `candidates` items each."""

    rank: NDArray[np.int64]
    candidates: int


@dataclass(frozen=True, slots=True)
class Recommended:
    """What one run recommends.

    Args:
        items: ``[users, DEPTH]`` places of the items in `counts`, best first; -1 where fewer were ranked.
        counts: ``[items]`` training interactions of every item that the model has read of.
        names: ``[items]`` their raw ids: models that read an ``.item`` file know items that nobody has met.
    """

    items: NDArray[np.int64]
    counts: NDArray[np.int64]
    names: NDArray[np.str_]

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
        best = rank < DEPTH
        sorter = np.argsort(names)
        items = np.full((n_users, DEPTH), -1)
        items[owner[best], rank[best]] = sorter[np.searchsorted(names, item[best_first][best], sorter=sorter)]
        return cls(items, counts, names)

    def times(self, users: Mask | slice) -> NDArray[np.int64]:
        """Return ``[items]`` how often each item is recommended to `users` ``[users]``."""
        items = self.items[users].ravel()
        return np.bincount(items[items >= 0], minlength=len(self.counts))

    def means(self, values: NDArray[Any]) -> Floats:
        """Return ``[users]`` the mean of ``[items]`` `values` over what each user is recommended."""
        there = self.items >= 0
        means: Floats = np.where(there, values[self.items], 0).sum(1) / np.maximum(1, there.sum(1))
        return means


@dataclass(frozen=True, slots=True)
class Evidence:
    """Per-user values of one row.

    Args:
        users: ``[users]`` raw ids, sorted; every array below follows this order.
        values: ``[users]`` floats for each per-user metric, averaged over the row's seeds.
        masks: ``[users]`` booleans for each slice.
        pairs: Scored pairs of each seed, for pooled AUC; empty where a run has none, or the best of all items alone.
        ranks: The targets' ranks in each seed; empty where a run does not show them.
        columns: ``[users]`` arrays that users are grouped by, `USER_COLUMNS`.
        best_alone: Whether the runs ranked all items and stored each user's best alone.
        recommended: Each user's best items in each seed; empty where a run did not record training counts.
    """

    users: NDArray[np.str_]
    values: Mapping[str, Floats]
    masks: Mapping[str, Mask]
    pairs: tuple[SortedPairs, ...] = ()
    ranks: tuple[Ranks, ...] = ()
    columns: Arrays = field(default_factory=dict)
    best_alone: bool = False
    recommended: tuple[Recommended, ...] = ()

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all metrics this evidence can give with an interval."""
        return (*self.values, POOLED) if self.pairs else tuple(self.values)

    def mean(self, metric: str, mask: Mask) -> float | None:
        """Return `metric` on the users in `mask`, or None where that is undefined."""
        if not mask.any():
            return None
        if metric != POOLED:
            return float(self.values[metric][mask].mean())
        mean = float(np.mean([sig.pooled_auc(pairs, mask.astype(np.float64)) for pairs in self.pairs]))
        return mean if np.isfinite(mean) else None


def load_evidence(record: RunRecord, results: Path) -> Evidence:
    """Read the arrays of one finished run; UserError names the run and what is wrong with them."""
    if record.per_user is None:
        raise UserError(f"run {record.run_id} has no per-user metrics; run it again with --force")
    arrays = read_arrays(results / record.per_user, USER_COLUMNS)
    users, order = np.unique(arrays["user"].astype(str), return_index=True)
    if users.size != arrays["user"].size:
        raise UserError(f"run {record.run_id} has users with several rows; evaluate one target a user")
    arrays = {name: values[order] for name, values in arrays.items()}
    values = {name: column.astype(np.float64) for name, column in arrays.items() if name not in USER_COLUMNS}
    odd = [name for name, column in values.items() if not np.isfinite(column).all()]
    if odd or not values:
        raise UserError(f"run {record.run_id}: {', '.join(odd) or 'no metric'} is not finite for every user")
    places = record.config.get("metric_decimal_place")
    rounded = 10.0 ** -int(4 if places is None else places) + 1e-6
    means = {name: float(column.mean()) for name, column in values.items()}
    other = [name for name, mean in means.items() if abs(record.metrics.get(name, mean) - mean) > rounded]
    if other:  # as after a run with --force that was killed between its arrays and its record
        raise UserError(f"run {record.run_id}: the users' {other[0]} are not its record's; run it again with --force")
    count = arrays["train_count"]
    masks = {"cold": count == 0, "warm": count > 0, "tail": arrays["tail"].astype(bool)}
    masks["new_user"] = arrays["history_length"] == 0
    evidence = Evidence(users, values, masks, columns={name: arrays[name] for name in USER_COLUMNS})
    if record.scores is None:
        return evidence
    arrays = read_arrays(results / record.scores, PAIR_COLUMNS)
    names, score = arrays["user"].astype(str), arrays["score"].astype(np.float64)
    index = np.minimum(np.searchsorted(users, names), users.size - 1)
    if not (users[index] == names).all():
        raise UserError(f"run {record.run_id}: its scores name users that its per-user metrics do not")
    if not np.isfinite(score).all():
        raise UserError(f"run {record.run_id}: some scores are not finite")
    label, best_alone = arrays["label"].astype(np.float64), "among" in arrays
    order = arrays.get("place", score)
    ranks = target_ranks(index, label, order, users.size)
    recommended: tuple[Recommended, ...] = ()
    if record.train_counts is not None:
        trained = read_arrays(results / record.train_counts, ("item", "count"))
        known = trained["item"].astype(str), trained["count"].astype(np.int64)
        recommended = (Recommended.of(index, arrays["item"].astype(str), order, users.size, *known),)
    pairs = () if best_alone else (sig.sort_pairs(index, label, score),)
    ranked = (ranks,) if ranks else ()
    return replace(evidence, pairs=pairs, ranks=ranked, best_alone=best_alone, recommended=recommended)


def average(seeds: Sequence[Evidence]) -> Evidence:
    """Average per-user values over seeds, so that a user stays one observation however many seeds there are."""
    first = seeds[0]
    shared = [name for name in first.values if all(name in seed.values for seed in seeds)]
    values = {name: np.mean([seed.values[name] for seed in seeds], axis=0) for name in shared}
    pairs = tuple(pairs for seed in seeds for pairs in seed.pairs) if all(seed.pairs for seed in seeds) else ()
    ranks = tuple(ranks for seed in seeds for ranks in seed.ranks) if all(seed.ranks for seed in seeds) else ()
    complete = all(seed.recommended for seed in seeds)
    recommended = tuple(run for seed in seeds for run in seed.recommended) if complete else ()
    return replace(first, values=values, pairs=pairs, ranks=ranks, recommended=recommended)


def target_ranks(user: NDArray[Any], label: NDArray[Any], order: NDArray[Any], n_users: int) -> Ranks | None:
    """Return where each user's target was ranked, or None where the arrays do not show it.

    They do not for users with several targets, nor where a target's score is tied and no places were stored.

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

    With one target a user, its rank says it all. The last k leaves one candidate out: with all of them every Hit is 1.
    """
    if not seeds:
        return {}
    k = np.arange(1, max(2, min(DEEPEST + 1, min(one.candidates for one in seeds))))
    rank = np.concatenate([one.rank for one in seeds])[:, None]
    return {name: tuple(((rank < k) * gain(rank)).mean(axis=0).tolist()) for name, gain in CURVES.items()}


@dataclass(frozen=True, slots=True)
class Partition:
    """A dimension and the ``[users]`` mask of each of its groups."""

    dimension: Dimension
    masks: tuple[Mask, ...]


def partitions(columns: Mapping[str, NDArray[Any]]) -> tuple[Partition, ...]:
    """Part the users by each of the four dimensions; groups without users are left out."""
    count, length, image = columns["train_count"], columns["history_length"], columns["has_image"].astype(bool)
    dimensions = (
        ("warmth", "Cold and warm targets", "cold: the target has no interaction in training",
         {"cold": count == 0, "warm": count > 0}),
        ("popularity", "Popularity of the target",
         "interactions of the target in training, tenths of the users; equal counts stay together", bands(count, 10)),
        ("history", "Length of the history",
         "interactions of the user in training, quarters of the users; equal lengths stay together", bands(length, 4)),
        ("image", "Image of the target", "whether the target has an image that can be read",
         {"with image": image, "without image": ~image}),
    )  # fmt: skip
    parts = []
    for key, title, meaning, groups in dimensions:
        masks = {label: mask for label, mask in groups.items() if mask.any()}
        counts = tuple(int(mask.sum()) for mask in masks.values())
        parts.append(Partition(Dimension(key, title, meaning, tuple(masks), counts), tuple(masks.values())))
    return tuple(parts)


def bands(values: NDArray[Any], parts: int) -> dict[str, Mask]:
    """Cut users into up to `parts` groups of about one size by `values`, lowest first; equal values share a group."""
    edges = np.unique(np.quantile(values, np.arange(1, parts) / parts, method="lower"))
    band = np.searchsorted(edges, values, side="left")
    masks: dict[str, Mask] = {}
    for number in np.unique(band):
        mask = band == number
        low, high = values[mask].min(), values[mask].max()
        masks[f"{low:,}" if low == high else f"{low:,}–{high:,}"] = mask
    return masks


def measure(values: Floats, partition: Partition) -> tuple[Estimate, ...]:
    """Return mean and 95 % interval of ``[users]`` `values` in each group."""
    return tuple(sig.estimate_means(values[mask][None], sig.DRAW_SEED, BUDGET)[0] for mask in partition.masks)


# ---- beyond accuracy: the ten best of what was ranked for a user, drawn candidates or all items


def recommendable(runs: Iterable[Recommended]) -> NDArray[np.str_]:
    """Return the raw ids of what any of `runs` has trained on or recommends: of these, coverage is a share."""
    pools = [run.names[(run.counts > 0) | (run.times(slice(None)) > 0)] for run in runs]
    return np.unique(np.concatenate(pools)) if pools else np.empty(0, np.str_)


def beyond_accuracy(runs: Sequence[Recommended], pool: NDArray[np.str_]) -> dict[str, Estimate]:
    """Return the measures `BEYOND` of a row, averaged over its `runs` (seeds), with 95 % intervals over users.

    Coverage and Gini's index are of all users together and have no value of a single one's: their intervals come from
    leaving out groups of users (jackknife). The bootstrap would draw users twice, who recommend nothing new twice.

    Args:
        runs: Of the same users, in the same order.
        pool: Raw ids of what could be recommended (`recommendable`, of the whole table).
    """

    insides = [np.isin(run.names, pool) for run in runs]

    def over(measured: Callable[[NDArray[np.int64]], float], users: Mask) -> float:
        times = (run.times(users)[inside] for run, inside in zip(runs, insides, strict=True))
        # an item that a model has never read of is recommended by it 0 times
        return float(np.mean([measured(np.pad(one, (0, len(pool) - len(one)))) for one in times]))

    found: dict[str, Estimate] = {}
    for name, (_, measured) in OF_ALL.items():
        share = sig.jackknife(partial(over, measured), len(runs[0].items), sig.DRAW_SEED)
        found[name] = replace(share, low=max(0.0, share.low), high=min(1.0, share.high))  # Student's has no bounds
    per_user = [[run.means(value(run.counts)) for run in runs] for _, value in OF_ITEMS.values()]
    return found | dict(zip(OF_ITEMS, sig.estimate_means(np.mean(per_user, axis=1), sig.DRAW_SEED), strict=True))


def coverage(times: NDArray[np.int64]) -> float:
    """Return the share of the items that is recommended at all."""
    return float((times > 0).mean())


def gini_index(times: NDArray[np.int64]) -> float:
    """Return Gini's index of how often each item is recommended (RecBole's GiniIndex, metrics.py:633)."""
    n, ordered = len(times), np.sort(times)
    return float(((2 * np.arange(1, n + 1) - n - 1) * ordered).sum() / (n * max(1, ordered.sum())))


OF_ALL: dict[str, tuple[str, Callable[[Any], Any]]] = {
    f"Coverage@{DEPTH}": ("share of the items that somebody is recommended", coverage),
    f"Gini@{DEPTH}": (
        "how unevenly recommendations fall on the items: 0 = all alike, 1 = one item has them all", gini_index),
}  # fmt: skip
"""What all users make together: its meaning, and a share from how often each item is recommended ``[items]``."""

OF_ITEMS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    f"Popularity@{DEPTH}": ("mean number of training interactions of what is recommended", lambda counts: counts),
    f"Tail@{DEPTH}": ("share of what is recommended that is in the long tail", lambda counts: ~popular_head(counts)),
}
"""A mean over what a user is recommended: its meaning, and each item's value ``[items]`` by training interactions."""

BEYOND = {name: meaning for name, (meaning, _) in (OF_ALL | OF_ITEMS).items()}
