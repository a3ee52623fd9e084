"""What the HTML pages share: one style, templates in which every text is escaped, and charts as SVG.

A chart is laid out here, in SVG coordinates; ``chart.html`` draws its axes, and the page's own template its marks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

LABEL_GAP = 14
CHARACTER = 6.6  # width of a label's character at the size the pages draw it


@cache
def environment(templates: Path) -> Environment:
    """Return the environment of the templates in `templates`, with the shared ones beside; HTML escapes every text."""
    loader = FileSystemLoader([templates, Path(__file__).parent / "templates"])
    return Environment(
        loader=loader, autoescape=lambda name: str(name).endswith(("html", "css", "js")), undefined=StrictUndefined,
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


def score_axis(low: float, high: float, start: float, end: float) -> Axis:
    """Return a linear axis of a metric that encloses ``[low, high]``, at least 0.02 wide, with round labels."""
    steps = round_steps(low, max(high, low + 0.02), most=6, least=0.01)
    return Axis(steps[0], steps[-1], start, end, labels=list(zip(steps, tick_texts(steps), strict=True)))


def count_axis(high: int, start: float, end: float) -> Axis:
    """Return a linear axis of a count, from 0."""
    steps = round_steps(0, max(1, high), most=5, least=1)
    return Axis(0, steps[-1], start, end, labels=[(step, short(int(step))) for step in steps])


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


def round_steps(low: float, high: float, most: int, least: float) -> list[float]:
    """Return up to about `most` round values that enclose ``[low, high]``, 1, 2 or 5 times a power of ten apart."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    size = max(least, next(f * power for f in (1, 2, 5, 10) if (high - low) / (f * power) <= most * (1 + 1e-9)))
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [round(index * size, 6) for index in range(first, max(last, first + 1) + 1)]


def tick_texts(steps: Sequence[float]) -> list[str]:
    """Return tick values with as many decimals as tell them apart, the same for all."""
    for places in range(1, 6):
        texts = [f"{step:.{places}f}" for step in steps]
        if all(abs(float(text) - step) < 1e-9 for text, step in zip(texts, steps, strict=True)):
            break
    return texts


def short(value: int) -> str:
    """Return a tick's number in few characters."""
    for unit, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= unit:
            return f"{value / unit:g}{letter}"
    return str(value)


class Label(NamedTuple):
    """Where a mark's label stands: its height, and its left and right end."""

    y: float
    left: float
    right: float


def place_labels(wanted: Iterable[Label]) -> list[float]:
    """Return each label's height, from the top one down, moved below those before where they would overlap."""
    placed: list[Label] = []
    for label in wanted:
        y = label.y
        while hit := [
            p.y for p in placed if p.left < label.right and label.left < p.right and abs(p.y - y) < LABEL_GAP - 1
        ]:
            y = max(hit) + LABEL_GAP
        placed.append(label._replace(y=y))
    return [label.y for label in placed]
