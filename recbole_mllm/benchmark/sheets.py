"""The leaderboard for spreadsheets: every number at full precision, empty fields where there is none."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from recbole_mllm.benchmark.leaderboard import ALL_COSTS, SLICES, Leaderboard, Part, Row

ABOUT = ("model", "kind", "seeds", "status", "converged", "tested_against")
PARTS = ("", " low", " high", " p", " p_raw", " p_holm", " difference", " d")
"""What stands of each metric: `p` is the corrected one against the best baseline, `p_raw` and `p_holm` are against
the row of `tested_against`."""


def format_csv(board: Leaderboard) -> str:
    """Return one line a row with every number at full precision; empty fields where there is none."""
    metrics = [f"{name}{part}" for name in board.metrics for part in PARTS]
    slices = [f"{part} {name}{end}" for part in SLICES for name in board.metrics for end in ("", " n")]
    head = [*ABOUT, *metrics, *ALL_COSTS, "summarize_reused", *slices]
    rows = ([*_about(row), *_numbers(board, row)] for row in board.rows)
    return _sheet(head, rows)


def format_groups(board: Leaderboard) -> str:
    """Return one line a (model, dimension, group) of users, with the ranking metric and its 95 % interval."""
    rows = (
        [row.model, dimension.key, label, part.n, part.mean, part.low, part.high]
        for row in board.rows
        for dimension in board.dimensions
        for label, part in zip(dimension.labels, row.groups.get(dimension.key, ()), strict=False)
    )
    return _sheet(["model", "dimension", "group", "n", board.valid_metric, "low", "high"], rows)


def format_curves(board: Leaderboard) -> str:
    """Return one line a (model, metric, k)."""
    rows = (
        [row.model, name, k, value]
        for row in board.rows
        for name, values in row.curves.items()
        for k, value in enumerate(values, start=1)
    )
    return _sheet(["model", "metric", "k", "mean"], rows)


def _sheet(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()


def _about(row: Row) -> list[str | None]:
    converged = None if row.converged is None else str(row.converged).lower()
    return [row.model, row.kind, " ".join(map(str, row.seeds)), row.status, converged, row.tested_against]


def _numbers(board: Leaderboard, row: Row) -> list[float | None]:
    numbers: list[float | None] = []
    for name in board.metrics:
        score = row.scores.get(name)
        low, high = score.ci95 if score and score.ci95 else (None, None)
        if score is None:
            numbers += [None] * len(PARTS)
            continue
        tests = [board.p_vs_best_baseline(row, score), score.p_raw, score.p, score.difference, score.effect]
        numbers += [score.mean, low, high, *tests]
    numbers += [*(row.cost.get(name) for name in ALL_COSTS), row.summarize_reused]
    for part in SLICES:
        cells = [row.slices.get(part, {}).get(name, Part(None, 0)) for name in board.metrics]
        numbers += [value for cell in cells for value in (cell.mean, cell.n)]
    return numbers
