"""From run records to a leaderboard people can defend.

Every number comes from the per-user arrays, never from rounded metrics, so whoever has the arrays can check it. The
best baseline is the one with the highest NDCG@10 on validation: chosen on the test split it would be the luckiest
there, and every test against it would be off. The other rows are tested against it, variants of MLLMMSR against the
full model; where seeds differ, on those that both have. All questions of the table form one family for Holm's
correction, two metrics with equal values for every user (Hit and Recall of one target) being one question: the chance
of even one false mark in the table is below 5 %.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recbole_mllm.benchmark import significance as sig
from recbole_mllm.benchmark.evidence import (
    POOLED,
    Evidence,
    Partition,
    average,
    beyond_accuracy,
    load_evidence,
    measure,
    metric_curves,
    partitions,
    recommendable,
)
from recbole_mllm.benchmark.leaderboard import (
    ALL_COSTS,
    SLICES,
    Leaderboard,
    LeaderboardRow,
    Part,
    Score,
    ordered_metrics,
)
from recbole_mllm.benchmark.records import RunRecord, latest, one_set_of_candidates
from recbole_mllm.benchmark.setups import ModelSetup, setup_of
from recbole_mllm.benchmark.significance import DRAW_SEED
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.model_names import is_same
from recbole_mllm.common.resources import MLLM
from recbole_mllm.demo.builtin import is_demo_world

NO_POOLED = (
    "AUC has no value here: it pools the scores of all users' pairs, and of a ranking of all items each user's best "
    "alone are stored (RecBole has none there either). GAUC is the mean of the users' own."
)


@dataclass(frozen=True, slots=True)
class Contender:
    """A model's finished runs, what each has shown and what they have shown together.

    `replicates` are those of pooled AUC, of `draws` of the users; None where no scores were saved.
    """

    name: str
    shown: tuple[tuple[RunRecord, Evidence], ...]
    draws: NDArray[np.uint16] | None
    evidence: Evidence
    replicates: sig.Floats | None

    @classmethod
    def of(cls, name: str, shown: Sequence[tuple[RunRecord, Evidence]], draws: NDArray[np.uint16] | None) -> Contender:
        """Average what the runs have shown, and draw the users again for pooled AUC."""
        evidence = average([one for _, one in shown])
        replicates = sig.auc_replicates(evidence.pairs, draws) if evidence.pairs and draws is not None else None
        return cls(name, tuple(shown), draws, evidence, replicates)

    @property
    def runs(self) -> tuple[RunRecord, ...]:
        """Its runs, one a seed."""
        return tuple(run for run, _ in self.shown)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of its runs, in their order."""
        return tuple(run.seed for run, _ in self.shown)

    def of_seeds(self, seeds: Collection[int]) -> Contender:
        """Return what the runs of `seeds` alone have shown."""
        if set(self.seeds) <= set(seeds):
            return self
        return Contender.of(self.name, [one for one in self.shown if one[0].seed in seeds], self.draws)


def build(records: Iterable[RunRecord], results: Path, note: str = "") -> Leaderboard:
    """Rank the latest record of every run; the arrays are read from below the folder `results`."""
    runs = _current(records)
    if not runs:
        raise UserError(f"{results} holds no run; start one with `benchmark --output_dir {results}`")
    one_set_of_candidates(run for run in runs if run.ok)
    loaded, failed = _load(runs, results)
    contenders = _contenders(loaded)
    known = {name for run, _ in loaded for name in run.metrics}
    known |= {name for contender in contenders for name in contender.evidence.metrics}
    absent = {POOLED: NO_POOLED} if any(evidence.best_alone for _, evidence in loaded) else {}
    metrics = ordered_metrics(known | set(absent))
    one = loaded[0][0] if loaded else runs[0]
    board = Leaderboard(
        one.dataset, one.protocol, one.candidates, one.n_users, metrics, (), None, note, absent=absent,
        future_share=next((run.future_share for run, _ in loaded if run.future_share is not None), None),
        is_demo=is_demo_world(Path(str(one.config.get("data_path", one.dataset)))),
        valid_metric=_ranking_metric(contenders, metrics),
    )  # fmt: skip
    parted = partitions(loaded[0][1].columns) if loaded else ()
    pool = recommendable(run for contender in contenders for run in contender.evidence.recommended)
    rows = [
        replace(
            _row(contender, metrics, parted, board.valid_metric),
            beyond=beyond_accuracy(contender.evidence.recommended, pool) if contender.evidence.recommended else {},
        )
        for contender in contenders
    ]
    rows = sorted(rows, key=lambda row: (-row.mean(board.valid_metric), row.model))
    rows, best, lacking = compare_rows(rows, contenders, board.valid_metric)
    return replace(
        board,
        rows=(*rows, *failed),
        best_baseline=best,
        without_validation=lacking,
        dimensions=tuple(p.dimension for p in parted),
    )


def _ranking_metric(contenders: Sequence[Contender], metrics: Sequence[str]) -> str:
    """Return the ``valid_metric`` of all runs, if users have values of it; else NDCG@10, or the first that there is."""
    named = {run.ranking_metric for one in contenders for run in one.runs if not run.fusion}
    choices = [*(named if len(named) == 1 else ()), "NDCG@10", *metrics]
    of_users = [name for name in metrics if all(name in one.evidence.values for one in contenders)]
    return next((name for name in choices if name in (of_users or metrics)), "NDCG@10")


def _current(records: Iterable[RunRecord]) -> list[RunRecord]:
    """Drop what was tried again: older records of a run, and failures of a (label, seed) that has finished since."""
    runs = latest(records).values()
    finished = [run for run in runs if run.ok]
    since = {(run.label, run.seed): run.started for run in sorted(finished, key=lambda run: run.started)}
    failed = [run for run in runs if not run.ok and not run.started <= since.get((run.label, run.seed), "")]
    failures = {(run.label, run.seed): run for run in failed}
    return sorted([*finished, *failures.values()], key=lambda run: (run.label, run.seed, run.run_id))


def _load(runs: Sequence[RunRecord], results: Path) -> tuple[list[tuple[RunRecord, Evidence]], list[LeaderboardRow]]:
    """Read each finished run; one whose arrays are unusable costs its own row and no other."""
    loaded: list[tuple[RunRecord, Evidence]] = []
    failed: list[LeaderboardRow] = []
    started = {run.run_id: run.started for run in runs}
    for run in runs:
        try:
            if not run.ok:
                raise UserError(run.status)
            if run.fusion and any(at != started.get(part) for part, at in run.fusion["parts"].items()):
                raise UserError("what it was made of has been run again since; run it again")
            evidence = load_evidence(run, results)
            if loaded and not np.array_equal(evidence.users, loaded[0][1].users):
                raise UserError(f"run {run.run_id} evaluated other users than {loaded[0][0].run_id}")
            loaded.append((run, evidence))
        except UserError as error:
            status = " ".join(str(error).split())
            failed.append(LeaderboardRow(run.label, run.kind, (run.seed,), status, (run,), cost=_cost([run])))
    return loaded, failed


def _contenders(loaded: Sequence[tuple[RunRecord, Evidence]]) -> list[Contender]:
    """Put the seeds of one model, configuration and weights together, and draw the users again for pooled AUC.

    The draws are the same for all rows, since only replicates of the same draws can be paired.
    """
    groups: dict[tuple[str, str], dict[int, tuple[RunRecord, Evidence]]] = defaultdict(dict)
    weights: dict[tuple[str, str], set[str]] = defaultdict(set)
    recorded: dict[tuple[str, str], set[str]] = {}  # of which models each run says the weights: earlier ones said less
    for run, _ in loaded:
        if run.weights:
            group = run.label, configuration(run.run_id)
            recorded[group] = recorded.get(group, set(run.weights)) & set(run.weights)
    for run, _ in loaded:
        group = run.label, configuration(run.run_id)
        weights[group] |= {_weights(run, recorded[group])} if run.weights else set()
    for run, evidence in loaded:
        variant = configuration(run.run_id)
        if len(weights[run.label, variant]) > 1:
            variant += f", weights {_weights(run, recorded.get((run.label, variant), set()))}"
        groups[run.label, variant][run.seed] = (run, evidence)
    pairs = max((pairs.size for _, evidence in loaded for pairs in evidence.pairs), default=0)
    draws = sig.draw_users(loaded[0][1].users.size, pairs, DRAW_SEED) if pairs else None
    setups = {group: setup_of([run for run, _ in seeds.values()]) for group, seeds in groups.items()}
    found = []
    for (label, variant), seeds in groups.items():
        same = {one: setup for (other, one), setup in setups.items() if other == label}
        name = f"{label} ({_apart(variant, same)})" if len(same) > 1 else label
        found.append(Contender.of(name, list(seeds.values()), draws))
    return found


def _apart(variant: str, setups: Mapping[str, ModelSetup | None]) -> str:
    """Return what tells a variant from the others of its label: what it is in words, its digest where that is alike."""
    words = {
        name: [part.rpartition("/")[2] for part in (*setup.short, *setup.rest)] if setup else []
        for name, setup in setups.items()
    }
    own = [part for part in words[variant] if not all(part in others for others in words.values())]
    alike = sum(others == words[variant] for others in words.values()) > 1
    return ", ".join([*own, *([variant] if alike or not own else [])])


def configuration(run_id: str) -> str:
    """Return the part of a run id that names its configuration whatever the seed: the digest after ``-<seed>-``."""
    found = re.search(r"-\d+-([0-9a-f]{8})$", run_id)
    return found[1] if found else ""


def _may_be_same(run: RunRecord, other: RunRecord) -> bool:
    """Return whether two runs may have asked the same weights; of earlier versions' it is not known."""
    both = ((run.weights[key], other.weights[key]) for key in run.weights.keys() & other.weights.keys())
    return all(is_same(one, two) or is_same(two, one) for one, two in both)


def _weights(run: RunRecord, models: Collection[str]) -> str:
    named = sorted((key, weights) for key, weights in run.weights.items() if key in models)
    return hashlib.sha256(repr(named).encode()).hexdigest()[:8]


def _row(contender: Contender, metrics: Sequence[str], parted: Sequence[Partition], valid: str) -> LeaderboardRow:
    """Measure one contender, still untested."""
    evidence, runs = contender.evidence, contender.runs
    estimates = dict(zip(evidence.values, sig.estimate_means(np.stack(list(evidence.values.values())), DRAW_SEED),
                         strict=True))  # fmt: skip
    if contender.replicates is not None:
        estimates[POOLED] = sig.estimate_auc(evidence.pairs, contender.replicates, evidence.users.size)
    scores = {name: Score(estimate.mean, (estimate.low, estimate.high)) for name, estimate in estimates.items()}
    for name in metrics:  # what has no value per user, such as coverage, is shown without an interval
        if name not in scores and all(name in run.metrics for run in runs):
            scores[name] = Score(float(np.mean([run.metrics[name] for run in runs])))
    seeds = tuple(run.seed for run in runs)
    slices = {
        name: {metric: Part(evidence.mean(metric, mask), int(mask.sum())) for metric in evidence.metrics}
        for name, mask in ((name, evidence.masks[name]) for name in SLICES)
    }
    groups = {part.dimension.key: measure(evidence.values[valid], part) for part in parted if valid in evidence.values}
    return LeaderboardRow(contender.name, runs[0].kind, seeds, "ok", runs, scores, _cost(runs), slices,
               metric_curves(evidence.ranks), groups)  # fmt: skip


def _cost(runs: Sequence[RunRecord]) -> dict[str, float | None]:
    """Average each cost over seeds; None where no run has recorded it."""
    recorded = {name: [float(value) for run in runs if (value := getattr(run, name)) is not None] for name in ALL_COSTS}
    return {name: sum(values) / len(values) if values else None for name, values in recorded.items()}


def compare_rows(
    rows: Sequence[LeaderboardRow], contenders: Sequence[Contender], metric: str
) -> tuple[list[LeaderboardRow], str | None, tuple[str, ...]]:
    """Return the rows with their tests, the best baseline, and the baselines that recorded no validation `metric`.

    Every metric of every row is tested against the row's reference, and corrected for all questions asked.
    """
    best, lacking = _best_baseline(rows, metric)
    by_name = {contender.name: contender for contender in contenders}
    references = {contender.name: _reference(contender, contenders, best) for contender in contenders}
    questions: dict[tuple[str, bytes], sig.Comparison] = {}
    asked: dict[tuple[str, str], tuple[str, bytes]] = {}
    compared: dict[str, tuple[Contender, Contender]] = {}
    for row in rows:
        if (reference := references[row.model]) is None:
            continue
        mine, theirs = compared[row.model] = _on_shared_seeds(by_name[row.model], by_name[reference])
        for name in row.scores:
            if (comparison := _compare(name, mine, theirs)) is not None:
                asked[row.model, name] = key = row.model, _question(name, mine.evidence, theirs.evidence)
                questions[key] = comparison
    corrected = dict(zip(questions, sig.holm([comparison.p for comparison in questions.values()]), strict=True))
    tested = {row.model: dict(row.scores) for row in rows}
    for (model, name), key in asked.items():
        found = questions[key]
        tested[model][name] = replace(
            tested[model][name], p=corrected[key], p_raw=found.p, effect=found.effect, difference=found.difference,
            difference_ci95=found.ci95,
        )  # fmt: skip
    done = [replace(row, scores=tested[row.model], tested_against=references[row.model]) for row in rows]
    for at, row in enumerate(done):
        if row.model in compared:
            mine, theirs = compared[row.model]
            apart = _apart_differences(metric, mine.evidence, theirs.evidence) if row.kind == "fused" else {}
            whole = set(row.seeds) == set(by_name[theirs.name].seeds)
            shared = tuple(seed for seed in mine.seeds if seed in theirs.seeds)
            done[at] = replace(row, apart=apart, tested_on=None if whole else shared)
    return done, best, lacking


def _on_shared_seeds(mine: Contender, theirs: Contender) -> tuple[Contender, Contender]:
    """Return two contenders of the seeds that both have; of all of each where they share none."""
    shared = set(mine.seeds) & set(theirs.seeds)
    return (mine.of_seeds(shared), theirs.of_seeds(shared)) if shared else (mine, theirs)


def _apart_differences(metric: str, mine: Evidence, theirs: Evidence) -> dict[str, sig.Estimate]:
    """Return the mean paired difference on cold and on warm targets with its 95 % interval, where there are any."""
    if metric not in mine.values or metric not in theirs.values:
        return {}
    found = {}
    for name, mask in mine.masks.items():
        if name in ("cold", "warm") and mask.any():
            compared = sig.compare_paired(mine.values[metric][mask], theirs.values[metric][mask])
            found[name] = sig.Estimate(compared.difference, *compared.ci95)
    return found


def _best_baseline(rows: Sequence[LeaderboardRow], metric: str) -> tuple[str | None, tuple[str, ...]]:
    """Return the baseline with the highest validation `metric`, and which baselines recorded none.

    Where some did not, validation cannot choose among all: the highest on the test split is taken, and reports say so.
    """
    baselines = [row for row in rows if row.kind == "baseline"]
    valid = {
        row.model: [run.valid[metric] for run in row.runs if run.valid and metric in run.valid] for row in baselines
    }
    lacking = tuple(row.model for row in baselines if len(valid[row.model]) < len(row.runs))
    means = {row.model: row.mean(metric) if lacking else sum(valid[row.model]) / len(row.runs) for row in baselines}
    return max(means, key=means.__getitem__, default=None), lacking


def _reference(contender: Contender, contenders: Sequence[Contender], best: str | None) -> str | None:
    """Return what a contender is tested against: the full model for a variant of MLLMMSR, else the best baseline.

    What is fused is tested against the baseline in it: so the table says what the MLLM adds to that. A full model of
    other weights is none; of several it is the one whose settings differ least from the variant's.
    """
    if fusion := contender.runs[0].fusion:
        parts = (one for one in contenders if any(run.run_id in fusion["parts"] for run in one.runs))
        return next((one.name for one in parts if one.runs[0].kind == "baseline"), None)
    config = contender.runs[0].config

    def differences(other: Contender) -> int:
        theirs = other.runs[0].config
        return sum(theirs.get(key) != config.get(key) for key in theirs.keys() | config.keys())

    full = [one for one in contenders if one.runs[0].label == MLLM and _may_be_same(one.runs[0], contender.runs[0])]
    if full and contender.runs[0].label.startswith(f"{MLLM}:"):
        return min(full, key=lambda one: (differences(one), one.name)).name
    return best if contender.name != best else None


def _question(metric: str, mine: Evidence, theirs: Evidence) -> bytes:
    """Return what tells one question about two rows from another: the values compared, not the metric's name."""
    if metric == POOLED:
        return POOLED.encode()
    return b"".join(hashlib.sha256(one.values[metric].tobytes()).digest() for one in (mine, theirs))


def _compare(metric: str, contender: Contender, reference: Contender) -> sig.Comparison | None:
    """Compare one metric on the same users, or return None where one side has no value per user."""
    if metric == POOLED and contender.replicates is not None and reference.replicates is not None:
        everyone = np.ones(reference.evidence.users.size, dtype=bool)
        mine, theirs = contender.evidence.mean(POOLED, everyone), reference.evidence.mean(POOLED, everyone)
        difference = (mine or 0.0) - (theirs or 0.0)
        return sig.compare_auc(difference, contender.replicates, reference.replicates, everyone.size)
    if metric not in contender.evidence.values or metric not in reference.evidence.values:
        return None
    return sig.compare_paired(contender.evidence.values[metric], reference.evidence.values[metric])
