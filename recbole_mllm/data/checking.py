"""The check of the atomic files that a run reads: a damaged one is one line with its place, and no row is invented.

RecBole reads them through pandas, which shifts the values of a row that has one too many or too few, and fills a
missing time with the mean of all. What is found here is found before that, and before any model is loaded.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from recbole_mllm.compat.patching import wrap
from recbole_mllm.data.atomic import read_columns, read_values
from recbole_mllm.data.values import MAX_ID_CHARACTERS, PAD
from recbole_mllm.errors import UserError
from recbole_mllm.fastdata.reading import known, scan

# what pandas takes for a missing number, in any case and with spaces around (compat/frames.py has the whole list)
_MISSING = frozenset({"", "na", "n/a", "nan", "-nan", "null", "none", "<na>", "#n/a", "#na", "#n/a n/a", "1.#ind",
                      "-1.#ind", "1.#qnan", "-1.#qnan"})  # fmt: skip
_WRITE = {".inter": "write the interactions into it, one a line"}


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
        what = _WRITE.get(path.suffix, "remove the file if nothing needs it")
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


def check_as_read(dataset: ModuleType) -> None:
    """Check each file that a run of ours, or of MLLMMSR, reads (``Dataset._load_feat``, data/dataset/dataset.py:427).

    A run of another model that stock RecBole starts is left as it is.
    """

    def make_load(stock: Callable[..., Any]) -> Callable[..., Any]:
        def _load_data(self: Any, token: str, dataset_path: str) -> Any:
            if _is_ours(self.config) and Path(dataset_path).is_dir():  # else RecBole may know where to fetch it
                _check_files(self, token, Path(dataset_path))
            return stock(self, token, dataset_path)

        return _load_data

    def make_feat(stock: Callable[..., Any]) -> Callable[..., Any]:
        def _load_feat(self: Any, filepath: str, source: Any) -> Any:
            rules = _rules(self, source) if _is_ours(self.config) else None
            if rules is None:
                return stock(self, filepath, source)
            return _read(Path(filepath), rules, lambda: stock(self, filepath, source))

        return _load_feat

    wrap(dataset.Dataset, "_load_data", make_load)
    wrap(dataset.Dataset, "_load_feat", make_feat)


@contextmanager
def told_what_is_left(config: Any, dataset: Any = None) -> Iterator[None]:
    """Say what RecBole means where it trips over a dataset, yet to be read or made already, of which nothing is left.

    Raises:
        UserError: Everything has been filtered away, no row is left to train on, or a user has met all items.
    """
    try:
        yield
    except ValueError as error:
        said = str(error) if _is_ours(config) else ""
        if "Some feat is empty" in said:  # data/dataset/dataset.py:1063
            raise UserError(
                f"no interaction of {config['dataset']} is left after filtering; loosen user_inter_num_interval, "
                "item_inter_num_interval, val_interval and the like"
            ) from error
        if "num_samples should be a positive" in said:  # torch's sampler of no row
            raise nothing_left(dataset, "train on") from error
        if "interacted with all items" in said:  # sampler/sampler.py:257
            raise all_met(dataset) from error
        raise


def check_parts(config: Any, dataset: Any, train: Any, valid: Any, test: Any) -> None:
    """Refuse a split that leaves nothing to test on; say so where nothing is left to validate on, which RecBole allows.

    Args:
        config: RecBole's, of a run of ours or not.
        dataset: What was split.
        train, valid, test: The loaders, of the users that will be asked about.

    Raises:
        UserError: Nothing is left to train or to test on.
    """
    if not _is_ours(config):
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


def _is_ours(config: Any) -> bool:
    return config["frozen_candidates"] is True or config["model"] == "MLLMMSR"


def _check_files(dataset: Any, token: str, folder: Path) -> None:
    """Refuse a folder, a device or a link that leads nowhere in a file's place, and want of interactions."""
    parts = dataset.benchmark_filename_list
    inter = [f"{token}.inter"] if parts is None else [f"{token}.{part}.inter" for part in parts]
    for name in (*inter, f"{token}.item", f"{token}.user"):
        path = folder / name
        if os.path.lexists(path) and not path.is_file():
            raise UserError(f"{path} is no file; put one in its place, or remove it")
        if name in inter and not path.exists():
            named = "a file is named after its folder" if parts is None else f"benchmark_filename names {parts}"
            raise UserError(f"{path} does not exist; interactions are read from it ({named})")


def _rules(dataset: Any, source: Any) -> Rules | None:
    """Return what `dataset`, RecBole's, needs of its file `source`; None where nothing of it is loaded."""
    config, kind = dataset.config, str(getattr(source, "value", source))
    load, unload = dataset._get_load_and_unload_col(source)
    if load == set() or len(config["field_separator"]) != 1:  # a longer one is a pattern to pandas
        return None
    fields = {"inter": (dataset.uid_field, dataset.iid_field), "user": (dataset.uid_field,),
              "item": (dataset.iid_field,)}  # fmt: skip
    ready = dataset.benchmark_filename_list is not None
    return Rules(
        ids=tuple(field for field in fields.get(kind, ()) if field is not None),
        time=dataset.time_field if kind == "inter" and not ready else None,
        ordered=kind == "inter" and not ready and (config["eval_args"] or {}).get("order") == "TO",
        unique=kind in ("user", "item"),
        loaded=_loaded(load, unload),
        separator=config["field_separator"],
        words=config["seq_separator"],
        encoding=config["encoding"],
    )


def _loaded(load: Collection[str] | None, unload: Collection[str] | None) -> Callable[[str], bool]:
    return lambda name: (load is None or name in load) and (unload is None or name not in unload)


def _read(path: Path, rules: Rules, read: Callable[[], Any]) -> Any:
    """Return what `read` makes of `path`; the slow check comes only where the quick one is not certain.

    Whatever stops RecBole is looked for in the file first, as its words name no line.
    """
    columns = list(check_columns(path, rules))
    found = scan(path, rules.separator)
    ids = [columns.index(name) for name in rules.ids]
    plain = found.plain and all(found.shortest[n] > 0 and found.longest[n] <= MAX_ID_CHARACTERS for n in ids)
    if not plain:
        check_file(path, rules)
    try:
        with known(path, rules.separator, found):
            frame = read()
    except UserError:
        raise
    except Exception:  # whatever pandas or RecBole raise for a file: the exact reader may know its place
        if plain:
            check_file(path, rules)
        raise
    if plain and frame is not None and _is_suspicious(frame, rules):
        check_file(path, rules)
    return frame


def _is_suspicious(frame: Any, rules: Rules) -> bool:
    if rules.time in frame.columns and not _all_finite(frame[rules.time]):
        return True
    return bool(rules.unique and rules.ids and rules.ids[0] in frame.columns and frame[rules.ids[0]].duplicated().any())


def _all_finite(column: Any) -> bool:
    return bool(np.isfinite(column.to_numpy()).all())
