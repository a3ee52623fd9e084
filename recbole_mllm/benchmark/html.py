"""The leaderboard as one HTML file: no network, no library, readable in the dark, on a phone and on paper.

In its charts every model has one colour, one dash pattern and one place in the order throughout, and lines carry their
names, so that no chart is read by colour alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from recbole_mllm.benchmark.cases import SIDE, CaseStudies
from recbole_mllm.benchmark.evidence import CURVES, FEW
from recbole_mllm.benchmark.leaderboard import Dimension, Leaderboard, LeaderboardRow
from recbole_mllm.benchmark.significance import Estimate
from recbole_mllm.benchmark.tables import template, tests_table
from recbole_mllm.benchmark.wording import score_text, seconds_text
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.files import write_text
from recbole_mllm.common.svg import CHARACTER, LABEL_GAP, Axis, Chart, linear_axis, place_labels

LAST_BLOCKS = 4  # of a history stand open; those before are a click away
COLOURS = 8
NAMED, LONG = 8, 18  # of more marks, or of longer names, the cost chart's marks carry numbers, explained below
CUT = 24  # characters of a name beside its curve; a pointer shows it whole
WIDER = 1.25  # than `CHARACTER` is a character of the cost chart, for a narrow screen
BOLD = 1.2  # how much wider an MLLM's label is
_ALONE = (
    "svg.recbole-mllm { max-width: 640px; background: var(--card); "
    'font-family: system-ui, -apple-system, "Segoe UI", Arial, "DejaVu Sans", sans-serif; }'
)
TIMES = (0.1, 1, 10, 60, 600, 3600, 36_000, 360_000, 3_600_000)


def page(board: Leaderboard, cases: CaseStudies | None = None) -> str:
    """Return the report; every text in it is escaped."""
    parts = [board.slice_of(row, name, board.valid_metric) for row in board.ranked for name in board.slices]
    return template("leaderboard.html").render(
        board=board,
        metrics=[(name, name.partition("@")[2]) for name in board.metrics],
        largest=max([part.mean or 0.0 for part in parts], default=0.0) or 1.0,
        tests=tests_table(board, board.metrics),
        cost=quality_versus_cost(board),
        series=series(board),
        curves=curve_charts(board),
        groups=group_charts(board),
        few=FEW,
        cases=cases,
        side=SIDE,
        last_blocks=LAST_BLOCKS,
    )


class Figure:
    """A chart that stands alone: its `svg` carries its own style, and shows inline in a notebook."""

    def __init__(self, svg: str) -> None:
        self.svg = svg

    def _repr_svg_(self) -> str:
        return self.svg

    def save(self, path: str | Path) -> None:
        """Write it as an SVG file."""
        write_text(Path(path), self.svg)


def figure(board: Leaderboard) -> Figure:
    """Return the page's chart of quality against cost.

    Raises:
        UserError: No finished row recorded its cost.
    """
    chart = quality_versus_cost(board)
    if chart is None:
        raise UserError("no finished run has recorded its cost, so there is no chart of it")
    # its rules hold for no other chart of the page that it is shown in
    style = re.sub(r"\bsvg\b|:root", "svg.recbole-mllm", template("chart.css").render()) + _ALONE
    return Figure(template("cost.svg").render(cost=chart, style=Markup(style)))


# ---- charts


class Mark(NamedTuple):
    """One model in a chart, in SVG coordinates: its mean at (x, y) with an interval, or a curve of `points` to there.

    `style` is the CSS class, `hover` what a pointer shows; the label stands at (`label_x`, `label_y`).
    """

    name: str
    style: str
    hover: str
    x: float
    y: float
    low: float = 0.0
    high: float = 0.0
    points: str = ""
    label: str = ""
    label_x: float = 0.0
    label_y: float = 0.0
    anchor: str = "start"


def series(board: Leaderboard) -> dict[str, str]:
    """Return the style of each finished row, in the table's order; the best MLLM has the first to itself."""
    models = [row.model for row in board.ranked]
    first = next((row.model for row in board.ranked if row.kind == "mllm"), models[0] if models else "")
    others = [model for model in models if model != first]
    return {m: "s0" if m == first else f"s{1 + others.index(m) % (COLOURS - 1)}" for m in models}


def quality_versus_cost(board: Leaderboard) -> Chart | None:
    """Lay out the ranking metric against seconds spent; None if no finished row recorded its cost."""
    metric = board.valid_metric
    rows = [row for row in board.ranked if row.seconds > 0 and metric in row.scores]
    if not rows:
        return None
    ends = [row.scores[metric].ci95 or (row.mean(metric),) * 2 for row in rows]
    low_s, high_s = min(row.seconds for row in rows) / 1.5, max(row.seconds for row in rows) * 1.5
    middle = math.sqrt(low_s * high_s)  # the axis spans a factor of ten at least
    low_s, high_s = min(low_s, middle / math.sqrt(10)), max(high_s, middle * math.sqrt(10))
    times = [(time, seconds_text(time)) for time in TIMES if low_s <= time <= high_s]
    x = Axis(low_s, high_s, 52, 504, log=True, labels=times)
    y = linear_axis(min(low for low, _ in ends), max(high for _, high in ends), 294, 18)
    numbers = {row.model: str(number) for number, row in enumerate(board.rows, start=1)}
    is_named = len(rows) <= NAMED and max(len(row.model) for row in rows) <= LONG
    marks, labels = [], []
    for row, (low, high) in sorted(zip(rows, ends, strict=True), key=lambda pair: y(pair[0].mean(metric))):
        label = row.model if is_named else numbers[row.model]
        length = len(label) * CHARACTER * WIDER * (BOLD if row.kind == "mllm" else 1)
        at = x(row.seconds), y(row.mean(metric))
        is_right = at[0] + 10 + length <= 520
        labels.append((at[1], *((at[0] + 10, at[0] + 10 + length) if is_right else (at[0] - 10 - length, at[0] - 10))))
        text = score_text(board, row, metric)
        hover = f"{row.model}: {metric} {text.mean} {text.interval}, {seconds_text(row.seconds)}"
        side = (at[0] + 10, "start") if is_right else (at[0] - 10, "end")
        marks.append(Mark(row.model, row.kind, hover, *at, y(low), y(high), label=label, label_x=side[0],
                          anchor=side[1]))  # fmt: skip
    marks = [
        mark._replace(label_y=round(at + 4, 1))
        for mark, at in zip(marks, place_labels(labels, LABEL_GAP * WIDER), strict=True)
    ]
    features = "features + " if "features_s" in board.costs else ""
    return Chart(
        f"{metric} against seconds spent, one mark a model", x, y, 520, 340,
        f"summarise + {features}train + score, log scale", metric, marks,
        more={"key": sorted(marks, key=lambda mark: int(mark.label)) if not is_named else []},
    )  # fmt: skip


def curve_charts(board: Leaderboard) -> list[Chart]:
    """Lay out each metric at every k, for the rows whose ranks are known."""
    rows = [row for row in board.ranked if row.curves]
    return [_curve_chart(metric, rows, series(board)) for metric in CURVES] if rows else []


def _curve_chart(metric: str, rows: list[LeaderboardRow], styles: Mapping[str, str]) -> Chart:
    rows = sorted(rows, key=lambda row: -row.curves[metric][-1])
    depth = max(len(row.curves[metric]) for row in rows)
    names = {row.model: row.model if len(row.model) <= CUT else f"{row.model[: CUT - 1]}…" for row in rows}
    right, height = round(max(200, min(340, 420 - 28 - max(map(len, names.values())) * CHARACTER * BOLD))), 300
    x = Axis(1, max(2, depth), 44, right, labels=[(k, str(k)) for k in (1, 5, 10, 15, 20) if k <= depth])
    y = linear_axis(0.0, max(max(row.curves[metric]) for row in rows), 258, 20)
    heights = place_labels((y(row.curves[metric][-1]), 0, 1) for row in rows)
    over = max(0.0, heights[-1] + 6 - height)  # many equal curves: names move up together rather than out of sight
    marks = []
    for row, at in zip(rows, heights, strict=True):
        values = row.curves[metric]
        points = [(x(k), y(value)) for k, value in enumerate(values, start=1)]
        some = ", ".join(f"{metric}@{k} {values[k - 1]:.3f}" for k in (1, 3, 5, 10, 20) if k <= len(values))
        marks.append(Mark(
            row.model, styles[row.model], f"{row.model}: {some}", *points[-1], label=names[row.model],
            points=" ".join(f"{a},{b}" for a, b in points), label_x=points[-1][0] + 12, label_y=round(at + 4 - over, 1),
        ))  # fmt: skip
    summary = f"{metric} at k from 1 to {depth}. " + ". ".join(mark.hover for mark in marks)
    return Chart(f"{metric}@k", x, y, 420, height, "k", f"{metric}@k", marks, summary)


class Band(NamedTuple):
    """One group of users in a chart: its name, how many there are, and a mark a model."""

    label: str
    users: str
    few: bool
    top: float
    middle: float
    marks: list[Mark]


def group_charts(board: Leaderboard) -> list[Chart]:
    """Lay out one chart a dimension that parts the users at all, all on one scale: groups from top to bottom."""
    rows = [row for row in board.ranked if row.groups]
    parted = [dimension for dimension in board.dimensions if len(dimension.labels) > 1]
    if not rows or not parted:
        return []
    parts = [part for row in rows for dimension in parted for part in row.groups[dimension.key]]
    x = linear_axis(min(part.low for part in parts), max(part.high for part in parts), 104, 408)
    return [_group_chart(dimension, rows, series(board), x, board.valid_metric) for dimension in parted]


def _group_chart(
    dimension: Dimension, rows: Sequence[LeaderboardRow], styles: Mapping[str, str], x: Axis, metric: str
) -> Chart:
    pitch = 9 if len(rows) >= 7 else 12  # pixels a model
    top, tall = 8, max(30, len(rows) * pitch + 8)
    bands = []
    for number, (label, count) in enumerate(zip(dimension.labels, dimension.counts, strict=True)):
        middle = top + (number + 0.5) * tall
        marks = []
        for place, row in enumerate(rows):
            part = row.groups[dimension.key][number]
            hover = f"{row.model}, {label}: {metric} {_interval(part)}, {count} users"
            at = middle + (place + 0.5 - len(rows) / 2) * pitch
            marks.append(Mark(row.model, styles[row.model], hover, x(part.mean), at, x(part.low), x(part.high)))
        users = f"{count:,} {'user' if count == 1 else 'users'}"
        bands.append(Band(label, users, count < FEW, top + number * tall, middle, marks))
    bottom, title = top + len(bands) * tall, f"{metric} by {dimension.title.lower()}"
    table = [(row.model, [_interval(part) for part in row.groups[dimension.key]]) for row in rows]
    return Chart(
        title, x, Axis(0, 1, bottom, top), 420, bottom + 26, marks=bands,
        summary=f"{title}; the same numbers are in the table below.", more={"dimension": dimension, "table": table},
    )  # fmt: skip


def _interval(part: Estimate) -> str:
    return f"{part.mean:.3f} [{part.low:.3f}, {part.high:.3f}]"
