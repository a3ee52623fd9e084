"""How the reports say numbers: one wording for every form, so that they cannot disagree."""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import PurePath
from typing import Any, NamedTuple

import yaml

from recbole_mllm.benchmark.evidence import BEYOND
from recbole_mllm.benchmark.leaderboard import COUNTS, LEVEL, Leaderboard, LeaderboardRow
from recbole_mllm.benchmark.records import RunRecord, plain_json
from recbole_mllm.benchmark.variants import part_of

MARKS = {"better": "▲", "worse": "▼", "n.s.": "n.s.", "reference": "ref.", "": ""}
WORDS = {"better": "better", "worse": "worse", "n.s.": "not significant", "reference": "", "": ""}
NOTHING = "–"
NOT_CONVERGED = "‡"

METHOD = (
    "Intervals are 95 % bootstrap intervals over users; metrics are averaged over a user's seeds first. Tests are "
    "paired over users, two-sided: a t-test of the per-user differences and, for pooled AUC, one with the standard "
    "error of a bootstrap that draws whole users (cluster bootstrap). All p-values of the table are corrected together "
    "by Holm's method, so the chance that it holds even one false mark about these trained models is below 5 %; "
    "metrics that are equal for every user, as Hit and Recall are with one target, are one question and counted once. "
    "The effect size is Cohen's d_z, the mean of the per-user differences over their standard deviation; pooled AUC "
    "has no per-user value and so none."
)
USES_NOTE = (
    "From each variant one part of MLLM-MSR was taken, or it was replaced by something wrong, in training and scoring. "
    "The numbers are the paired difference to the full model, its 95 % interval, and p after the correction for all "
    "questions of the table. Not significant means that these users show no difference, not that there is none: the "
    "interval says how large a one they leave open."
)
COST_NOTE = (
    "Train is without validation and test; a dash there means that nothing was trained. Tokens are those of the "
    "prompts scored; parameters are those trained, not those of a frozen backbone. Memory is the GPU's where there is "
    "one, else the process's. Item features and a retriever are made once for all runs that share them, and count in "
    "full in each."
)


class ScoreText(NamedTuple):
    """One metric of one row in words; `highest` where no row has a higher mean."""

    mean: str = NOTHING
    interval: str = ""
    verdict: str = ""
    mark: str = ""
    word: str = ""
    p: str = ""
    p_raw: str = ""
    effect: str = NOTHING
    difference: str = NOTHING
    highest: bool = False


def score_text(board: Leaderboard, row: LeaderboardRow, metric: str) -> ScoreText:
    """Put one metric of one row into words; dashes where there is none."""
    score = row.scores.get(metric)
    if score is None:
        return ScoreText()
    if score.difference is None:
        verdict = "reference" if row.model == board.best_baseline else ""
    elif score.significant:
        verdict = "better" if score.difference > 0 else "worse"
    else:
        verdict = "n.s."
    return ScoreText(
        mean=f"{score.mean:.3f}",
        interval=f"[{score.ci95[0]:.3f}, {score.ci95[1]:.3f}]" if score.ci95 else "",
        verdict=verdict,
        mark=MARKS[verdict],
        word=WORDS[verdict],
        p=_p(score.p),
        p_raw=_p(score.p_raw),
        effect=NOTHING if score.effect is None else f"{score.effect:+.2f}",
        difference=NOTHING if score.difference is None else f"{score.difference:+.3f}",
        highest=score.mean == max(other.mean(metric) for other in board.rows),
    )


def _p(p: float | None) -> str:
    """Return ``p < .001`` or ``p = .012``."""
    if p is None:
        return ""
    return "p < .001" if p < 0.001 else f"p = {p:.3f}".replace("0.", ".", 1)


def seconds_text(seconds: float | None) -> str:
    """Return a duration in the unit a person would use."""
    if seconds is None:
        return NOTHING
    divisor, unit = (1, "s") if seconds < 100 else (60, "min") if seconds < 6000 else (3600, "h")
    number = seconds / divisor
    return f"{number:.0f} {unit}" if number >= 10 else f"{number:.2g} {unit}"


def cost_text(row: LeaderboardRow, name: str) -> str:
    """Put one cost of a row into words; summaries that other runs have written are marked, see `cost_notes`."""
    value = row.cost.get(name)
    if value is None:
        return NOTHING
    if name in COUNTS:
        return f"{value / 1e6:,.1f} M" if value >= 1e6 else f"{value:,.0f}"
    if name == "energy_kwh":
        return f"{value:.3g}"
    if name in ("pairs_per_s", "peak_memory_mb"):
        return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
    return seconds_text(value) + ("*" if name == "summarize_s" and row.summarize_reused else "")


def reused_note(board: Leaderboard) -> str:
    """Explain the star of `cost_text`, where there is one."""
    if not any(row.summarize_reused for row in board.ranked):
        return ""
    return "* Some of these summaries were in the store already; they are priced by what they took then."


def cost_notes(board: Leaderboard) -> str:
    """Say what the costs of this table hold."""
    notes = [COST_NOTE]
    if reused := reused_note(board):
        notes.append(reused)
    if parts := sorted({run.energy_of for row in board.ranked for run in row.runs if run.energy_of}):
        notes.append(
            f"Energy is what the meters of the whole machine ({_and(parts)}) have read from a run's start to its end, "
            "by codecarbon; what it would estimate is left out."
        )
    if searches := [_search(run) for row in board.ranked for run in row.runs if run.tuning]:
        notes.append(f"Trials of --tune, on validation, which Train does not include: {'; '.join(searches)}.")
    if old := [row.model for row in board.ranked if any(run.valid is None for run in row.runs)]:
        notes.append(
            f"Recorded by an earlier version, whose Train includes validation and Summarise loading: {_and(old)}."
        )
    return " ".join(notes)


def _search(run: RunRecord) -> str:
    """Say what ``--tune`` chose for a run; its first trial is that of the defaults."""
    found = run.tuning or {}
    default, chosen = found["trials"][0], found["chosen"]
    best = next(trial["valid"] for trial in found["trials"] if trial["settings"] == chosen)
    settings = ", ".join(f"{key} {value}" for key, value in chosen.items()) or "the defaults"
    before = f" (the defaults {default['valid']:.3f})" if chosen and default["valid"] is not None else ""
    return (
        f"{run.label} seed {run.seed}, {len(found['trials'])} in {seconds_text(found['seconds'])}: {settings} with "
        f"{found['metric']} {best:.3f}{before}"
    )


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def banner(board: Leaderboard) -> str:
    """Say what the bundled model is, where a row asks it about other items than the demo's; else ""."""
    if not board.out_of_place:
        return ""
    rows = "the row" if len(board.out_of_place) == 1 else "the rows"
    say = "says" if len(board.out_of_place) == 1 else "say"
    return (
        f"tiny is a test model of 2.7 M parameters that has never seen these items: {rows} {_and(board.out_of_place)} "
        f"{say} nothing about MLLM-MSR. For a result, set mllm to a real model (docs/backbones.md)."
    )


def notes(board: Leaderboard) -> str:
    """Return what is said of the data, and of what the models know of it; "" for nothing."""
    return " ".join(filter(None, [board.note, *(str(known["verdict"]) for known in board.memory.values())]))


def finding(board: Leaderboard) -> str:
    """Say in one or two sentences what the table shows, and no more than it shows."""
    if not board.ranked:
        return "No run has finished, so there is nothing to rank."
    metric, top, best = board.valid_metric, board.ranked[0], board.best_baseline
    said = [f"{top.model} has the highest {metric}, {score_text(board, top, metric).mean}."]
    rival = next((row for row in board.ranked if row.kind == "mllm" and row.tested_against == best), None)
    if best is None or rival is None:
        return said[0]
    text = score_text(board, rival, metric)
    on = f", on seed {_and([str(seed) for seed in rival.tested_on])} alone" if rival.tested_on else ""
    if side := {"better": "above", "worse": "below"}.get(text.verdict):
        amount = text.difference.lstrip("+-")
        said.append(f"{rival.model} is {amount} {side} the best baseline, {best}: significant ({text.p}{on}).")
    else:
        tested = f"not significant ({text.p}{on})" if text.p else "not tested"
        said.append(f"{rival.model} differs from the best baseline, {best}, by {text.difference}: {tested}.")
    unfinished = [name for name in (rival.model, best) if name in board.not_converged]
    return " ".join(said + ([f"{_and(unfinished)} had not converged."] if unfinished else []))


def added(board: Leaderboard) -> list[str]:
    """Say of each fused row what the MLLM adds to its baseline, and how the two were put together."""
    return [_added(board, row) for row in board.fused]


def _added(board: Leaderboard, row: LeaderboardRow) -> str:
    metric, (mllm, _, baseline) = board.valid_metric, row.runs[0].label.partition("+")
    text, how = score_text(board, row, metric), _fused(row, mllm, baseline)
    other = next((one for one in board.ranked if one.model == row.tested_against), None)
    if other is None:
        return f"{row.model}: {how}"
    verdict = {"better": "significant", "worse": "significantly worse"}.get(text.verdict, "not significant")
    apart = [
        f"{_signed(one.mean)}{_within((one.low, one.high) if board.slice_of(row, name, metric).n > 1 else None)} "
        f"on {name} targets"
        for name, one in row.apart.items()
    ]
    shown = _within(row.scores[metric].difference_ci95)
    means = f"{row.model} {text.mean}, {other.model} {score_text(board, other, metric).mean}"
    if row.tested_on:
        means = f"on seed {_and([str(seed) for seed in row.tested_on])} alone, of all seeds {means}"
    return (
        f"What {mllm} adds to {baseline}: {text.difference.replace('-', '−')} {metric}{shown}, {verdict} "
        f"(paired, {text.p or 'not tested'}); {means}; {_and(apart)}. {how}"
    )


def _within(interval: tuple[float, float] | None) -> str:
    return f" [{_signed(interval[0])}, {_signed(interval[1])}]" if interval else ""


def _fused(row: LeaderboardRow, mllm: str, baseline: str) -> str:
    """Say how each seed's scores were fused, seeds of one way together."""
    guard = "was taken alone, as no mixture was ahead of it by two standard errors on validation"
    ways = {
        "mixture": f"the mixture that validation chose, α being {mllm}'s share",
        "first": f"{mllm} {guard}",
        "second": f"{baseline} {guard}",
        "second, unknown items by the first": f"{baseline} {guard}, but items it has not met are placed by {mllm}",
    }
    said = []
    for chosen in dict.fromkeys(str(fusion["chosen"]) for fusion in row.fusions):
        own = [fusion for fusion in row.fusions if fusion["chosen"] == chosen]
        shares = ", ".join(f"α = {fusion['alpha']:.1f} and ρ = {fusion['rho']:.2f}" for fusion in own)
        seeds_of = ", ".join(str(fusion["seed"]) for fusion in own)
        said.append(f"Seed {seeds_of}: {ways[chosen]} ({shares}).")
    return " ".join(said)


def future_text(board: Leaderboard) -> str:
    """Say how far training has seen the future of what is asked."""
    if board.future_share is None:
        return "future_share unknown: no times that compare across users, or runs of an earlier version"
    share = f"future_share {board.future_share:.3f}"
    if board.future_share == 0:
        return f"{share}: no test target has a later interaction in training"
    part = f"{board.future_share:.1%}".replace("%", " %")
    whose = "the test targets of all users" if "a seeded sample of" in board.protocol else "the test targets"
    return f"{share}: training has interactions, of any user, that are later than {part} of {whose}"


class Use(NamedTuple):
    """What a variant of the full model shows of the part that it takes away; `verdict` is what the part does."""

    variant: str
    tested_against: str
    metric: str
    difference: float
    ci95: tuple[float, float]
    p_raw: float
    p_holm: float
    verdict: str
    sentence: str


def uses(board: Leaderboard) -> list[Use]:
    """Return what the variants of MLLMMSR show of what the full model uses, by the ranking metric, worst losses first.

    A difference that is not significant supports no more than that these users do not show one.
    """
    found = []
    for row in board.variants:
        score = row.scores.get(board.valid_metric)
        if score is None or score.difference is None or score.difference_ci95 is None:
            continue
        verdict, does = "n.s.", f"is not shown to matter by these {board.n_users:,} users"
        if score.significant:
            verdict, does = ("matters", "matters here") if score.difference < 0 else ("harms", "does harm here")
        low, high = score.difference_ci95
        tested = _p(score.p) if score.significant else f"n.s. ({_p(score.p)})"
        numbers = f"{_signed(score.difference)} [{_signed(low)}, {_signed(high)}], {tested}"
        sentence = f"{part_of(row.runs[0].label)} {does}: {numbers}."
        found.append(
            Use(
                row.model, str(row.tested_against), board.valid_metric, score.difference, score.difference_ci95,
                float(score.p_raw or 0), float(score.p or 0), verdict, sentence,
            )
        )  # fmt: skip
    return sorted(found, key=lambda use: use.difference)


class FullRanking(NamedTuple):
    """A row's ranking metric over drawn candidates and over all items, in words, and of what the latter is."""

    model: str
    drawn: str
    full: str
    of: str


def full_rankings(board: Leaderboard) -> list[FullRanking]:
    """Return the rows that ranked all items beside drawn candidates, best among all items first."""
    metric, found = board.valid_metric, []
    for row in board.ranked:
        ranked = row.full_ranking
        if ranked is None or metric not in ranked["metrics"]:
            continue
        of, retrieval = f"{ranked['n_users']:,} users", ranked["retrieval"]
        if retrieval:
            items = "all items" if retrieval["retriever"] is None else _retrieved(retrieval)
            of += f"; {items}, with a ceiling of {retrieval['recall']:.3f}"
        value = ranked["metrics"][metric]
        found.append((value, FullRanking(row.model, f"{row.mean(metric):.3f}", f"{value:.3f}", of)))
    return [row for _, row in sorted(found, key=lambda pair: -pair[0])]


def full_rankings_note(board: Leaderboard) -> str:
    """Say what ranking all items adds to ranking drawn candidates, and whether they order this table's models alike."""
    drawn = [row.model for row in board.ranked]
    pairs = combinations([row.model for row in full_rankings(board)], 2)
    swapped = [f"{a} before {b}" for a, b in pairs if drawn.index(a) > drawn.index(b)]
    here = "; here they do not" if len(full_rankings(board)) > 1 else ""
    if swapped:
        more = f" and {len(swapped) - 5} more" if len(swapped) > 5 else ""
        here = f"; here all items put {', '.join(swapped[:5])}{more}"
    met = any(run.config.get("exclude_seen") is False for row in board.ranked for run in row.runs)
    ranked = ", as RecBole ranks them for each kind of model" if met else ", but for those the user has met"
    return (
        "Metrics over drawn candidates may order models otherwise than over all items (Krichene and Rendle, KDD 2020)"
        f"{here}. Ranked are all items with an interaction{ranked}; none of these differences is tested for "
        "significance."
    )


BEYOND_NOTE = (
    "Of each user's ten best of what was ranked. "
    + " ".join(f"{name}: {meaning}." for name, meaning in BEYOND.items())
    + " Items are those trained on or recommended by any model here. Intervals are over users: bootstrap of the means, "
    "and for coverage and Gini's index, which all users make together, a jackknife that leaves groups of users out."
)


def beyond_text(row: LeaderboardRow, name: str) -> str:
    """Put one measure of what a row recommends into words."""
    one, digits = row.beyond[name], 1 if name.startswith("Popularity") else 3
    return f"{one.mean:.{digits}f} [{one.low:.{digits}f}, {one.high:.{digits}f}]"


def _retrieved(retrieval: Mapping[str, Any]) -> str:
    return f"the best {retrieval['top_k']} items of {str(retrieval['retriever']).partition('#')[0]}"


def _signed(number: float) -> str:
    """Return a difference with its sign, the minus a real one."""
    return f"{number:+.3f}".replace("-", "−")


def legend(board: Leaderboard) -> str:
    """Explain the marks of this table, and what its numbers cannot say."""
    said = [_marks(board)]
    if board.without_validation:
        said.append(
            f"It was chosen on the test split because {_and(board.without_validation)} recorded no validation metric: "
            "it may owe its place to luck, so tests against it are not exact; run those again with --force."
        )
    if board.not_converged:
        said.append(
            f"{NOT_CONVERGED} Not converged, as training reached its cap of epochs before validation had stopped "
            f"rising: {_and(board.not_converged)}."
        )
    for row in board.rows:
        found = [run.retrieval for run in row.runs if run.ok and run.retrieval and run.retrieval.get("retriever")]
        if found:
            recall = sum(one["recall"] for one in found) / len(found)
            ceiling = f"which hold {recall:.3f} of the targets, the ceiling of its Hit"
            said.append(f"{row.model} re-ranks {_retrieved(found[0])}, {ceiling}.")
    return " ".join([*said, *_other_seeds(board), *_other_weights(board), *board.absent.values(), _by_seed(board)])


def _other_seeds(board: Leaderboard) -> Iterator[str]:
    """Say which rows are tested on fewer seeds than they, or what they are tested against, have."""
    for row in board.ranked:
        if row.tested_on is not None:
            on = "over all seeds of each, as they share none"
            if row.tested_on:
                on = f"on seed {_and([str(seed) for seed in row.tested_on])} alone, which both have"
            yield f"{row.model} and {row.tested_against} are compared {on}."


def _other_weights(board: Leaderboard) -> Iterator[str]:
    """Say which names of models stood for several weights among the rows."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in board.ranked:
        for identity in {} if row.fusions else dict.fromkeys(w for run in row.runs for w in run.weights.values()):
            found[re.split("[@#]", identity)[0]][identity].append(row.model)
    for name, weights in found.items():
        exact = {identity: rows for identity, rows in weights.items() if not identity.endswith("@main")}
        if len(exact) > 1:
            each = "; ".join(f"{identity} of {_and(rows)}" for identity, rows in exact.items())
            yield f"{name} stood for several weights: {each}."


def _by_seed(board: Leaderboard) -> str:
    """Say how far seeds move the models: intervals and tests are over users, and hold none of that."""
    metric, rows = board.valid_metric, [row for row in board.rows if row.ok and row.kind != "fused"]
    if all(len(row.runs) == 1 for row in rows):
        return "Each model was trained once, and no interval or test says how far another seed would move it."
    found = {row.model: [f"{run.metrics[metric]:.3f}" for run in row.runs if metric in run.metrics] for row in rows}
    moved = [f"{model} {_and(values)}" for model, values in found.items() if len(set(values)) > 1]
    return f"{metric} by seed, which no interval or test holds: {'; '.join(moved)}." if moved else ""


def _marks(board: Leaderboard) -> str:
    best, variants = board.best_baseline, board.variants
    fused = " Fused rows are tested against the baseline in them." if board.fused else ""
    if best is None and not variants:
        return "No baseline has finished, so nothing is tested."
    against = "; ".join(
        _and([row.model for row in variants if row.tested_against == name]) + f" against {name}"
        for name in dict.fromkeys(row.tested_against for row in variants)
    )
    level = f"at p < {LEVEL:.2f} after Holm's correction; n.s. = not significant."
    if best is None:
        return f"▲ better, ▼ worse {level} No baseline has finished; tested are {against}.{fused}"
    chosen = f"the best baseline by {board.valid_metric} on {board.chosen_on}"
    marks = f"▲ better, ▼ worse than {best} (ref.), {chosen}, {level}"
    return (f"{marks} Variants are tested against the full model: {against}." if against else marks) + fused


def seeds(row: LeaderboardRow) -> str:
    """List a row's seeds."""
    return ", ".join(str(seed) for seed in row.seeds)


def command(run: RunRecord) -> str:
    """Return the command that repeats a run, once its configuration lies in ``<run_id>.yaml``."""
    return (
        f"python run_recbole_mllm.py benchmark --dataset {shlex.quote(run.dataset)} --models {shlex.quote(run.label)} "
        f"--seeds {run.seed} --config_files {shlex.quote(run.run_id)}.yaml"
    )


def shown_config(run: RunRecord) -> dict[str, Any]:
    """Return a run's configuration without the machine's folders: of other paths than those the last part is shown."""
    ours = ("data_path", "checkpoint_dir", "retriever_dir", "provenance")
    return {key: without_folders(value) for key, value in plain_json(run.config).items() if key not in ours}


def without_folders(value: Any) -> Any:
    """Return `value`, a text or what holds texts, with the last part alone of each text that is an absolute path."""
    if isinstance(value, dict):
        return {key: without_folders(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_folders(entry) for entry in value]
    return f"…/{PurePath(value).name}" if isinstance(value, str) and PurePath(value).is_absolute() else value


def config_yaml(config: dict[str, Any]) -> str:
    """Return a configuration as YAML, in the order of its keys."""
    return str(yaml.safe_dump(config, sort_keys=True, allow_unicode=True, width=100))
