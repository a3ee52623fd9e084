"""How the reports say numbers: one wording for the terminal, Markdown and HTML, so that they cannot disagree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from recbole_mllm.benchmark.leaderboard import COUNTS, LEVEL, Leaderboard, Row, Score

Verdict = Literal["better", "worse", "n.s.", "reference", ""]

MARKS = {"better": "▲", "worse": "▼", "n.s.": "n.s.", "reference": "ref.", "": ""}
WORDS = {"better": "better", "worse": "worse", "n.s.": "not significant"}
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


@dataclass(frozen=True, slots=True)
class Said:
    """A score in words."""

    mean: str
    interval: str
    verdict: Verdict
    p: str
    effect: str
    difference: str
    p_raw: str = ""


def verdict(board: Leaderboard, row: Row, score: Score) -> Verdict:
    """Say how a score stands to that of the row it is tested against."""
    if score.p is None or score.difference is None:
        return "reference" if row.model == board.best_baseline else ""
    if not score.significant:
        return "n.s."
    return "better" if score.difference > 0 else "worse"


def say_score(board: Leaderboard, row: Row, metric: str) -> Said:
    """Put one metric of one row into words; dashes where there is none."""
    score = row.scores.get(metric)
    if score is None:
        return Said(NOTHING, "", "", "", NOTHING, NOTHING)
    return Said(
        mean=f"{score.mean:.3f}",
        interval=f"[{score.ci95[0]:.3f}, {score.ci95[1]:.3f}]" if score.ci95 else "",
        verdict=verdict(board, row, score),
        p=say_p(score.p),
        p_raw=say_p(score.p_raw),
        effect=NOTHING if score.effect is None else f"{score.effect:+.2f}",
        difference=NOTHING if score.difference is None else f"{score.difference:+.3f}",
    )


def say_p(p: float | None) -> str:
    """Return ``p < .001`` or ``p = .012``."""
    if p is None:
        return ""
    return "p < .001" if p < 0.001 else f"p = {p:.3f}".replace("0.", ".", 1)


def say_seconds(seconds: float | None) -> str:
    """Return a duration in the unit a person would use."""
    if seconds is None:
        return NOTHING
    for limit, divisor, unit in ((100, 1, "s"), (6000, 60, "min"), (float("inf"), 3600, "h")):
        if seconds < limit:
            number = seconds / divisor
            return f"{number:.0f} {unit}" if number >= 10 else f"{number:.2g} {unit}"
    return NOTHING


def say_number(value: float | None) -> str:
    """Return a count or rate without false precision."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def say_cost(row: Row, name: str) -> str:
    """Put one cost of a row into words; summaries that other runs have written are marked, see `cost_notes`."""
    value = row.cost.get(name)
    if name == "summarize_s" and value is not None and row.summarize_reused:
        return f"{say_seconds(value)}*"
    if name in COUNTS and value is not None:
        return f"{value / 1e6:,.1f} M" if value >= 1e6 else f"{value:,.0f}"
    return say_seconds(value) if name.endswith("_s") and name != "pairs_per_s" else say_number(value)


def cost_notes(board: Leaderboard) -> str:
    """Say what the costs of this table hold."""
    notes = [COST_NOTE]
    if any(row.ok and row.summarize_reused for row in board.rows):
        notes.append(
            "* Some or all of these summaries were in the store already; they are priced by what they took then."
        )
    if any(run.tuning for row in board.rows for run in row.runs):
        notes.append("What --tune tried before is not in Train; its seconds stand in each run's record.")
    old = [row.model for row in board.rows if row.ok and any(run.valid is None for run in row.runs)]
    if old:
        notes.append(
            f"Recorded by an earlier version, whose Train includes validation and Summarise loading: {_and(old)}."
        )
    return " ".join(notes)


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


COST_TITLES = {
    "load_s": "Load",
    "summarize_s": "Summarise",
    "features_s": "Features",
    "train_s": "Train",
    "score_s": "Score",
    "pairs_per_s": "Pairs/s",
    "peak_memory_mb": "Memory MB",
    "tokens": "Tokens",
    "parameters_trained": "Parameters",
}


def finding(board: Leaderboard) -> str:
    """Say in one or two sentences what the table shows, and no more than it shows."""
    ranked = [row for row in board.rows if row.ok]
    if not ranked:
        return "No run has finished, so there is nothing to rank."
    metric, top = board.valid_metric, ranked[0]
    first = f"{top.model} has the highest {metric}, {say_score(board, top, metric).mean}."
    rivals = [row for row in ranked if row.kind == "mllm" and row.tested_against == board.best_baseline]
    if board.best_baseline is None or not rivals:
        return first
    unfinished = [name for name in (rivals[0].model, board.best_baseline) if name in board.not_converged]
    caution = [f"{_and(unfinished)} had not converged."] if unfinished else []
    return " ".join([first, _against(board, rivals[0]), *caution])


def _against(board: Leaderboard, row: Row) -> str:
    """Say how an MLLM stands to the best baseline, and whether that may be claimed."""
    said = say_score(board, row, board.valid_metric)
    amount = said.difference.lstrip("+-")
    if said.verdict in ("better", "worse"):
        side = "above" if said.verdict == "better" else "below"
        return f"{row.model} is {amount} {side} the best baseline, {board.best_baseline}: significant ({said.p})."
    told = f"not significant ({said.p})" if said.p else "not tested"
    return f"{row.model} differs from the best baseline, {board.best_baseline}, by {said.difference}: {told}."


def legend(board: Leaderboard) -> str:
    """Explain the marks of this table, and what its numbers cannot say."""
    return " ".join([_marks(board), *_unfinished(board), *_ceilings(board), *board.absent.values()])


def _unfinished(board: Leaderboard) -> list[str]:
    """Say of which rows more training might have raised the numbers."""
    if not board.not_converged:
        return []
    return [
        f"{NOT_CONVERGED} Not converged, as training reached its cap of epochs before validation had stopped rising: "
        f"{_and(board.not_converged)}."
    ]


def _ceilings(board: Leaderboard) -> list[str]:
    """Say of each row that re-ranks another model's best how good that can get."""
    out = []
    for row in board.rows:
        found = [run.retrieval for run in row.runs if run.ok and run.retrieval and run.retrieval.get("retriever")]
        if found:
            recall = sum(one["recall"] for one in found) / len(found)
            model = str(found[0]["retriever"]).partition("#")[0]
            out.append(f"{row.model} re-ranks the best {found[0]['top_k']} items of {model}, "
                       f"which hold {recall:.3f} of the targets, the ceiling of its Hit.")  # fmt: skip
    return out


def _marks(board: Leaderboard) -> str:
    variants = [row for row in board.rows if row.tested_against not in (None, board.best_baseline)]
    full = dict.fromkeys(str(row.tested_against) for row in variants)
    against = [
        _and([row.model for row in variants if row.tested_against == name]) + f" against {name}" for name in full
    ]
    if board.best_baseline is None and not variants:
        return "No baseline has finished, so nothing is tested."
    told = f"at p < {LEVEL:.2f} after Holm's correction; n.s. = not significant."
    if board.best_baseline is None:
        return f"▲ better, ▼ worse {told} No baseline has finished; tested are {'; '.join(against)}."
    chosen = f"the best baseline by {board.valid_metric} on {board.chosen_on}"
    marks = f"▲ better, ▼ worse than {board.best_baseline} (ref.), {chosen}, {told}"
    if against:
        marks += f" Variants are tested against the full model: {'; '.join(against)}."
    return f"{marks}{_fallback(board)}"


def _fallback(board: Leaderboard) -> str:
    """Say why the test split had to choose the best baseline, and what that does to the tests."""
    if not board.without_validation:
        return ""
    return (
        f" It was chosen on the test split because {_and(board.without_validation)} recorded no validation metric: it "
        "may owe its place to luck, so tests against it are not exact; run those again with --force."
    )


def seeds(row: Row) -> str:
    """List a row's seeds."""
    return ", ".join(str(seed) for seed in row.seeds)
