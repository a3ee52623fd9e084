"""How the reports say numbers: one wording for the terminal, Markdown and HTML, so that they cannot disagree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recbole_mllm.benchmark.leaderboard import COUNTS, LEVEL, Leaderboard, Row, Score

Verdict = Literal["better", "worse", "n.s.", "reference", ""]

MARKS = {"better": "▲", "worse": "▼", "n.s.": "n.s.", "reference": "ref.", "": ""}
WORDS = {"better": "better", "worse": "worse", "n.s.": "not significant"}
NOTHING = "–"

METHOD = (
    "Intervals are 95 % bootstrap intervals over users; metrics are averaged over a user's seeds first. Tests are "
    "paired over users, two-sided: a t-test of the per-user differences and, for pooled AUC, a bootstrap that draws "
    "whole users (cluster bootstrap). All p-values of the table are corrected together by Holm's method, so the chance "
    "that it holds even one false mark is below 5 %. The effect size is Cohen's d_z, the mean of the per-user "
    "differences over their standard deviation; pooled AUC has no per-user value and so none."
)
COST_NOTE = (
    "Tokens are those of the prompts scored; parameters are those trained, not those of a frozen backbone. "
    "Memory is the GPU's where there is one, else the process's. Item features and a retriever are made once for all "
    "runs that share them, and count in full in each."
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


def verdict(board: Leaderboard, row: Row, score: Score) -> Verdict:
    """Say how a score stands to the best baseline's."""
    if row.model == board.best_baseline:
        return "reference"
    if score.p is None or score.difference is None:
        return ""
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


def say_cost(name: str, value: float | None) -> str:
    """Put one cost into words."""
    if name in COUNTS and value is not None:
        return f"{value / 1e6:,.1f} M" if value >= 1e6 else f"{value:,.0f}"
    return say_seconds(value) if name.endswith("_s") and name != "pairs_per_s" else say_number(value)


COST_TITLES = {
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
    rivals = [row for row in ranked if row.kind == "mllm"]
    if board.best_baseline is None or not rivals:
        return first
    return f"{first} {_against(board, rivals[0])}"


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
    return " ".join([_marks(board), *_ceilings(board), *board.absent.values()])


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
    if board.best_baseline is None:
        return "No baseline has finished, so nothing is tested."
    return (
        f"▲ better, ▼ worse than {board.best_baseline} (ref.), the best baseline by {board.valid_metric}, "
        f"at p < {LEVEL:.2f} after Holm's correction; n.s. = not significant."
    )


def seeds(row: Row) -> str:
    """List a row's seeds."""
    return ", ".join(str(seed) for seed in row.seeds)
