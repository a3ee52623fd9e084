"""What an atomic file must be for a run to read it: a damaged one is one line with its place, and no row is invented.

RecBole reads files through pandas, which shifts the values of a row that has one too many or too few, and fills a
missing time with the mean of all. What is found here is found before that, and before any model is loaded.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.resources import MLLM
from recbole_mllm.data.atomic import id_fault, read_columns, read_values

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

    @classmethod
    def of(cls, dataset: Any, source: Any) -> Rules | None:
        """Return what RecBole's `dataset` needs of its file `source`; None where nothing of it is loaded."""
        config, kind = dataset.config, str(getattr(source, "value", source))
        load, unload = dataset._get_load_and_unload_col(source)
        if load == set() or len(config["field_separator"]) != 1:  # a longer one is a pattern to pandas
            return None
        user, item = dataset.uid_field, dataset.iid_field
        fields = {"inter": (user, item), "user": (user,), "item": (item,)}.get(kind, ())
        timed = kind == "inter" and dataset.benchmark_filename_list is None
        return cls(
            ids=tuple(field for field in fields if field is not None),
            time=dataset.time_field if timed else None,
            ordered=timed and (config["eval_args"] or {}).get("order") == "TO",
            unique=kind in ("user", "item"),
            loaded=lambda name: (load is None or name in load) and (unload is None or name not in unload),
            separator=config["field_separator"],
            words=config["seq_separator"],
            encoding=config["encoding"],
        )


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
                    f"{path}:{number}: {names[unique]} {values[unique]!r} is already in line {first}, with other "
                    "values; keep one of the two"
                )
    if number == 1:
        inter = path.suffix == ".inter"
        what = "write the interactions into it, one a line" if inter else "remove the file if nothing needs it"
        raise UserError(f"{path} holds no row behind its header; {what}")


def _check_of(name: str, kind: str, rules: Rules) -> Callable[[str], str | None] | None:
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


def read_checked(path: Path, rules: Rules, read: Callable[[], Any]) -> Any:
    """Return the frame that `read` makes of `path`; the slow check comes only where the quick one is not certain.

    Whatever stops RecBole is looked for in the file, as its words name no line.
    """
    check_columns(path, rules)
    try:
        frame = read()
    except UserError:
        raise
    except Exception:  # whatever pandas or RecBole raise for a file: the exact reader may know its place
        check_file(path, rules)
        raise
    if frame is None or not frame.attrs.pop("plain", False) or _is_suspicious(frame, rules):
        check_file(path, rules)
    return frame


def _is_suspicious(frame: Any, rules: Rules) -> bool:
    """Return whether the frame of a plain file has a time that is none, or an id that is none or stands twice."""
    if rules.time in frame.columns and not np.isfinite(frame[rules.time].to_numpy()).all():
        return True
    for name in filter(frame.columns.__contains__, rules.ids):
        ids = frame[name].unique()
        if rules.unique and len(ids) < len(frame) or any(not isinstance(i, str) or id_fault(i) for i in ids):
            return True
    return False


def is_checked(config: Any) -> bool:
    """Return whether files are checked for a run: ours and MLLMMSR's; a stock run of another model is left as it is."""
    return config["frozen_candidates"] is True or config["model"] == MLLM


def check_files(dataset: Any, token: str, folder: Path) -> None:
    """Refuse a folder, a device or a link that leads nowhere in a file's place, and want of interactions."""
    parts = dataset.benchmark_filename_list
    inter = [f"{token}.inter"] if parts is None else [f"{token}.{part}.inter" for part in parts]
    if parts is not None and dataset.config["temporal_split"]:
        inter.append(f"{token}.inter")
    for name in (*inter, f"{token}.item", f"{token}.user"):
        path = folder / name
        if os.path.lexists(path) and not path.is_file():
            raise UserError(f"{path} is no file; put one in its place, or remove it")
        if name in inter and not path.exists():
            named = "a file is named after its folder" if parts is None else f"benchmark_filename names {parts}"
            raise UserError(f"{path} does not exist; interactions are read from it ({named})")


@contextmanager
def explain_what_is_left(config: Any, dataset: Any = None) -> Iterator[None]:
    """Say what RecBole means where it fails on a dataset, read already or not, of which nothing is left.

    Raises:
        UserError: Everything has been filtered away, no row is left to train on, or a user has met all items.
    """
    try:
        yield
    except ValueError as error:
        said = str(error) if is_checked(config) else ""
        if "Some feat is empty" in said:  # data/dataset/dataset.py:1063
            raise UserError(
                f"no interaction of {config['dataset']} is left after filtering; loosen user_inter_num_interval, "
                "item_inter_num_interval, val_interval and the like"
            ) from error
        if "num_samples should be a positive" in said:  # torch's sampler of no row
            raise nothing_left(dataset, "train on") from error
        if "interacted with all items" in said:  # sampler/sampler.py:257
            raise _all_met(dataset) from error
        raise


def check_parts(config: Any, dataset: Any, train: Any, valid: Any, test: Any) -> None:
    """Refuse a split, given as loaders, that leaves nothing to train or test on; warn where nothing is to validate on.

    Raises:
        UserError: Nothing is left to train or to test on.
    """
    if not is_checked(config):
        return
    for loader, to in ((train, "train on"), (test, "test on")):
        if not len(loader._dataset.inter_feat):
            raise nothing_left(dataset, to)
    if not len(valid._dataset.inter_feat):
        logging.getLogger().warning(f"{nothing_left(dataset, 'validate on')}; the last epoch will be taken as it is")


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


def _all_met(dataset: Any) -> UserError:
    rows = dataset.inter_feat
    users, items = (rows[field].numpy() for field in (dataset.uid_field, dataset.iid_field))
    met = np.bincount(np.unique(users * dataset.item_num + items) // dataset.item_num)
    user = dataset.id2token(dataset.uid_field, int(met.argmax()))
    return UserError(
        f"user {user} has met all {dataset.item_num - 1} items, so none is left to be drawn as a negative; leave such "
        "users out (user_inter_num_interval; before a split), or add items"
    )
