"""What an atomic file must be for a run to read it: a damaged one is one line with its place, and no row is invented.

RecBole reads files through pandas, which shifts the values of a row that has one too many or too few, and fills a
missing time with the mean of all. What is found here is found before that, and before any model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recbole_mllm.common.errors import UserError
from recbole_mllm.data.atomic import MAX_ID_CHARACTERS, PAD, read_columns, read_values

# what pandas takes for a missing number, in any case and with spaces around (recbole_patches/libraries.py has the list)
_MISSING = frozenset({"", "na", "n/a", "nan", "-nan", "null", "none", "<na>", "#n/a", "#na", "#n/a n/a", "1.#ind",
                      "-1.#ind", "1.#qnan", "-1.#qnan"})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rules:
    """What a run needs of a file.

    Attributes:
        ids: Columns that must be there, of type token, with an id in every row.
        time: The column of times, of type float, in which every row must have one where it is loaded.
        ordered: Whether rows are ordered by time, so that the column must be there.
        unique: Whether each id of the first of `ids` may stand in one row only, unless its rows are the same.
        loaded: Whether a column is loaded: numbers of others may be anything.
    """

    ids: tuple[str, ...] = ()
    time: str | None = None
    ordered: bool = False
    unique: bool = False
    loaded: Callable[[str], bool] = lambda name: True
    separator: str = "\t"
    words: str = " "
    encoding: str | None = None


def is_missing(value: str) -> bool:
    """Return whether pandas takes `value` for a number that is not there."""
    return value.strip().lower() in _MISSING


def number_problem(value: str) -> str | None:
    """Return why `value` is no number, or None; infinity is one."""
    try:
        if "_" in value:  # Python alone takes 1_000 for a number
            raise ValueError
        float(value)
    except ValueError:
        return f"{value[:40]!r} is no number"
    return None


def time_problem(value: str) -> str | None:
    """Return why `value` is no moment, or None."""
    if not value.strip():
        return "is missing"
    if is_missing(value):
        return f"{value[:40]!r} is no number"
    return number_problem(value) or (None if math.isfinite(float(value)) else f"{value[:40]!r} is infinite")


def id_fault(value: str) -> str | None:
    """Return why RecBole cannot take `value` for an id, or None; `id_problem` is stricter, for ids that we write."""
    if not value:
        return "is empty"
    if value == PAD:
        return f"is {PAD}, which RecBole reserves"
    if len(value) > MAX_ID_CHARACTERS:
        return f"has {len(value):,} characters, more than {MAX_ID_CHARACTERS:,}"
    return None


def check_columns(path: Path, rules: Rules) -> dict[str, str]:
    """Return the columns of `path`, ``{name: type}``.

    Raises:
        UserError: The header cannot be read, or lacks what `rules` ask for.
    """
    columns = read_columns(path, rules.separator, rules.encoding)
    for name in rules.ids:
        if name not in columns:
            raise UserError(
                f"{path}:1: there is no column {name}; its columns are {', '.join(columns)}; name yours with "
                "USER_ID_FIELD and ITEM_ID_FIELD, in dataset.yaml or a config file"
            )
        if columns[name] != "token":
            raise UserError(f"{path}:1: {name} must be a token, not {columns[name]}; write {name}:token")
    if rules.ordered and rules.time is None:
        raise UserError(f"{path}:1: rows are ordered by time, and TIME_FIELD is null; name the column of times in it")
    if rules.ordered and (rules.time not in columns or not rules.loaded(str(rules.time))):
        where = "load_col leaves it out" if rules.time in columns else f"the columns are {', '.join(columns)}"
        raise UserError(
            f"{path}:1: rows are ordered by time, and there is no {rules.time}: {where}; add {rules.time}:float, or "
            "name the column of times in TIME_FIELD"
        )
    if rules.time in columns and columns[rules.time] != "float":
        raise UserError(
            f"{path}:1: {rules.time} is the time and must be a float, not {columns[rules.time]}; write "
            f"{rules.time}:float"
        )
    return columns


def check_file(path: Path, rules: Rules) -> None:
    """Read `path` value by value and refuse the first that a run could not take.

    Raises:
        UserError: Names file and line, and what to do.
    """
    columns = check_columns(path, rules)
    names = list(columns)
    checks = [(n, name, check) for n, name in enumerate(names) if (check := _check_of(name, columns[name], rules))]
    seen: dict[str, tuple[int, list[str]]] = {}
    unique = names.index(rules.ids[0]) if rules.unique and rules.ids else None
    number = 1
    for number, values in read_values(path, rules.separator, rules.encoding, quotes=True):
        for place, name, check in checks:
            if (problem := check(values[place])) is not None:
                raise fault(path, number, name, problem, rules)
        if unique is not None:
            first, before = seen.setdefault(values[unique], (number, values))
            if before != values:
                raise UserError(
                    f"{path}:{number}: {names[unique]} {values[unique]!r} stands in line {first} already, with other "
                    "values; keep one of the two"
                )
    if number == 1:
        inter = path.suffix == ".inter"
        what = "write the interactions into it, one a line" if inter else "remove the file if nothing needs it"
        raise UserError(f"{path} holds no row behind its header; {what}")


def _check_of(name: str, kind: str, rules: Rules) -> Callable[[str], str | None] | None:
    """Return what finds fault with a value of a column, if anything may."""
    if name in rules.ids:
        return id_fault
    if not rules.loaded(name):
        return None
    if name == rules.time:
        return time_problem
    if kind == "float":
        return lambda value: None if is_missing(value) else number_problem(value)
    if kind == "float_seq":
        return lambda value: next(filter(None, map(number_problem, filter(None, value.split(rules.words)))), None)
    return None


def fault(path: Path, number: int, name: str, problem: str, rules: Rules) -> UserError:
    """Return what is said of a value with a `problem`, the same in a run and in ``inspect``."""
    todo = "write a number, or nothing where it is unknown"
    if name in rules.ids:
        todo = "give it another, or remove the row"
    elif name == rules.time:
        todo = "write seconds, such as 1700000000, or remove the row"
    return UserError(f"{path}:{number}: {name} {problem}; {todo}")


def nothing_left(dataset: Any, to: str) -> UserError:
    """Return what is said of a split that leaves no row `to` do something with."""
    name, config = dataset.dataset_name, dataset.config
    split = (config["eval_args"] or {}).get("split") or {}
    if dataset.benchmark_filename_list is not None:
        hint = f"look into {', '.join(f'{name}.{part}.inter' for part in dataset.benchmark_filename_list)}"
    elif "LS" in split:
        hint = "leaving one out tests users of at least 3 interactions, and validates on users of at least 4"
    else:
        hint = f"eval_args.split is {split}"
    return UserError(f"no row of {name} is left to {to}, of {dataset.user_num - 1} users; {hint}")


def all_met(dataset: Any) -> UserError:
    """Return what is said where a user has met every item, so that none is left to be drawn as a negative."""
    rows = dataset.inter_feat
    users, items = (rows[field].numpy() for field in (dataset.uid_field, dataset.iid_field))
    met = np.bincount(np.unique(users * dataset.item_num + items) // dataset.item_num)
    user = dataset.id2token(dataset.uid_field, int(met.argmax()))
    return UserError(
        f"user {user} has met all {dataset.item_num - 1} items, so none is left to be drawn as a negative; filter such "
        "users (user_inter_num_interval), or add items"
    )
