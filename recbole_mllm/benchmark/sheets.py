"""The leaderboard for spreadsheets: every number at full precision, empty fields where there is none."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from recbole_mllm.benchmark.leaderboard import ALL_COSTS, SLICES, Leaderboard, Part, Row


def format_csv(board: Leaderboard) -> str:
    """Return one line a row with every number at full precision; empty fields where there is none."""
    metrics = [f"{name}{part}" for name in board.metrics for part in ("", " low", " high", " p", " difference", " d")]
    slices = [f"{part} {name}{end}" for part in SLICES for name in board.metrics for end in ("", " n")]
    head = ["model", "kind", "seeds", "status", *metrics, *ALL_COSTS, *slices]
    rows = (
        [row.model, row.kind, " ".join(map(str, row.seeds)), row.status, *_numbers(board, row)] for row in board.rows
    )
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


def _numbers(board: Leaderboard, row: Row) -> list[float | None]:
    numbers: list[float | None] = []
    for name in board.metrics:
        score = row.scores.get(name)
        low, high = score.ci95 if score and score.ci95 else (None, None)
        numbers += [score.mean, low, high, score.p, score.difference, score.effect] if score else [None] * 6
    numbers += [row.cost.get(name) for name in ALL_COSTS]
    for part in SLICES:
        cells = [row.slices.get(part, {}).get(name, Part(None, 0)) for name in board.metrics]
        numbers += [value for cell in cells for value in (cell.mean, cell.n)]
    return numbers
