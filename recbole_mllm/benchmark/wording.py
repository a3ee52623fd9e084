"""How the reports say numbers: one wording for every form, so that they cannot disagree."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import yaml

from recbole_mllm.benchmark.leaderboard import COUNTS, LEVEL, Leaderboard, LeaderboardRow
from recbole_mllm.benchmark.records import RunRecord, plain_json

MARKS = {"better": "▲", "worse": "▼", "n.s.": "n.s.", "reference": "ref.", "": ""}
WORDS = {"better": "better", "worse": "worse", "n.s.": "not significant", "reference": "", "": ""}
NOTHING = "–"
NOT_CONVERGED = "‡"

METHOD = (
    "Intervals are 95 % bootstrap intervals over users; metrics are averaged over a user's seeds first. Tests are "
    "paired over users, two-sided: a t-test of the per-user differences and, for pooled AUC, one with the standard "
    "error of a bootstrap that draws whole users (cluster bootstrap). All p-values of the table are corrected together "
    "by Holm's method, so the chance that it holds even one false mark is below 5 %; metrics that are equal for every "
    "user, as Hit and Recall are with one target, are one question and counted once. The effect size is Cohen's d_z, "
    "the mean of the per-user differences over their standard deviation; pooled AUC has no per-user value and so none."
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
    if name in ("pairs_per_s", "peak_memory_mb"):
        return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
    return seconds_text(value) + ("*" if name == "summarize_s" and row.summarize_reused else "")


def cost_notes(board: Leaderboard) -> str:
    """Say what the costs of this table hold."""
    notes = [COST_NOTE]
    if any(row.summarize_reused for row in board.ranked):
        notes.append("* Some of these summaries were in the store already; they are priced by what they took then.")
    if any(run.tuning for row in board.rows for run in row.runs):
        notes.append("What --tune tried before is not in Train; its seconds stand in each run's record.")
    if old := [row.model for row in board.ranked if any(run.valid is None for run in row.runs)]:
        notes.append(
            f"Recorded by an earlier version, whose Train includes validation and Summarise loading: {_and(old)}."
        )
    return " ".join(notes)


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


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
    if side := {"better": "above", "worse": "below"}.get(text.verdict):
        amount = text.difference.lstrip("+-")
        said.append(f"{rival.model} is {amount} {side} the best baseline, {best}: significant ({text.p}).")
    else:
        tested = f"not significant ({text.p})" if text.p else "not tested"
        said.append(f"{rival.model} differs from the best baseline, {best}, by {text.difference}: {tested}.")
    unfinished = [name for name in (rival.model, best) if name in board.not_converged]
    return " ".join(said + ([f"{_and(unfinished)} had not converged."] if unfinished else []))


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
            items = f"{found[0]['top_k']} items of {str(found[0]['retriever']).partition('#')[0]}"
            ceiling = f"which hold {recall:.3f} of the targets, the ceiling of its Hit"
            said.append(f"{row.model} re-ranks the best {items}, {ceiling}.")
    return " ".join([*said, *board.absent.values()])


def _marks(board: Leaderboard) -> str:
    best, variants = board.best_baseline, board.variants
    if best is None and not variants:
        return "No baseline has finished, so nothing is tested."
    against = "; ".join(
        _and([row.model for row in variants if row.tested_against == name]) + f" against {name}"
        for name in dict.fromkeys(row.tested_against for row in variants)
    )
    level = f"at p < {LEVEL:.2f} after Holm's correction; n.s. = not significant."
    if best is None:
        return f"▲ better, ▼ worse {level} No baseline has finished; tested are {against}."
    chosen = f"the best baseline by {board.valid_metric} on {board.chosen_on}"
    marks = f"▲ better, ▼ worse than {best} (ref.), {chosen}, {level}"
    return f"{marks} Variants are tested against the full model: {against}." if against else marks


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
