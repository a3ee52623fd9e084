"""A dataset's folder split by another protocol, into a folder of its own."""

from __future__ import annotations

import shutil
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from filecmp import cmp
from pathlib import Path
from typing import Any

import numpy as np

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.files import CONVERTED, bring, digest, publish, write_text
from recbole_mllm.common.yaml_files import read_mapping
from recbole_mllm.data import schema
from recbole_mllm.data.atomic import id_fault, read_atomic, read_columns, read_values, write_atomic
from recbole_mllm.data.facts import has_global_times
from recbole_mllm.data.images import find_image, resolve
from recbole_mllm.data.splits import SplitSettings

from . import output
from .interactions import Interactions, count
from .output import Fields, Written
from .source import number

_BESIDE = (".item", ".user", ".kg", ".link", ".net", ".memory.json")  # files that do not depend on the split
_OF_A_SPLIT = ("benchmark_filename", "train_on_histories", "temporal_split", "load_col", "global_times")
_OF_BENCHMARK_FILES = ("alias_of_item_id", "MAX_ITEM_LIST_LENGTH")


@dataclass(frozen=True, slots=True)
class Log:
    """``X.inter`` in exact order: its interactions, and its lines as they are."""

    inter: Interactions
    lines: list[str]
    types: Mapping[str, str]
    stamps: Any


def split_folder(
    folder: Path, out: Path, fields: Fields, settings: SplitSettings, options: Mapping[str, Any]
) -> list[str]:
    """Write the dataset in `folder` into `out`, split as `settings` say; return what was done, in lines.

    Raises:
        UserError: There is no ``X.inter``, it cannot be read or split so, or `out` is none to write to.
    """
    output.check(out, [folder])
    if folder.resolve() in out.resolve().parents:
        raise UserError(f"--out {out} lies inside {folder}, which is split; give a folder beside it")
    keys = read_mapping(own) if (own := folder / "dataset.yaml").is_file() else {}
    compares, listed = has_global_times(folder, keys.get("global_times")), keys.get("benchmark_filename")
    log = _read(folder, fields, compares)
    with output.into(out) as stage:
        written = _write(stage, log, fields, settings)
        dropped = (*_OF_A_SPLIT, *(_OF_BENCHMARK_FILES if listed else ()))
        remaining = {key: value for key, value in keys.items() if key not in dropped}
        remaining |= {} if compares else {"global_times": False}
        columns = {**(keys.get("load_col") or {}), **written.config["load_col"]}
        if settings.protocol == "loo" and keys.get("load_col") and not listed:
            columns = keys["load_col"]
        comment = f"{out.name}: {folder.name}, split again; see README.md.\n{written.order}"
        config = {**remaining, **written.config, "load_col": columns}
        write_text(stage / "dataset.yaml", output.dataset_yaml(comment, config, fields))
        for end in _BESIDE:
            if (folder / f"{folder.name}{end}").is_file():
                shutil.copyfile(folder / f"{folder.name}{end}", stage / f"{out.name}{end}")
        step = count("read", log.inter)
        images = _link_images(folder, out, fields.item)
        lines = [f"{step.users:,} users, {step.items:,} items, {step.interactions:,} interactions, {images:,} images"]
        lines += [f"{name}: {number}" for name, number in written.counts.items()]
        words = f"{folder.name}, split by --protocol {settings.protocol}. {written.order}"
        write_text(stage / "README.md", "\n\n".join([f"# {out.name}", words, *lines, ""]))
        content = {
            "converter": "split",
            "protocol": settings.protocol,
            "options": dict(options),
            "split": written.about,
            "inputs": [{"file": f"{folder.name}.inter", "sha256": digest(folder / f"{folder.name}.inter")}],
        }
        output.write_manifest(stage, content)
        publish(stage, out, CONVERTED)
    return [*lines, f"written: {out}"]


def _read(folder: Path, fields: Fields, compares: bool) -> Log:
    """Read ``X.inter`` and sort it by exact time, equal times in the file's order.

    Args:
        folder: The dataset's.
        fields: What its columns are called.
        compares: Whether times compare across users. In a column of exact times they always do.
    """
    path = folder / f"{folder.name}.inter"
    if not path.is_file():
        raise UserError(f"{folder} holds no {path.name} to split; convert the raw data again, with the --protocol")
    types = read_columns(path)
    if missing := [name for name in (fields.user, fields.item) if name not in types]:
        raise UserError(
            f"{path}:1: there is no column {missing[0]}; name yours with --USER_ID_FIELD and --ITEM_ID_FIELD, or in "
            f"{folder / 'dataset.yaml'}"
        )
    if fields.time not in types and schema.EXACT_TIME not in types and fields.time != schema.TIME:
        raise UserError(
            f"{path}:1: there is no column {fields.time}; name yours with --TIME_FIELD, or in {folder / 'dataset.yaml'}"
        )
    places = {name: place for place, name in enumerate(types)}
    user, item = places[fields.user], places[fields.item]
    exact = schema.EXACT_TIME if schema.EXACT_TIME in types else fields.time
    time = places.get(exact)
    users: dict[str, int] = {}
    items: dict[str, int] = {}
    of_user, of_item = array("i"), array("i")
    times: list[int | float] = []
    lines: list[str] = []
    for line, values in read_values(path, quotes=True):
        for name, place in ((fields.user, user), (fields.item, item)):
            if (problem := id_fault(values[place])) is not None:
                raise UserError(f"{path}:{line}: {name} {problem}; give it another, or remove the row")
        of_user.append(users.setdefault(values[user], len(users)))
        of_item.append(items.setdefault(values[item], len(items)))
        if time is not None:
            if (moment := number(values[time])) is None:
                raise UserError(
                    f"{path}:{line}: {exact} {values[time][:40]!r} is no number; write one, or remove the row"
                )
            times.append(moment)
        lines.append("\t".join(values))
    if not lines:
        raise UserError(f"{path} holds no row behind its header; there is nothing to split")
    known = None if time is None else np.array(times)
    order = np.arange(len(lines)) if known is None else np.argsort(known, kind="stable")
    compared = known[order] if known is not None and (compares or exact == schema.EXACT_TIME) else None
    by_user, by_item = (np.frombuffer(column, np.int32)[order] for column in (of_user, of_item))
    inter = Interactions(by_user, by_item, compared, None, list(users), list(items))
    lines = [lines[row] for row in order.tolist()]
    stamp = places.get(fields.time)
    stamps = None if stamp is None else np.array([line.split("\t")[stamp] for line in lines], object)
    return Log(inter, lines, types, stamps)


def _write(stage: Path, log: Log, fields: Fields, settings: SplitSettings) -> Written:
    if settings.protocol == "paper":
        return output.write_rows(stage, log.inter, settings, fields=fields)
    path = stage / f"{stage.name}.inter"
    write_atomic(path, log.types, (line.split("\t") for line in log.lines))
    loaded = [name for name in fields if name in log.types]
    config: dict[str, Any] = {"load_col": {"inter": loaded}}
    timed = fields.time in log.types or schema.EXACT_TIME in log.types
    order = (
        "Interactions stand in exact order of time." if timed else "Interactions stand in the file's order: no times."
    )
    whole = Written(len(log.inter), config, order, log.stamps)
    return whole if settings.protocol == "loo" else output.write_rows(stage, log.inter, settings, whole, fields)


def _link_images(folder: Path, out: Path, item_field: str) -> int:
    """Link the items' images to where `out` looks for them; return how many.

    Raises:
        UserError: Another file is in the way.
    """
    linked = 0
    for name, path in _images(folder, item_field):
        target = out / name
        if not target.exists():
            bring(path.resolve(), target)
        elif not (path.samefile(target) or cmp(path, target, shallow=False)):
            raise UserError(f"{target} is another image than {path}; move it away, or give a new folder")
        linked += 1
    return linked


def _images(folder: Path, item_field: str) -> Iterator[tuple[str, Path]]:
    """Yield where each item's image lies in the dataset's folder, by its column or by item id, and the file."""
    if not schema.item_file(folder).is_file():
        return
    for row in read_atomic(schema.item_file(folder)):
        named = row.get(schema.IMAGE, "")
        path, _ = resolve(folder, named) if named else find_image(folder, row[item_field])
        if path is not None:
            yield str(path.relative_to(folder)), path
