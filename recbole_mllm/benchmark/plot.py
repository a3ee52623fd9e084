"""Where the marks of the quality-versus-cost plot stand; the template draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from recbole_mllm.benchmark.leaderboard import Leaderboard, Row
from recbole_mllm.benchmark.wording import say_score, say_seconds

WIDTH, HEIGHT = 520, 340
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 18, 46
LABEL_GAP = 14
NAMED = 8  # marks that can carry their names; of more each carries its number, and the names stand below
CHARACTER = 6.6  # width of a label's character at the size the page draws it
BOLD = 1.2  # how much wider an MLLM's label is
TIMES = (0.1, 1, 10, 60, 600, 3600, 36_000, 360_000, 3_600_000)


@dataclass(frozen=True, slots=True)
class Point:
    """One row in the plot, in SVG coordinates; `anchor` says on which side of the mark its label stands.

    `label` is the row's name or, where there are too many for that, its number in the table.
    """

    name: str
    label: str
    kind: str
    x: float
    y: float
    low: float
    high: float
    label_x: float
    label_y: float
    anchor: str
    told: str


@dataclass(frozen=True, slots=True)
class Plot:
    """The plot's points and ticks, each tick as (place, text); `key` names the marks that are numbered."""

    metric: str
    points: tuple[Point, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    key: tuple[Point, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def quality_versus_cost(board: Leaderboard) -> Plot | None:
    """Lay out the plot of all finished rows; None if there are none, or none has told its cost."""
    rows = [row for row in board.rows if row.ok and row.seconds > 0 and board.valid_metric in row.scores]
    if not rows:
        return None
    metric = board.valid_metric
    low_s, high_s = _time_range([row.seconds for row in rows])
    bounds = [row.scores[metric].ci95 or (row.mean(metric),) * 2 for row in rows]
    steps = round_steps(min(low for low, _ in bounds), max(high for _, high in bounds))

    def x(seconds: float) -> float:
        share = math.log(seconds / low_s) / math.log(high_s / low_s)
        return round(LEFT + share * (WIDTH - RIGHT - LEFT), 1)

    def y(value: float) -> float:
        share = (value - steps[0]) / (steps[-1] - steps[0])
        return round(HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP), 1)

    marks = [(row, x(row.seconds), y(row.mean(metric)), y(b[0]), y(b[1])) for row, b in zip(rows, bounds, strict=True)]
    ticks = tuple((x(time), say_seconds(time)) for time in TIMES if low_s <= time <= high_s)
    points = _points(board, marks)
    key = tuple(sorted(points, key=lambda point: int(point.label))) if len(points) > NAMED else ()
    return Plot(metric, points, ticks, tuple(zip(map(y, steps), tick_texts(steps), strict=True)), key)


def _points(board: Leaderboard, marks: Sequence[tuple[Row, float, float, float, float]]) -> tuple[Point, ...]:
    """Set each label beside its mark, moved down past those already set where they would overlap."""
    numbers = {row.model: str(number) for number, row in enumerate(board.rows, start=1)}
    placed: list[tuple[float, float, float]] = []
    points = []
    for row, x, y, low, high in sorted(marks, key=lambda mark: mark[2]):
        label = row.model if len(marks) <= NAMED else numbers[row.model]
        length = len(label) * CHARACTER * (BOLD if row.kind == "mllm" else 1)
        right = x + 10 + length <= WIDTH
        start = x + 10 if right else x - 10 - length
        label_y = y
        while hit := [
            at for a, b, at in placed if a < start + length and start < b and abs(at - label_y) < LABEL_GAP - 1
        ]:
            label_y = max(hit) + LABEL_GAP
        placed.append((start, start + length, label_y))
        said = say_score(board, row, board.valid_metric)
        told = f"{row.model}: {board.valid_metric} {said.mean} {said.interval}, {say_seconds(row.seconds)}"
        side = (x + 10, "start") if right else (x - 10, "end")
        points.append(Point(row.model, label, row.kind, x, y, low, high, side[0], round(label_y + 4, 1), side[1], told))
    return tuple(points)


def _time_range(seconds: Sequence[float]) -> tuple[float, float]:
    """Return bounds of the logarithmic axis with room on both sides, at least a factor of ten apart."""
    low, high = min(seconds) / 1.5, max(seconds) * 1.5
    middle = math.sqrt(low * high)
    return min(low, middle / math.sqrt(10)), max(high, middle * math.sqrt(10))


def round_steps(low: float, high: float) -> list[float]:
    """Return round tick values that enclose ``[low, high]``."""
    span = max(high - low, 0.02)
    size = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 10.0) if span / step <= 6)
    first, last = math.floor(low / size), math.ceil(high / size)
    return [round(index * size, 4) for index in range(first, max(last, first + 1) + 1)]


def tick_texts(steps: Sequence[float]) -> list[str]:
    """Return tick values with as many decimals as tell them apart, the same for all."""
    for places in range(1, 6):
        texts = [f"{step:.{places}f}" for step in steps]
        if all(abs(float(text) - step) < 1e-9 for text, step in zip(texts, steps, strict=True)):
            break
    return texts
