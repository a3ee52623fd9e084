"""The check of each file that a run of ours reads, before RecBole reads it, and a plain word where nothing is left."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from recbole_mllm.common.errors import UserError
from recbole_mllm.data.atomic import MAX_ID_CHARACTERS
from recbole_mllm.data.checking import Rules, all_met, check_columns, check_file, nothing_left
from recbole_mllm.recbole_patches.fast_loading import scan, scanned
from recbole_mllm.recbole_patches.hooks import replace


def check_as_read(dataset: ModuleType) -> None:
    """Check each file that a run of ours, or of MLLMMSR, reads (``Dataset._load_feat``, data/dataset/dataset.py:427).

    A run of another model that stock RecBole starts is left as it is.
    """

    @replace(dataset.Dataset)
    def _load_data(stock: Any, self: Any, token: str, dataset_path: str) -> Any:
        if _is_ours(self.config) and Path(dataset_path).is_dir():  # else RecBole may know where to fetch it
            _check_files(self, token, Path(dataset_path))
        return stock(self, token, dataset_path)

    @replace(dataset.Dataset)
    def _load_feat(stock: Any, self: Any, filepath: str, source: Any) -> Any:
        rules = _rules(self, source) if _is_ours(self.config) else None
        if rules is None:
            return stock(self, filepath, source)
        return _read(Path(filepath), rules, lambda: stock(self, filepath, source))


@contextmanager
def explain_what_is_left(config: Any, dataset: Any = None) -> Iterator[None]:
    """Say what RecBole means where it fails on a dataset, read already or not, of which nothing is left.

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
    timed = kind == "inter" and dataset.benchmark_filename_list is None
    return Rules(
        ids=tuple(field for field in fields.get(kind, ()) if field is not None),
        time=dataset.time_field if timed else None,
        ordered=timed and (config["eval_args"] or {}).get("order") == "TO",
        unique=kind in ("user", "item"),
        loaded=lambda name: (load is None or name in load) and (unload is None or name not in unload),
        separator=config["field_separator"],
        words=config["seq_separator"],
        encoding=config["encoding"],
    )


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
        with scanned(path, rules.separator, found):
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
    """Return whether a plain file gives a time that is none, or an id twice."""
    if rules.time in frame.columns and not np.isfinite(frame[rules.time].to_numpy()).all():
        return True
    return bool(rules.unique and rules.ids and rules.ids[0] in frame.columns and frame[rules.ids[0]].duplicated().any())
