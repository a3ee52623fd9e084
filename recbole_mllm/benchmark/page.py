"""The leaderboard as one HTML file: no network, no library, readable in the dark, on a phone and on paper."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from recbole_mllm.benchmark.casebook import Casebook
from recbole_mllm.benchmark.charts import curve_charts, group_charts, series
from recbole_mllm.benchmark.groups import FEW
from recbole_mllm.benchmark.leaderboard import SLICES, Leaderboard, Part, Row
from recbole_mllm.benchmark.plot import quality_versus_cost
from recbole_mllm.benchmark.text import command, configuration
from recbole_mllm.benchmark.thumbnails import SIDE
from recbole_mllm.benchmark.wording import (
    COST_TITLES,
    MARKS,
    METHOD,
    NOTHING,
    WORDS,
    cost_notes,
    finding,
    legend,
    say_cost,
    say_score,
    seeds,
)
from recbole_mllm.pages import environment

SLICE_TITLES = {
    "cold": ("Cold", "the target item has no interaction in training"),
    "warm": ("Warm", "the target item has at least one interaction in training"),
    "tail": ("Long tail", "the target item is in the long tail of popularity"),
}


LAST_BLOCKS = 4
"""Blocks of a history that stand open; those before are a click away."""


def page(board: Leaderboard, book: Casebook | None = None) -> str:
    """Return the report; every text in it is escaped."""
    templates = environment(Path(__file__).parent / "templates")
    templates.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    templates.filters["breakable"] = _breakable
    template = templates.get_template("leaderboard.html")
    return template.render(
        board=board,
        finding=finding(board).replace("p < ", "p\u00a0<\u00a0").replace("p = ", "p\u00a0=\u00a0"),
        legend=legend(board),
        method=METHOD,
        metrics=[(name, name.partition("@")[2]) for name in board.metrics],
        costs=[(name, COST_TITLES[name]) for name in board.costs],
        cost_note=cost_notes(board),
        rows=[_row(board, row) for row in board.rows if row.ok],
        failures=[{"model": row.model, "seeds": seeds(row), "status": row.status} for row in board.rows if not row.ok],
        slices=_slices(board),
        tests=_tests(board),
        plot=quality_versus_cost(board),
        runs=[_run(row) for row in board.rows],
        series=series(board),
        curves=curve_charts(board),
        uncurved=", ".join(row.model for row in board.rows if row.ok and not row.curves),
        groups=group_charts(board),
        whole=[dimension for dimension in board.dimensions if len(dimension.labels) == 1],
        few=FEW,
        book=book,
        side=SIDE,
        last_blocks=LAST_BLOCKS,
    )


def _breakable(name: str) -> Markup:
    """Return a name that a narrow column breaks behind its colon, not in the middle of a word."""
    return Markup("<wbr>").join(Markup.escape(part) for part in re.split(r"(?<=:)", name))


def _row(board: Leaderboard, row: Row) -> Mapping[str, Any]:
    return {
        "model": row.model,
        "kind": row.kind,
        "seeds": seeds(row),
        "reference": row.model == board.best_baseline,
        "scores": [_cell(board, row, metric) for metric in board.metrics],
        "not_converged": row.converged is False,
        "costs": [{"value": row.cost.get(name), "text": say_cost(row, name)} for name in board.costs],
    }


def _cell(board: Leaderboard, row: Row, metric: str) -> Mapping[str, Any]:
    said, score = say_score(board, row, metric), row.scores.get(metric)
    highest = max((other.mean(metric) for other in board.rows if other.ok), default=None)
    told = (
        f"{said.difference} to {row.tested_against}, {said.p}, d_z = {said.effect}, {WORDS.get(said.verdict, '')}"
        if said.p
        else ""
    )
    return {
        "value": score.mean if score else None,
        "said": said,
        "mark": MARKS[said.verdict],
        "told": told,
        "highest": score is not None and score.mean == highest,
    }


def _slices(board: Leaderboard) -> Mapping[str, Any]:
    """Return the slices of the ranking metric, with bars as shares of the largest value."""
    ranked = [row for row in board.rows if row.ok]
    parts = [[row.slices.get(name, {}).get(board.valid_metric, Part(None, 0)) for name in SLICES] for row in ranked]
    largest = max((part.mean or 0.0 for line in parts for part in line), default=0.0) or 1.0
    counts = [max((line[column].n for line in parts), default=0) for column in range(len(SLICES))]
    heads = [(*SLICE_TITLES[name], count) for name, count in zip(SLICES, counts, strict=True)]
    lines = [
        {"model": row.model, "kind": row.kind, "cells": [_bar(part, largest) for part in line]}
        for row, line in zip(ranked, parts, strict=True)
    ]
    return {"heads": heads, "lines": lines}


def _bar(part: Part, largest: float) -> Mapping[str, Any]:
    if part.mean is None:
        return {"text": NOTHING, "share": 0}
    return {"text": f"{part.mean:.3f}", "share": round(100 * part.mean / largest)}


def _tests(board: Leaderboard) -> list[Mapping[str, Any]]:
    """Return every test of the table, for whoever wants more than a mark."""
    told = [(row, name, say_score(board, row, name)) for row in board.rows for name in board.metrics if row.ok]
    return [
        {
            "model": row.model,
            "against": row.tested_against,
            "metric": name,
            "said": said,
            "verdict": WORDS[said.verdict],
        }
        for row, name, said in told
        if said.verdict in WORDS
    ]


def _run(row: Row) -> Mapping[str, Any]:
    runs = [{"record": run, "command": command(run), "yaml": configuration(run)} for run in row.runs]
    return {"model": row.model, "runs": runs}
