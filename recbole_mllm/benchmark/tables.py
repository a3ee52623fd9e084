"""The leaderboard as text: for the terminal, for spreadsheets, and as a page of Markdown or a table of LaTeX.

The words of every form come from `wording`.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Template

from recbole_mllm.benchmark import wording
from recbole_mllm.benchmark.leaderboard import ALL_COSTS, SLICES, Leaderboard, LeaderboardRow
from recbole_mllm.benchmark.setups import SETUP
from recbole_mllm.benchmark.wording import (
    NOT_CONVERGED,
    Use,
    added,
    banner,
    cost_text,
    finding,
    future_text,
    legend,
    notes,
    reused_note,
    score_text,
    seeds,
    uses,
)
from recbole_mllm.common.svg import environment

WIDTH = 120
NAME_WIDTH = 28
ALSO_SHOWN = 5  # metrics beside the ranking one in the terminal


def csv_text(frame: pd.DataFrame) -> str:
    """Return a table for a spreadsheet, numbers at full precision."""
    return str(frame.to_csv(index=False, lineterminator="\n"))


def _frame(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=list(head), dtype=object)


def tests_table(board: Leaderboard, metrics: Sequence[str]) -> pd.DataFrame:
    """Return every test of `metrics`, in words."""
    texts = [(row, name, score_text(board, row, name)) for row in board.ranked for name in metrics]
    return _frame(
        ["model", "tested against", "metric", "difference", "Cohen's d_z", "p (raw)", "p (Holm)", "verdict"],
        [[row.model, row.tested_against, name, text.difference, text.effect, text.p_raw, text.p, text.word]
         for row, name, text in texts if text.word],
    )  # fmt: skip


def numbers_table(board: Leaderboard) -> pd.DataFrame:
    """Return every number of the leaderboard, one line a row.

    Of each metric ``p`` is the corrected one against the best baseline; ``p_raw`` and ``p_holm`` are against the row of
    ``tested_against``.
    """
    rows: list[dict[str, Any]] = []
    for row in board.rows:
        cells: dict[str, Any] = {
            "model": row.model, "kind": row.kind, "seeds": " ".join(map(str, row.seeds)), "status": row.status,
            "converged": None if row.converged is None else str(row.converged).lower(),
            "tested_against": row.tested_against, "future_share": board.future_share,
        }  # fmt: skip
        cells |= row.setup.to_json() if row.setup else dict.fromkeys(SETUP)
        if board.out_of_place:
            cells["banner"] = banner(board) if row.model in board.out_of_place else None
        for name in board.metrics:
            score = row.scores.get(name)
            low, high = (score and score.ci95) or (None, None)
            cells |= {
                name: score and score.mean, f"{name} low": low, f"{name} high": high,
                f"{name} p": board.p_vs_best_baseline(row, name), f"{name} p_raw": score and score.p_raw,
                f"{name} p_holm": score and score.p, f"{name} difference": score and score.difference,
                f"{name} d": score and score.effect,
            }  # fmt: skip
        for name, one in row.beyond.items():
            cells |= {name: one.mean, f"{name} low": one.low, f"{name} high": one.high}
        full = row.full_ranking
        cells[f"{board.valid_metric} of all items"] = full and full["metrics"].get(board.valid_metric)
        cells |= {name: row.cost.get(name) for name in ALL_COSTS} | {"summarize_reused": row.summarize_reused}
        for part in SLICES:
            for name in board.metrics:
                users = board.slice_of(row, part, name)
                cells |= {f"{part} {name}": users.mean, f"{part} {name} n": users.n}
        rows.append(cells)
    return pd.DataFrame(rows, dtype=object)


def uses_table(board: Leaderboard) -> pd.DataFrame:
    """Return one line a variant of the full model: what it shows of what the model uses."""
    frame = pd.DataFrame(uses(board), columns=Use._fields)
    low, high = ([use.ci95[end] for use in uses(board)] for end in (0, 1))
    return frame.drop(columns="ci95").assign(low=low, high=high)


def groups_table(board: Leaderboard) -> pd.DataFrame:
    """Return one line a (model, dimension, group) of users, with the ranking metric and its 95 % interval."""
    rows = [
        [row.model, dimension.key, label, n, part.mean, part.low, part.high]
        for row in board.rows
        for dimension in board.dimensions
        for label, n, part in zip(dimension.labels, dimension.counts, row.groups.get(dimension.key, ()), strict=False)
    ]
    return _frame(["model", "dimension", "group", "n", board.valid_metric, "low", "high"], rows)


def curves_table(board: Leaderboard) -> pd.DataFrame:
    """Return one line a (model, metric, k)."""
    rows = [
        [row.model, name, k, value]
        for row in board.rows
        for name, values in row.curves.items()
        for k, value in enumerate(values, start=1)
    ]
    return _frame(["model", "metric", "k", "mean"], rows)


def words_table(board: Leaderboard) -> pd.DataFrame:
    """Return the rows as people read them: name, what the model is, metrics with marks, seconds; or why it failed."""
    valid = board.valid_metric
    rows = []
    for row in board.rows:
        cells = {"model": row.model, "setup": row.setup.described if row.setup else "", "seeds": seeds(row)}
        if row.ok:
            text = score_text(board, row, valid)
            cells[valid] = f"{text.mean} {text.interval} {text.mark}".rstrip()
            for name in board.short_metrics:
                if name != valid:
                    cells[name] = score_text(board, row, name).mean
            names = ("summarize_s", "train_s", "score_s")
            cells |= {ALL_COSTS[name]: cost_text(row, name) for name in names}
        else:
            cells[valid] = f"failed: {row.status}"
        rows.append(cells)
    return pd.DataFrame(rows).fillna("")


# ---- the terminal


def format_table(board: Leaderboard) -> str:
    """Return the leaderboard for a terminal: aligned, at most 120 columns wide."""
    valid = board.valid_metric
    also = [name for name in board.short_metrics if name != valid]
    also = sorted(also, key=lambda name: name.endswith("@5"))[:ALSO_SHOWN]
    lines, setups = [["model", f"{valid} [95 %]", "", *also, "summarise", "train", "score"]], [""]
    for row in board.ranked:
        text = score_text(board, row, valid)
        cells = [score_text(board, row, name) for name in also]
        marked = [f"{c.mean} {c.mark if c.verdict in ('better', 'worse') else ' '}" for c in cells]
        costs = [cost_text(row, name) for name in ("summarize_s", "train_s", "score_s")]
        name = _cut(row.model) + (f" {NOT_CONVERGED}" if row.converged is False else "")
        lines.append([name, f"{text.mean} {text.interval}", text.mark, *marked, *costs])
        setups.append(row.setup.described if row.setup else "")
    while True:  # rather lose a column than break a line
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        if sum(widths) + 2 * len(widths) - 2 <= WIDTH or len(widths) <= 6:
            break
        lines = [line[:-4] + line[-3:] for line in lines]
    table: list[str] = []
    for (name, *values), setup in zip(lines, setups, strict=True):
        padded = [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
        table.append("  ".join([name.ljust(widths[0]), *padded]))
        table += [f"  {line}".ljust(len(table[0])) for line in textwrap.wrap(setup, len(table[0]) - 2)]
    table.insert(1, "─" * len(table[0]))
    failed = [f"{_cut(row.model)} seed {seeds(row)} failed: {row.status}" for row in board.rows if not row.ok]
    users = "" if f"{board.n_users} users" in board.protocol else f" · {board.n_users} users"
    title = f"{board.dataset}: {board.protocol}{users} · candidates {board.candidates}"
    fixed = [_cut(line, WIDTH) for line in ["", *table, *failed, ""]]
    findings = [f"{legend(board)} {reused_note(board)}".strip(), finding(board), *added(board)]
    findings += [f"{use.variant}: {use.sentence}" for use in uses(board)]
    above, below = (
        [line for text in texts for line in textwrap.wrap(text, WIDTH)]
        for texts in ((banner(board), title, future_text(board)), (*findings, notes(board)))
    )
    return "\n".join([*above, *fixed, *below])


def _cut(text: str, width: int = NAME_WIDTH) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


# ---- Markdown


def format_markdown(board: Leaderboard) -> str:
    """Return a page in the manner of RecBole's result pages: tables, then every configuration.

    The settings that all runs share stand there once, and each run's own beside it.
    """
    runs = [run for row in board.rows for run in row.runs]
    configs = [wording.shown_config(run) for run in runs]
    shared = {k: value for k, value in configs[0].items() if all(k in c and c[k] == value for c in configs)}
    own = [{k: value for k, value in config.items() if k not in shared} for config in configs]
    tests = tests_table(board, [board.valid_metric])
    return template("leaderboard.md").render(
        board=board, tests=tests, shared=shared, runs=list(zip(runs, own, strict=True))
    )


def template(name: str) -> Template:
    """Return a template of the report, in which all of `wording` is known by its name.

    In LaTeX, whose braces are many, ``<< >>`` and ``<% %>`` stand for Jinja's own marks.
    """
    templates = environment(Path(__file__).parent / "templates")
    templates.globals |= {**vars(wording), "ALL_COSTS": ALL_COSTS, "SLICES": SLICES}
    templates.filters |= {"md": _md, "code": _code, "tex": escape_latex}
    if name.endswith(".tex"):
        templates = templates.overlay("<%", "%>", "<<", ">>", "<#", "#>")
    return templates.get_template(name)


def _md(text: object) -> str:
    """Escape what Markdown would take for a table, a tag, an entity or a new line, and leave ``p < .001`` alone."""
    entities = re.sub(r"&(?=#?\w+;)", "&amp;", " ".join(str(text).split()))
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", entities).replace("|", "\\|")


def _code(text: str) -> str:
    """Return `text` as code, in which Markdown decodes nothing."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence}{text}{fence}" if not longest else f"{fence} {text} {fence}"


# ---- LaTeX

_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "[": "{[}", "]": "{]}", "*": "{*}", '"': r"\textquotedbl{}", "−": "$-$",
}  # fmt: skip


def format_latex(board: Leaderboard) -> str:
    """Return a table for a paper, to be read by ``\\input{leaderboard.tex}``.

    The best value of a column is in bold; marks of significance, protocol and digest are explained in the caption.
    """
    label = "".join(c if c.isascii() and c.isalnum() else "-" for c in board.dataset)
    names = {row.model: _name_in_paper(board, row) for row in board.rows}
    rest: dict[str, list[str]] = {}
    for row in board.ranked:
        if row.setup and row.setup.rest:
            rest.setdefault(", ".join(row.setup.rest), []).append(row.model)
    return template("leaderboard.tex").render(board=board, label=label, names=names, rest=rest)


def _name_in_paper(board: Leaderboard, row: LeaderboardRow) -> str:
    """Return a row's label with what it is behind it, in as few words as tell it from the others of its label."""
    if row.setup is None:
        return row.model
    label, short = row.runs[0].label, ", ".join(row.setup.short)
    alike = [one.setup for one in board.ranked if one.setup and one.runs[0].label == label and one.model != row.model]
    if not any(one.short == row.setup.short for one in alike):
        return f"{label} ({short})"
    if not any(one == row.setup for one in alike):
        return f"{label} ({row.setup.described})"
    return f"{row.model.removesuffix(')')}; {short})"


def escape_latex(text: str) -> str:
    """Return `text` so that LaTeX sets it as it is written, on one line."""
    return "".join(_SPECIAL.get(character, character) for character in " ".join(text.split()))
