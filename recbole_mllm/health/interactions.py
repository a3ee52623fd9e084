"""Every interaction as numbers, read in one pass over the files."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recbole_mllm.data import schema
from recbole_mllm.data.atomic import read_columns, read_values, unquoted
from recbole_mllm.data.checking import Rules, check_columns, fault, is_missing, time_problem
from recbole_mllm.data.values import impossible_times
from recbole_mllm.errors import UserError
from recbole_mllm.health.layout import Layout
from recbole_mllm.health.sample import Sample


@dataclass(frozen=True, slots=True)
class Interactions:
    """Interactions in the file's order; `user` and `item` are places in `users` and `items`, the raw ids.

    Attributes:
        time: Float64, NaN where none is given; None where the dataset has no time, as benchmark files.
        row_hashes: One of each line, to find lines that are there twice.
        impossible_times: How many times lie at or before 1970, and after tomorrow; of the source's own, where
            `convert` wrote them beside places in the order.
        quoted: Values that start with a quote, which RecBole drops or which break its reading.
    """

    users: list[str]
    items: list[str]
    user: NDArray[np.int32]
    item: NDArray[np.int32]
    time: NDArray[np.float64] | None
    impossible_times: tuple[int, int]
    row_hashes: NDArray[np.int64]
    quoted: Sample
    parts: dict[str, int]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Return the number of interactions of each user."""
        return np.bincount(self.user, minlength=len(self.users))

    @property
    def popularity(self) -> NDArray[np.int64]:
        """Return the number of interactions of each item."""
        return np.bincount(self.item, minlength=len(self.items))


@dataclass(slots=True)
class _Reading:
    users: dict[str, int] = field(default_factory=dict)
    items: dict[str, int] = field(default_factory=dict)
    user: array[int] = field(default_factory=lambda: array("i"))
    item: array[int] = field(default_factory=lambda: array("i"))
    time: array[float] = field(default_factory=lambda: array("d"))
    exact_time: array[float] = field(default_factory=lambda: array("d"))
    hashes: array[int] = field(default_factory=lambda: array("q"))
    quoted: Sample = field(default_factory=Sample)


def read_interactions(layout: Layout) -> Interactions:
    """Read all interactions; of benchmark files, each user's longest history with its target.

    Raises:
        UserError: A file cannot be read, or a time is no number (file and line are named).
    """
    reading = _Reading()
    histories: dict[int, array[int]] = {}
    parts: dict[str, int] = {}
    timed = layout.history is None and layout.time in read_columns(layout.inter[0])
    for path in layout.inter:
        before = len(reading.hashes)
        if layout.history is None:
            _read_rows(reading, path, layout, timed)
        else:
            _read_histories(reading, path, layout, histories)
        parts[path.name.removeprefix(layout.name + ".").removesuffix("inter").rstrip(".")] = (
            len(reading.hashes) - before
        )
    for user, items in histories.items():
        reading.user.extend([user] * len(items))
        reading.item.extend(items)
    return Interactions(
        list(reading.users), list(reading.items), _numbers(reading.user, "i4"), _numbers(reading.item, "i4"),
        _numbers(reading.time, "f8") if timed else None, impossible_times(reading.exact_time or reading.time),
        _numbers(reading.hashes, "i8"),
        reading.quoted, parts,
    )  # fmt: skip


def _numbers(values: array[Any], kind: str) -> NDArray[Any]:
    return np.frombuffer(values, dtype=kind) if values else np.empty(0, kind)


def _read_rows(reading: _Reading, path: Path, layout: Layout, timed: bool) -> None:
    rules = Rules((layout.user, layout.item), layout.time)
    columns = list(check_columns(path, rules))
    at_user, at_item = columns.index(layout.user), columns.index(layout.item)
    at_time = columns.index(layout.time) if timed else 0
    at_exact = columns.index(schema.EXACT_TIME) if timed and schema.EXACT_TIME in columns else None
    users, items = reading.users, reading.items
    add_user, add_item, add_time = reading.user.append, reading.item.append, reading.time.append
    for number, values in read_values(path):
        add_user(users.setdefault(values[at_user], len(users)))
        add_item(items.setdefault(values[at_item], len(items)))
        if timed:
            add_time(_time(values[at_time], path, number, rules))
        if at_exact is not None:
            reading.exact_time.append(_float(values[at_exact]))
        _note_row(reading, values, path, number)


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _time(value: str, path: Path, number: int, rules: Rules) -> float:
    """Return the time, NaN where there is none: those are counted."""
    if is_missing(value):
        return float("nan")
    if (problem := time_problem(value)) is not None:
        raise fault(path, number, str(rules.time), problem, rules)
    return float(value)


def _note_row(reading: _Reading, values: list[str], path: Path, number: int) -> None:
    reading.hashes.append(hash(tuple(values)))
    for value in values:
        if value[:1] == '"':
            unquoted(path, number, "\t".join(values))  # what no run can read is no mere finding
            reading.quoted.add(f"{path.name}:{number}: {value[:60]!r}")


def _read_histories(reading: _Reading, path: Path, layout: Layout, histories: dict[int, array[int]]) -> None:
    columns = list(read_columns(path))
    if layout.history not in columns:
        raise UserError(f"{path}:1: there is no column {layout.history}, which {layout.inter[0].name} has")
    at_user, at_item, at_history = (columns.index(str(name)) for name in (layout.user, layout.item, layout.history))
    users, items = reading.users, reading.items
    for number, values in read_values(path):
        words = (word for word in values[at_history].split(" ") if word)
        row = array("i", _places(items, [*words, values[at_item]]))
        user = users.setdefault(values[at_user], len(users))
        if len(row) > len(histories.get(user, ())):
            histories[user] = row
        _note_row(reading, values, path, number)


def _places(known: dict[str, int], ids: Iterable[str]) -> list[int]:
    return [known.setdefault(word, len(known)) for word in ids]
