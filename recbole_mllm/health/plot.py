"""Where the marks of the page's plots stand; the template draws them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recbole_mllm.health.measure import Health
from recbole_mllm.health.wording import many, moment

WIDTH, HEIGHT = 420, 260
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 26, 44
MAX_POINTS = 240
Tick = tuple[float, str]


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar in SVG coordinates, and what it says."""

    x: float
    y: float
    width: float
    height: float
    told: str


@dataclass(frozen=True, slots=True)
class Plot:
    """Bars or a line between two axes; each tick is its place and its text."""

    title: str
    x_axis: str
    y_axis: str
    note: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    bars: tuple[Bar, ...] = ()
    line: str = ""
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def plots(health: Health) -> list[Plot]:
    """Return the plots there is data for."""
    if not health.n_interactions:
        return []
    drawn = [history_lengths(health.lengths), item_popularity(health.popularity)]
    order = health.order
    ranks = (
        order is None or order.last - order.first + 1 == health.n_interactions
    )  # no times, but places: a flat picture
    return drawn if ranks or not health.over_time.any() else [*drawn, over_time(health)]


def history_lengths(lengths: NDArray[np.int64]) -> Plot:
    """Return the histogram of interactions a user, in bins that grow with the length; `lengths` ascend."""
    edges = _growing(int(lengths[0]), int(lengths[-1]))
    counts = np.histogram(lengths, bins=np.array(edges))[0]
    x = _Log(edges[0], edges[-1])
    steps, y = _upright(int(counts.max()))
    bars = []
    for low, high, count in zip(edges, edges[1:], counts.tolist(), strict=False):
        told = f"{low:,}" if high == low + 1 else f"{low:,} to {high - 1:,}"
        bars.append(_bar(x(low), x(high), y(count), f"{told} interactions: {many(count, 'user', 'users')}"))
    return Plot(
        "History lengths", "interactions of a user, log scale", "users", "", x.ticks(), steps, tuple(bars)
    )  # fmt: skip


def item_popularity(popularity: NDArray[np.int64]) -> Plot:
    """Return interactions against rank, both on log axes; `popularity` ascends."""
    counts = popularity[::-1]
    ranks = np.unique(np.geomspace(1, len(counts), MAX_POINTS).round().astype(int))
    x, y = _Log(1, max(2, len(counts))), _Log(1, max(2, int(counts[0])), start=HEIGHT - BOTTOM, end=TOP)
    line = " ".join(f"{x(rank)},{y(int(counts[rank - 1]))}" for rank in ranks.tolist())
    fifth = counts[: max(1, len(counts) // 5)].sum() / counts.sum()
    note = f"The most popular fifth of the items has {100 * fifth:.0f} % of the interactions."
    return Plot(
        "Item popularity", "items by popularity, log scale", "interactions, log scale", note, x.ticks(), y.ticks(),
        line=line,
    )  # fmt: skip


def over_time(health: Health) -> Plot:
    """Return interactions in equal stretches of time."""
    assert health.order is not None
    counts, order = health.over_time.tolist(), health.order
    steps, y = _upright(max(counts))
    size = (WIDTH - RIGHT - LEFT) / len(counts)
    stretch = (order.last - order.first) / len(counts)
    bars = tuple(
        _bar(
            LEFT + n * size, LEFT + (n + 1) * size, y(count),
            f"from {moment(order.first + n * stretch)}: {many(count, 'interaction', 'interactions')}",
        )
        for n, count in enumerate(counts)
    )  # fmt: skip
    ends = (LEFT, moment(order.first)), (WIDTH - RIGHT, moment(order.last))
    return Plot("Interactions over time", "time", "interactions", "", ends, steps, bars)


def _bar(left: float, right: float, top: float, told: str) -> Bar:
    width = max(0.5, right - left - min(1.5, 0.2 * (right - left)))
    return Bar(round(left, 1), top, round(width, 1), round(HEIGHT - BOTTOM - top, 1), told)


class _Log:
    """A logarithmic axis from `low` to `high`, drawn from `start` to `end`."""

    def __init__(self, low: int, high: int, start: float = LEFT, end: float = WIDTH - RIGHT) -> None:
        self.low, self.high, self.start, self.end = low, max(high, low + 1), start, end

    def __call__(self, value: int) -> float:
        part = math.log(value / self.low) / math.log(self.high / self.low)
        return round(self.start + part * (self.end - self.start), 1)

    def ticks(self) -> tuple[Tick, ...]:
        """Return ticks at 1, 10, 100, ..., with 2 and 5 between them where that leaves few."""
        decades = range(math.ceil(math.log10(self.high)) + 1)
        for factors in ((1,), (1, 3), (1, 2, 5)):
            values = [f * 10**d for d in decades for f in factors if self.low <= f * 10**d <= self.high]
            if len(values) >= 3:
                break
        return tuple((self(value), short(value)) for value in values)


def _growing(low: int, high: int) -> list[int]:
    """Return edges of bins whose widths grow by a fifth, at least 1; the last edge is beyond `high`."""
    edges = [max(1, low)]
    while edges[-1] <= high:
        edges.append(edges[-1] + max(1, round(edges[-1] * 0.2)))
    return edges


class _Scale:
    """A linear axis upwards from 0."""

    def __init__(self, high: float) -> None:
        self.high = high

    def __call__(self, value: float) -> float:
        return round(HEIGHT - BOTTOM - value / self.high * (HEIGHT - BOTTOM - TOP), 1)


def _upright(high: int) -> tuple[tuple[Tick, ...], _Scale]:
    """Return the ticks and the scale of a linear axis that holds `high`."""
    power = 10 ** math.floor(math.log10(max(1, high)))
    step = next((f * power for f in (0.2, 0.5, 1, 2) if high / (f * power) <= 5), 5 * power)
    step = max(1, int(step))
    top = math.ceil(high / step) * step
    scale = _Scale(top)
    return tuple((scale(value), short(value)) for value in range(0, top + 1, step)), scale


def short(value: int) -> str:
    """Return a tick's number in few characters."""
    for unit, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= unit:
            return f"{value / unit:g}{letter}"
    return str(value)
