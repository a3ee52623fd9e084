"""What a run has shown, user by user: its arrays, checked, aligned by raw user id and averaged over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recbole_mllm.benchmark.curves import Ranks, target_ranks
from recbole_mllm.benchmark.records import PAIR_COLUMNS, USER_COLUMNS, Arrays, RunRecord, read_arrays
from recbole_mllm.errors import UserError
from recbole_mllm.evaluation.significance import Floats, Pairs, pooled_auc, sort_pairs

POOLED = "AUC"


@dataclass(frozen=True, slots=True)
class Evidence:
    """Per-user values of one row.

    Args:
        users: ``[users]`` raw ids, sorted; every array below follows this order.
        values: ``[users]`` floats for each per-user metric, averaged over the row's seeds.
        masks: ``[users]`` booleans for each slice.
        pairs: Scored pairs of each seed, for pooled AUC; empty where a run kept none, or the best of all items alone.
        ranks: The targets' ranks in each seed; empty where a run does not tell them.
        best_alone: Whether the runs ranked all items and kept each user's best alone.
        columns: ``[users]`` arrays that users are grouped by, `USER_COLUMNS`.
    """

    users: NDArray[np.str_]
    values: Mapping[str, Floats]
    masks: Mapping[str, NDArray[np.bool_]]
    pairs: tuple[Pairs, ...] = ()
    ranks: tuple[Ranks, ...] = ()
    columns: Arrays = field(default_factory=dict)
    best_alone: bool = False

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all metrics this evidence can give with an interval."""
        return (*self.values, POOLED) if self.pairs else tuple(self.values)

    def mean(self, metric: str, mask: NDArray[np.bool_]) -> float | None:
        """Return `metric` on the users in `mask`, or None where that is undefined."""
        if not mask.any():
            return None
        if metric != POOLED:
            return float(self.values[metric][mask].mean())
        mean = float(np.mean([pooled_auc(pairs, mask.astype(np.float64)) for pairs in self.pairs]))
        return mean if np.isfinite(mean) else None


def load_evidence(record: RunRecord, results: Path) -> Evidence:
    """Read the arrays of one finished run; UserError names the run and what is wrong with them."""
    if record.per_user is None:
        raise UserError(f"run {record.run_id} kept no per-user metrics; run it again with --force")
    arrays = read_arrays(results / record.per_user, USER_COLUMNS)
    users, order = np.unique(arrays["user"].astype(str), return_index=True)
    if users.size != arrays["user"].size:
        raise UserError(f"run {record.run_id} has users with several rows; evaluate one target a user")
    arrays = {name: values[order] for name, values in arrays.items()}
    values = {name: column.astype(np.float64) for name, column in arrays.items() if name not in USER_COLUMNS}
    odd = [name for name, column in values.items() if not np.isfinite(column).all()]
    if odd or not values:
        raise UserError(f"run {record.run_id}: {', '.join(odd) or 'no metric'} is not finite for every user")
    known = {name: arrays[name] for name in USER_COLUMNS}
    pairs, ranks, best_alone = _load_scores(record, results, users)
    return Evidence(users, values, slice_masks(arrays), pairs, ranks, known, best_alone)


def slice_masks(arrays: Arrays) -> dict[str, NDArray[np.bool_]]:
    """Return each slice of the users, by the target's history in training."""
    return {
        "cold": np.asarray(arrays["train_count"] == 0),
        "warm": np.asarray(arrays["train_count"] > 0),
        "tail": arrays["tail"].astype(bool),
    }


def average(seeds: Sequence[Evidence]) -> Evidence:
    """Average per-user values over seeds, so that a user stays one observation however many seeds there are."""
    first = seeds[0]
    shared = [name for name in first.values if all(name in seed.values for seed in seeds)]
    values = {name: np.mean([seed.values[name] for seed in seeds], axis=0) for name in shared}
    complete = all(seed.pairs for seed in seeds)
    pairs = tuple(pairs for seed in seeds for pairs in seed.pairs) if complete else ()
    ranks = tuple(ranks for seed in seeds for ranks in seed.ranks) if all(seed.ranks for seed in seeds) else ()
    return Evidence(first.users, values, first.masks, pairs, ranks, first.columns, first.best_alone)


def _load_scores(
    record: RunRecord, results: Path, users: NDArray[np.str_]
) -> tuple[tuple[Pairs, ...], tuple[Ranks, ...], bool]:
    if record.scores is None:
        return (), (), False
    arrays: Mapping[str, NDArray[Any]] = read_arrays(results / record.scores, PAIR_COLUMNS)
    names = arrays["user"].astype(str)
    index = np.minimum(np.searchsorted(users, names), users.size - 1)
    score = arrays["score"].astype(np.float64)
    if not (users[index] == names).all():
        raise UserError(f"run {record.run_id}: its scores name users that its per-user metrics do not")
    if not np.isfinite(score).all():
        raise UserError(f"run {record.run_id}: some scores are not finite")
    label = arrays["label"].astype(np.float64)
    ranks = target_ranks(index, label, arrays.get("place", score), users.size)
    best_alone = "among" in arrays
    pairs = () if best_alone else (sort_pairs(index, label, score),)
    return pairs, (ranks,) if ranks is not None else (), best_alone
