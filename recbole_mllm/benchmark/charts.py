"""Where the lines of the metric@k curves and the marks of the slice charts stand; the template draws them.

Every model keeps one colour, one dash pattern and one place in the order throughout, and lines carry their names, so no
chart is read by colour alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from recbole_mllm.benchmark.curves import CURVES
from recbole_mllm.benchmark.groups import FEW
from recbole_mllm.benchmark.leaderboard import Dimension, GroupPart, Leaderboard, Row
from recbole_mllm.benchmark.plot import CHARACTER, LABEL_GAP, round_steps, tick_texts

COLOURS = 8
Tick = tuple[float, str]


def series(board: Leaderboard) -> dict[str, int]:
    """Return each finished row's colour, in the table's order; the best MLLM has the first to itself."""
    ranked = [row for row in board.rows if row.ok]
    first = next((row.model for row in ranked if row.kind == "mllm"), None)
    ordered = sorted(ranked, key=lambda row: row.model != first)
    places = {row.model: index for index, row in enumerate(ordered)}
    colours = {model: index if index < 1 else 1 + (index - 1) % (COLOURS - 1) for model, index in places.items()}
    return {row.model: colours[row.model] for row in ranked}


@dataclass(frozen=True, slots=True)
class Line:
    """One model's curve in SVG coordinates; its name stands at its right end."""

    name: str
    colour: int
    points: str
    end: tuple[float, float]
    label_y: float
    told: str


@dataclass(frozen=True, slots=True)
class CurveChart:
    """One metric at every k; `valid` is the x of the cut-off that the tables show."""

    metric: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    summary: str
    width: int = 420
    height: int = 300
    left: int = 44
    right: int = 300
    top: int = 20
    bottom: int = 258


def curve_charts(board: Leaderboard) -> tuple[CurveChart, ...]:
    """Lay out one chart a metric for the rows whose ranks are known."""
    rows = [row for row in board.rows if row.ok and row.curves]
    return tuple(_curve_chart(metric, rows, series(board)) for metric in CURVES) if rows else ()


def _curve_chart(metric: str, rows: list[Row], colours: dict[str, int]) -> CurveChart:
    width = max(len(row.model) for row in rows) * CHARACTER
    empty = CurveChart(metric, (), (), (), "", right=round(max(200, min(340, 420 - 28 - width))))
    depth = max(len(row.curves[metric]) for row in rows)
    steps = round_steps(0.0, max(max(row.curves[metric]) for row in rows))

    def x(k: int) -> float:
        return round(empty.left + (k - 1) / max(1, depth - 1) * (empty.right - empty.left), 1)

    def y(value: float) -> float:
        return round(empty.bottom - value / steps[-1] * (empty.bottom - empty.top), 1)

    lines, last = [], -1e9
    for row in sorted(rows, key=lambda row: -row.curves[metric][-1]):
        values = row.curves[metric]
        points = [(x(k), y(value)) for k, value in enumerate(values, start=1)]
        last = max(points[-1][1], last + LABEL_GAP)
        told = f"{row.model}: " + ", ".join(
            f"{metric}@{k} {values[k - 1]:.3f}" for k in (1, 3, 5, 10, 20) if k <= len(values)
        )
        text = " ".join(f"{a},{b}" for a, b in points)
        lines.append(Line(row.model, colours[row.model], text, points[-1], round(last + 4, 1), told))
    over = max(0.0, last + 6 - empty.height)  # many equal curves: their names move up together rather than out of sight
    lines = [Line(*(s.name, s.colour, s.points, s.end), round(s.label_y - over, 1), s.told) for s in lines]
    x_ticks = tuple((x(k), str(k)) for k in (1, 5, 10, 15, 20) if k <= depth)
    y_ticks = tuple(zip(map(y, steps), tick_texts(steps), strict=True))
    summary = f"{metric} at k from 1 to {depth}. " + ". ".join(line.told for line in lines)
    return CurveChart(metric, tuple(lines), x_ticks, y_ticks, summary, right=empty.right)


@dataclass(frozen=True, slots=True)
class Mark:
    """One model's mean and interval in one group, in SVG coordinates."""

    colour: int
    x: float
    low: float
    high: float
    y: float
    told: str


@dataclass(frozen=True, slots=True)
class Band:
    """One group of users: its name, how many there are, and a mark a model."""

    label: str
    count: str
    few: bool
    top: float
    middle: float
    marks: tuple[Mark, ...]


@dataclass(frozen=True, slots=True)
class GroupChart:
    """One dimension: groups from top to bottom, the metric from left to right; `table` holds the numbers."""

    dimension: Dimension
    bands: tuple[Band, ...]
    x_ticks: tuple[Tick, ...]
    height: float
    summary: str
    table: tuple[tuple[str, tuple[str, ...]], ...]
    width: int = 420
    left: int = 104
    right: int = 408
    top: int = 8


PITCH, CLOSE_PITCH, CLOSE_FROM = 12, 9, 7  # pixels a model; the closer ones from this many models on
PADDING = 8


def group_charts(board: Leaderboard) -> tuple[GroupChart, ...]:
    """Lay out one chart a dimension that parts the users at all, all on one scale."""
    rows = [row for row in board.rows if row.ok and row.groups]
    parted = [dimension for dimension in board.dimensions if len(dimension.labels) > 1]
    if not rows or not parted:
        return ()
    parts = [part for row in rows for dimension in parted for part in row.groups[dimension.key]]
    steps = round_steps(min(part.low for part in parts), max(part.high for part in parts))
    return tuple(_group_chart(dimension, rows, series(board), steps, board.valid_metric) for dimension in parted)


def _group_chart(
    dimension: Dimension, rows: list[Row], colours: dict[str, int], steps: list[float], metric: str
) -> GroupChart:
    left, right, top = 104, 408, 8
    pitch = CLOSE_PITCH if len(rows) >= CLOSE_FROM else PITCH
    tall = max(30, len(rows) * pitch + PADDING)

    def x(value: float) -> float:
        return round(left + (value - steps[0]) / (steps[-1] - steps[0]) * (right - left), 1)

    bands = []
    for number, (label, count) in enumerate(zip(dimension.labels, dimension.counts, strict=True)):
        start = top + number * tall
        marks = []
        for place, row in enumerate(rows):
            part = row.groups[dimension.key][number]
            y = start + tall / 2 + (place + 0.5 - len(rows) / 2) * pitch
            told = f"{row.model}, {label}: {metric} {_say(part)}, {part.n} users"
            marks.append(Mark(colours[row.model], x(part.mean), x(part.low), x(part.high), y, told))
        users = f"{count:,} {'user' if count == 1 else 'users'}"
        bands.append(Band(label, users, count < FEW, start, start + tall / 2, tuple(marks)))
    table = tuple((row.model, tuple(_say(part) for part in row.groups[dimension.key])) for row in rows)
    ticks = tuple(zip(map(x, steps), tick_texts(steps), strict=True))
    summary = f"{metric} by {dimension.title.lower()}; the same numbers are in the table below."
    return GroupChart(dimension, tuple(bands), ticks, top + len(bands) * tall, summary, table)


def _say(part: GroupPart) -> str:
    return f"{part.mean:.3f} [{part.low:.3f}, {part.high:.3f}]"
