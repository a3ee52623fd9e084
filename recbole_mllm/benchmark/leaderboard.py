"""The leaderboard as values: who did how well, how surely, at what cost, and for which items.

`ranking.build` makes one from run records; `report` writes it down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from recbole_mllm.benchmark.records import RunRecord
from recbole_mllm.benchmark.setups import ModelSetup, setup_of
from recbole_mllm.benchmark.significance import Estimate
from recbole_mllm.evaluation.metrics import METRICS

LEVEL = 0.05
ALL_COSTS = {
    "load_s": "Load", "summarize_s": "Summarise", "features_s": "Features", "train_s": "Train", "score_s": "Score",
    "pairs_per_s": "Pairs/s", "peak_memory_mb": "Memory MB", "energy_kwh": "Energy kWh",
    "tokens": "Tokens", "parameters_trained": "Parameters",
}  # fmt: skip
"""Costs that the reports show, with their titles."""

COUNTS = ("tokens", "parameters_trained")
COSTS = [name for name in ALL_COSTS if name not in ("features_s", *COUNTS)]
"""Costs in the published schema of ``leaderboard.json``."""

SLICES = {
    "cold": ("Cold", "the target item has no interaction in training"),
    "warm": ("Warm", "the target item has at least one interaction in training"),
    "tail": ("Long tail", "the target item is in the long tail of popularity"),
    "new_user": ("New user", "the user has no interaction in training"),
}
"""Slices of the users, with title and meaning."""


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one row; `p` is `p_raw` after Holm's correction, both None where there is nothing to test."""

    mean: float
    ci95: tuple[float, float] | None = None
    p: float | None = None
    p_raw: float | None = None
    effect: float | None = None
    difference: float | None = None
    difference_ci95: tuple[float, float] | None = None

    @property
    def significant(self) -> bool:
        """Whether the difference to the row it is tested against may be claimed."""
        return self.p is not None and self.p < LEVEL


@dataclass(frozen=True, slots=True)
class Part:
    """A metric on some of the users; `mean` is None where there are none."""

    mean: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Dimension:
    """One way to part the users: `key` finds a row's numbers, each of `labels` names a group of `counts` users."""

    key: str
    title: str
    meaning: str
    labels: tuple[str, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LeaderboardRow:
    """One model of the table: all its seeds that finished alike, or one seed that did not.

    `tested_against` names the row that its scores are tested against: the best baseline or, for a variant of MLLMMSR,
    the full model; None where there is none. `tested_on` are the seeds that both have, where others are in one of them:
    tests are on these alone (on all of each if there are none). `apart` is a fused row's difference to it, by slice.
    """

    model: str
    kind: str
    seeds: tuple[int, ...]
    status: str
    runs: tuple[RunRecord, ...]
    scores: Mapping[str, Score] = field(default_factory=dict)
    cost: Mapping[str, float | None] = field(default_factory=dict)
    slices: Mapping[str, Mapping[str, Part]] = field(default_factory=dict)
    curves: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    groups: Mapping[str, tuple[Estimate, ...]] = field(default_factory=dict)
    beyond: Mapping[str, Estimate] = field(default_factory=dict)
    tested_against: str | None = None
    tested_on: tuple[int, ...] | None = None
    apart: Mapping[str, Estimate] = field(default_factory=dict)

    @property
    def setup(self) -> ModelSetup | None:
        """Which models the row asks, and how; None of a plain baseline."""
        return setup_of(self.runs)

    @property
    def converged(self) -> bool | None:
        """Whether validation had stopped rising in all seeds; None where that is no question, or was not recorded."""
        known = [run.converged for run in self.runs if run.converged is not None]
        return all(known) if known else None

    @property
    def summarize_reused(self) -> int:
        """How many summaries no run of the row wrote itself, all seeds together."""
        return sum(run.summarize_reused for run in self.runs)

    @property
    def fusions(self) -> list[Mapping[str, Any]]:
        """How each seed's scores were fused; empty of a row that is no ``A+B``."""
        return [{"seed": run.seed, **run.fusion} for run in self.runs if run.fusion]

    @property
    def full_ranking(self) -> dict[str, Any] | None:
        """The mean metrics of ranking all items beside drawn candidates, for how many users, and of which retriever.

        None unless all seeds have them.
        """
        found = [run.full_ranking for run in self.runs if run.full_ranking]
        if not found or len(found) < len(self.runs):
            return None
        names = [name for name in found[0]["metrics"] if all(name in one["metrics"] for one in found)]
        retrievals = [one["retrieval"] for one in found if one["retrieval"]]
        return {
            "metrics": {name: sum(one["metrics"][name] for one in found) / len(found) for name in names},
            "n_users": found[0]["n_users"],
            "retrieval": retrievals[0] | {"recall": sum(one["recall"] for one in retrievals) / len(retrievals)}
            if retrievals
            else None,
        }

    @property
    def ok(self) -> bool:
        """Whether the row has numbers."""
        return bool(self.scores)

    def mean(self, metric: str) -> float:
        """Return the row's mean, minus infinity where it has none, so that it sorts last."""
        return self.scores[metric].mean if metric in self.scores else float("-inf")

    @property
    def seconds(self) -> float:
        """What the row cost in all."""
        return sum(self.cost.get(name) or 0.0 for name in ("summarize_s", "features_s", "train_s", "score_s"))


@dataclass(frozen=True, slots=True)
class Leaderboard:
    """All rows, best first, and what they were measured on.

    `future_share` is the share of test targets with later interactions in training; None where no run can say.

    `memory` is what each of its models is known to know of the dataset without a history (`probe-memory`), by identity.
    `is_demo` says whether the dataset is a demo world, which the bundled model was made for.

    `valid_metric` sorts the rows (on the test split), and makes a baseline the best one (on validation).

    `without_validation` are baselines that recorded no validation metric: where there are some, the best one was chosen
    on the test split. `absent` says of each expected metric without a value under this protocol why it has none.
    """

    dataset: str
    protocol: str
    candidates: str
    n_users: int
    metrics: tuple[str, ...]
    rows: tuple[LeaderboardRow, ...]
    best_baseline: str | None
    note: str = ""
    valid_metric: str = "NDCG@10"
    without_validation: tuple[str, ...] = ()
    dimensions: tuple[Dimension, ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict)
    future_share: float | None = None
    is_demo: bool = False
    memory: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def slices(self) -> dict[str, tuple[str, str]]:
        """The slices that the pages show: of new users only where there are some."""
        there = any(self.slice_of(row, "new_user", self.valid_metric).n for row in self.rows)
        return {name: words for name, words in SLICES.items() if there or name != "new_user"}

    @property
    def costs(self) -> tuple[str, ...]:
        """The costs that the pages show: loading, making features and energy only where a row tells them."""
        known = {name for row in self.rows for name, value in row.cost.items() if value is not None}
        return tuple(name for name in ALL_COSTS if name in known or name not in ("load_s", "features_s", "energy_kwh"))

    @property
    def short_metrics(self) -> list[str]:
        """The metrics that fit a terminal or a page of LaTeX, or the first seven."""
        short = {f"{metric.name}@{cut}".rstrip("@") for metric in METRICS for cut in metric.short}
        return [name for name in self.metrics if name in short] or list(self.metrics[:7])

    @property
    def ranked(self) -> list[LeaderboardRow]:
        """The rows that have numbers, best first."""
        return [row for row in self.rows if row.ok]

    @property
    def variants(self) -> list[LeaderboardRow]:
        """The rows that are tested against a full model rather than the best baseline."""
        return [row for row in self.rows if row.tested_against not in (None, self.best_baseline) and not row.fusions]

    @property
    def fused(self) -> list[LeaderboardRow]:
        """The rows ``A+B`` that have numbers."""
        return [row for row in self.ranked if row.fusions]

    @property
    def out_of_place(self) -> tuple[str, ...]:
        """The rows that ask the bundled test model about something else than the demo it was made for."""
        return tuple(row.model for row in self.ranked if not self.is_demo and row.setup and row.setup.is_tiny)

    @property
    def chosen_on(self) -> str:
        """The split whose metric made a baseline the best one."""
        return "test" if self.without_validation else "validation"

    @property
    def not_converged(self) -> tuple[str, ...]:
        """The rows whose training ended while validation was still rising."""
        return tuple(row.model for row in self.rows if row.ok and row.converged is False)

    def slice_of(self, row: LeaderboardRow, name: str, metric: str) -> Part:
        """Return `metric` of one row on one slice of the users."""
        return row.slices.get(name, {}).get(metric, Part(None, 0))

    def p_vs_best_baseline(self, row: LeaderboardRow, metric: str) -> float | None:
        """Return the corrected p-value of a row's `metric` where it is one against the best baseline."""
        score = row.scores.get(metric)
        return score.p if score is not None and row.tested_against == self.best_baseline else None

    def to_json(self) -> dict[str, Any]:
        """Return the published schema of ``leaderboard.json``; a failed row has the same keys with null values.

        What only some records tell stands where they do: ``future_share``, the slice ``new_user``, ``setup``,
        ``full_ranking``, ``beyond`` and ``energy_kwh``.
        """
        about = ["dataset", "protocol", "candidates", "n_users", "metrics", "best_baseline"]
        if self.future_share is not None:
            about.insert(2, "future_share")
        return {name: getattr(self, name) for name in about} | {
            "best_baseline_chosen_on": self.chosen_on if self.best_baseline else None,
            "rows": [
                {name: getattr(row, name) for name in ("model", "seeds", "status", "tested_against")}
                | {
                    "metrics": {name: self._score_json(row, name) for name in self.metrics},
                    "converged": row.converged,
                    "summarize_reused": row.summarize_reused,
                    "cost": {n: row.cost.get(n) for n in COSTS if n != "energy_kwh" or row.cost.get(n) is not None},
                    "slices": {s: {m: asdict(self.slice_of(row, s, m)) for m in self.metrics} for s in self.slices},
                }
                | {name: value for name, value in self._optional_json(row).items() if value}
                for row in self.rows
            ],
        }

    def _optional_json(self, row: LeaderboardRow) -> dict[str, Any]:
        beyond = {name: {"mean": one.mean, "ci95": (one.low, one.high)} for name, one in row.beyond.items()}
        setup = row.setup and row.setup.to_json()
        return {"setup": setup, "full_ranking": row.full_ranking, "beyond": beyond, "fusion": row.fusions}

    def _score_json(self, row: LeaderboardRow, metric: str) -> dict[str, Any]:
        score = row.scores.get(metric)
        return {
            "mean": score and score.mean,
            "ci95": score and score.ci95,
            "p_vs_best_baseline": self.p_vs_best_baseline(row, metric),
            "p_raw": score and score.p_raw,
            "p_holm": score and score.p,
        }


def ordered_metrics(names: set[str]) -> tuple[str, ...]:
    """Return metric names in reading order: by cut-off, then as in `METRICS`; those not there last, by name."""
    cutoffs, families = ["10", "5", "3"], [metric.name for metric in METRICS]

    def place(name: str) -> tuple[int, int, str]:
        family, _, cutoff = name.partition("@")
        return [*cutoffs, cutoff].index(cutoff), [*families, family].index(family), name

    return tuple(sorted(names, key=place))
