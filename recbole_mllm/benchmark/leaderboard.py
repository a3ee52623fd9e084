"""The leaderboard as values: who did how well, how surely, at what cost, and for which items.

`ranking.build` makes one from run records; `report` writes it down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from recbole_mllm.benchmark.records import RunRecord

VALID_METRIC = "NDCG@10"
"""What rows are sorted by, and what makes a baseline the best one."""

LEVEL = 0.05
COSTS = ("summarize_s", "train_s", "score_s", "pairs_per_s", "peak_memory_mb")
COUNTS = ("tokens", "parameters_trained")
ALL_COSTS = ("summarize_s", "features_s", *COSTS[1:], *COUNTS)
"""Costs that the reports show; ``leaderboard.json`` keeps to its published `COSTS`."""

SECONDS = ("summarize_s", "features_s", "train_s", "score_s")
"""What a row's whole time is the sum of."""

SLICES = ("cold", "warm", "tail")
FAMILIES = ("NDCG", "Hit", "Recall", "MRR", "GAUC", "AUC")
CUTOFFS = ("10", "5", "3")


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one row; `p` is Holm-corrected, None for the best baseline and where there is nothing to test."""

    mean: float
    ci95: tuple[float, float] | None = None
    p: float | None = None
    effect: float | None = None
    difference: float | None = None

    @property
    def significant(self) -> bool:
        """Whether the difference to the best baseline may be claimed."""
        return self.p is not None and self.p < LEVEL


@dataclass(frozen=True, slots=True)
class Part:
    """A metric on some of the users; `mean` is None where there are none."""

    mean: float | None
    n: int


@dataclass(frozen=True, slots=True)
class GroupPart:
    """The ranking metric on one group of users, with its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Dimension:
    """One way to part the users: `key` finds a row's numbers, each of `labels` names a group of `counts` users."""

    key: str
    title: str
    told: str
    labels: tuple[str, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One model of the table: all its seeds that finished alike, or one seed that did not."""

    model: str
    kind: str
    seeds: tuple[int, ...]
    status: str
    runs: tuple[RunRecord, ...]
    scores: Mapping[str, Score] = field(default_factory=dict)
    cost: Mapping[str, float | None] = field(default_factory=dict)
    slices: Mapping[str, Mapping[str, Part]] = field(default_factory=dict)
    curves: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    groups: Mapping[str, tuple[GroupPart, ...]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the row has numbers."""
        return bool(self.scores)

    def mean(self, metric: str) -> float:
        """Return the row's mean, minus infinity where it has none, so that it sorts last."""
        return self.scores[metric].mean if metric in self.scores else float("-inf")

    @property
    def seconds(self) -> float:
        """What the row cost in all: summarising, making features, training and scoring."""
        return sum(self.cost.get(name) or 0.0 for name in SECONDS)


@dataclass(frozen=True, slots=True)
class Leaderboard:
    """All rows, best first, and what they were measured on."""

    dataset: str
    protocol: str
    candidates: str
    n_users: int
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    best_baseline: str | None
    note: str = ""
    dimensions: tuple[Dimension, ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict)
    """For each metric that people look for and that has no value under this protocol, a sentence that says why."""

    @property
    def valid_metric(self) -> str:
        """The metric that ranks: NDCG@10, or the first there is."""
        return VALID_METRIC if VALID_METRIC in self.metrics or not self.metrics else self.metrics[0]

    @property
    def costs(self) -> tuple[str, ...]:
        """The costs that the pages show: making features only where a row reads some."""
        reads = any(row.cost.get("features_s") is not None for row in self.rows)
        return tuple(name for name in ALL_COSTS if name != "features_s" or reads)

    def to_json(self) -> dict[str, Any]:
        """Return the published schema of ``leaderboard.json``; a failed row has the same keys with null values."""
        return {
            "dataset": self.dataset,
            "protocol": self.protocol,
            "candidates": self.candidates,
            "n_users": self.n_users,
            "metrics": list(self.metrics),
            "rows": [self._row_json(row) for row in self.rows],
        }

    def _row_json(self, row: Row) -> dict[str, Any]:
        scores = {name: row.scores.get(name) for name in self.metrics}
        empty = Part(None, 0)
        parts = {s: {m: row.slices.get(s, {}).get(m, empty) for m in self.metrics} for s in SLICES}
        return {
            "model": row.model,
            "seeds": list(row.seeds),
            "status": row.status,
            "metrics": {name: _score_json(score) for name, score in scores.items()},
            "cost": {name: row.cost.get(name) for name in COSTS},
            "slices": {s: {m: {"mean": p.mean, "n": p.n} for m, p in by.items()} for s, by in parts.items()},
        }


def _score_json(score: Score | None) -> dict[str, Any]:
    if score is None:
        return {"mean": None, "ci95": None, "p_vs_best_baseline": None}
    return {"mean": score.mean, "ci95": score.ci95 and list(score.ci95), "p_vs_best_baseline": score.p}


def ordered_metrics(names: set[str]) -> tuple[str, ...]:
    """Return metric names in reading order: by cut-off, then by family; those of nobody's knowledge last, by name."""

    def place(name: str) -> tuple[int, int, str]:
        family, _, cutoff = name.partition("@")
        at = CUTOFFS.index(cutoff) if cutoff in CUTOFFS else len(CUTOFFS)
        return at, FAMILIES.index(family) if family in FAMILIES else len(FAMILIES), name

    return tuple(sorted(names, key=place))
