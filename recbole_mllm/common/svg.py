"""What the HTML pages share: one style, templates in which every text is escaped, and charts as SVG.

A chart is laid out here, in SVG coordinates; ``chart.html`` draws its axes, and the page's own template its marks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

LABEL_GAP = 14
_ESCAPED = ("html", "css", "js", "svg")
CHARACTER = 6.6  # width of a label's character at the size the pages draw it


@cache
def environment(templates: Path) -> Environment:
    """Return the environment of the templates in `templates`, with the shared ones beside; HTML escapes every text."""
    loader = FileSystemLoader([templates, Path(__file__).parent / "templates"])
    return Environment(
        loader=loader, autoescape=lambda name: str(name).endswith(_ESCAPED), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Axis:
    """Maps values between `low` and `high` to pixels between `start` and `end`, logarithmically where `log` says so."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    labels: Sequence[tuple[float, str]] = ()

    def __call__(self, value: float) -> float:
        """Return the pixel of `value`, to a tenth."""
        if self.log:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return round(self.start + part * (self.end - self.start), 1)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """The labels, each behind its pixel."""
        return [(self(value), text) for value, text in self.labels]


@dataclass(frozen=True, slots=True)
class Chart:
    """Two axes with their titles, and the marks between them; `summary` says in words what is drawn."""

    title: str
    x: Axis
    y: Axis
    width: float
    height: float
    x_title: str = ""
    y_title: str = ""
    marks: Sequence[Any] = ()
    summary: str = ""
    more: dict[str, Any] = field(default_factory=dict)


def linear_axis(low: float, high: float, start: float, end: float, *, counts: bool = False) -> Axis:
    """Return an axis that encloses ``[low, high]``, with up to about six round labels; of `counts` whole numbers.

    Labels are 1, 2 or 5 times a power of ten apart, at least 0.01.
    """
    most, least = (5, 1.0) if counts else (6, 0.01)
    high = max(high, low + (1 if counts else 0.02))
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    size = max(least, next(f * power for f in (1, 2, 5, 10) if (high - low) / (f * power) <= most * (1 + 1e-9)))
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    steps = [round(index * size, 6) for index in range(first, max(last, first + 1) + 1)]
    places = max(1, *(len(f"{step:g}".partition(".")[2]) for step in steps))
    texts = [short(int(step)) if counts else f"{step:.{places}f}" for step in steps]
    return Axis(steps[0], steps[-1], start, end, labels=list(zip(steps, texts, strict=True)))


def log_count_axis(low: int, high: int, start: float, end: float) -> Axis:
    """Return a logarithmic axis of a count, with labels at 1, 10, 100, ... and between where that leaves few."""
    high = max(high, low + 1)
    values: list[int] = []
    for factors in ((1,), (1, 3), (1, 2, 5)):
        values = [f * 10**d for d in range(math.ceil(math.log10(high)) + 1) for f in factors]
        values = [value for value in values if low <= value <= high]
        if len(values) >= 3:
            break
    return Axis(low, high, start, end, log=True, labels=[(value, short(value)) for value in values])


def short(value: int) -> str:
    """Return a tick's number in few characters."""
    for unit, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= unit:
            return f"{value / unit:g}{letter}"
    return str(value)


def place_labels(wanted: Iterable[tuple[float, float, float]], gap: float = LABEL_GAP) -> list[float]:
    """Return each label's height, given height, left and right end, from the top one down.

    Heights are at least `gap` apart: a label is moved below those before it that it would overlap.
    """
    placed: list[tuple[float, float, float]] = []
    for y, left, right in wanted:
        while hit := [p[0] for p in placed if p[1] < right and left < p[2] and abs(p[0] - y) < gap - 1]:
            y = max(hit) + gap
        placed.append((y, left, right))
    return [y for y, _, _ in placed]
