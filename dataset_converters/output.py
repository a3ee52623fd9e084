"""The files of a converted dataset: interactions, settings, a README for people and a manifest for machines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.files import (
    CONVERTED,
    check_folder,
    outputs_of,
    remove_empty_folder,
    remove_file,
    staged,
    whole_file,
    write_text,
)
from recbole_mllm.data import schema
from recbole_mllm.data.atomic import read_atomic, read_columns, word_problem, write_atomic
from recbole_mllm.data.images import IMAGES
from recbole_mllm.data.splits import PARTS, SplitSettings, Splitting, split

from .interactions import Column, Interactions, float32_confuses, places
from .item_rows import MISSING, URLS
from .source import Reject

REJECTED = "rejected.tsv"
_EXACT_FLOAT32 = 2**24  # whole numbers up to here are float32 values
_CHUNK = 100_000
_SHOWN = 50  # RecBole's MAX_ITEM_LIST_LENGTH
_BESIDE = ("dataset.yaml", "README.md", REJECTED, MISSING, URLS)


class Fields(NamedTuple):
    """What a dataset's columns are called."""

    user: str = schema.USER
    item: str = schema.ITEM
    time: str = schema.TIME

    @property
    def listed(self) -> str:
        """The column that lists a row's history."""
        return f"{self.item}_list"


USUAL_FIELDS = Fields()


@dataclass(slots=True)
class Written:
    """What a dataset's interactions were written as: the settings and words that go with the files.

    Args:
        stamps: ``[interactions]`` what stands in the column of times.
        counts: How many rows each part has and what else there is to count, in words.
        about: Numbers of the split, for the manifest.
    """

    interactions: int
    config: dict[str, Any]
    order: str
    stamps: Any = None
    counts: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def write_protocol(folder: Path, inter: Interactions, settings: SplitSettings) -> Written:
    """Write interactions in exact order as a protocol wants them: ``X.inter``, benchmark files, or both.

    Raises:
        UserError: The interactions do not allow it (see `write_rows` and `splits.split`).
    """
    if settings.protocol == "loo":
        return write_interactions(folder, inter)
    if settings.protocol == "paper":
        return write_rows(folder, inter, settings)
    return write_rows(folder, inter, settings, write_interactions(folder, inter))


def write_interactions(folder: Path, inter: Interactions) -> Written:
    """Write ``X.inter``, sorted by exact time.

    `timestamp` is the source's where RecBole's float32 keeps each user's order, else the place in the exact order, with
    the source's own time beside it as text.
    """
    types = dict(schema.INTER_TYPES)
    columns = [_names(inter.users, inter.user_names), _names(inter.items, inter.item_names)]
    stamps, extra, order = _timestamps(inter)
    columns.append(_numbers(stamps))
    if inter.ratings is not None:
        types["rating"] = "float"
        columns.append(_numbers(inter.ratings))
    if extra is not None:
        types[schema.EXACT_TIME] = "token"
        columns.append(_numbers(extra))
    path = folder / f"{folder.name}.inter"
    count = write_atomic(path, types, zip(*columns, strict=True))
    config: dict[str, Any] = {"load_col": {"inter": [schema.USER, schema.ITEM, schema.TIME]}}
    if inter.times is None or (extra is not None and len(inter) > _EXACT_FLOAT32):
        config["global_times"] = False
    return Written(count, config, order, stamps)


def _timestamps(inter: Interactions) -> tuple[Column, Column | None, str]:
    if inter.times is None:
        return places(inter), None, "The source has no times: `timestamp` is the place in the user's own sequence."
    confused = float32_confuses(inter)
    if not confused:
        return inter.times, None, "`timestamp` is the source's; equal times keep the file's order."
    why = (
        f"RecBole sorts time as float32, in which {confused} users have different times that look equal; so "
        f"`timestamp` is the place in {{}}, and `{schema.EXACT_TIME}` the source's own time. Equal times keep the "
        "file's order."
    )
    if len(inter) <= _EXACT_FLOAT32:
        return np.arange(1, len(inter) + 1), inter.times, why.format("the exact order of all interactions")
    return places(inter), inter.times, why.format("the user's own sequence")


def write_rows(
    folder: Path,
    inter: Interactions,
    settings: SplitSettings,
    whole: Written | None = None,
    fields: Fields = USUAL_FIELDS,
) -> Written:
    """Write the rows of a split as RecBole's benchmark files ``X.train.inter``, ``X.valid.inter``, ``X.test.inter``.

    A row is a target, ``item_id``, and the history before it, ``item_id_list``. Beside a `whole` ``X.inter`` it lists
    the latest items alone, and `position` says how many of its user's interactions there precede it.

    Raises:
        UserError: An item id holds a space, at which RecBole splits lists, or see `splits.split`.
    """
    for name in inter.item_names:
        if (trouble := word_problem(name)) is not None:
            raise UserError(f"item id {name!r} {trouble}; use --protocol loo, or other ids")
    made = split(inter.users, inter.times, inter.user_names, settings)
    types = {fields.user: "token", fields.listed: "token_seq", fields.item: "token"}
    if whole is not None:
        types |= {schema.PLACE: "float", fields.time: "float"}
    cut = settings.max_list if whole is not None else len(inter)
    for part in PARTS:
        rows = _rows(inter, made, part, cut, None if whole is None else whole.stamps)
        write_atomic(folder / f"{folder.name}.{part}.inter", types, rows)
    longest = min(cut, max(int(rows.positions.max(initial=1)) for rows in made.parts.values()))
    config = {
        "load_col": {"inter": list(types)},
        "benchmark_filename": list(PARTS),
        "alias_of_item_id": [fields.listed],
        "train_on_histories": True,
        "MAX_ITEM_LIST_LENGTH": min(longest, _SHOWN),
    }
    if whole is None:
        return _by_users(config, made, longest)
    return _by_moments(config, made, inter, settings, whole)


def _rows(inter: Interactions, made: Splitting, part: str, cut: int, stamps: Any) -> Iterator[list[str]]:
    targets, positions = made.parts[part]
    names, items = inter.item_names, inter.items[made.by_user]
    for low in range(0, len(targets), _CHUNK):
        rows, before = targets[low : low + _CHUNK], positions[low : low + _CHUNK]
        users = inter.users[rows]
        ends = made.starts[users] + before
        texts = [None] * len(rows) if stamps is None else list(_numbers(stamps[rows]))
        columns = (users.tolist(), inter.items[rows].tolist(), ends.tolist(), before.tolist(), texts)
        for user, item, end, position, stamp in zip(*columns, strict=True):
            listed = " ".join([names[one] for one in items[end - min(position, cut) : end].tolist()])
            row = [inter.user_names[user], listed, names[item]]
            yield row if stamp is None else [*row, str(position), stamp]


def _by_users(config: dict[str, Any], made: Splitting, longest: int) -> Written:
    words = "Each row is a user: the history in exact time order, and the last item as the target."
    if longest > _SHOWN:
        words += (
            f" The longest history has {longest} items; sequential models are shown the last MAX_ITEM_LIST_LENGTH of "
            f"them, which takes `import recbole_mllm` (RecBole alone needs files made with --max-history {_SHOWN + 1})."
        )
    alone = made.left_out["all"]
    interactions = alone + sum(int((rows.positions + 1).sum()) for rows in made.parts.values())
    counts = {part: f"{len(made.parts[part].targets):,} users" for part in PARTS}
    counts["users without a history, left out"] = f"{alone:,} users"
    return Written(interactions, config, words, counts=counts)


def _by_moments(
    config: dict[str, Any], made: Splitting, inter: Interactions, settings: SplitSettings, whole: Written
) -> Written:
    assert made.moments is not None
    first, second = made.moments
    made_of = {"train_interactions": made.training, "interactions": len(inter)}
    config["temporal_split"] = {"moments": [first, second], **made_of}
    words = (
        f"{whole.order} Training rows lie before {first}, validation targets from there to {second}, test targets from "
        f"{second} on: the {settings.target} interaction of a user in each period. A row's history is all its user did "
        f"before its target, of which it lists the last {settings.max_list}; `{schema.PLACE}` is its place in the "
        "user's whole history in X.inter."
    )
    targets = made.parts["test"].targets
    known_users = np.bincount(inter.users[: made.training], minlength=len(inter.user_names)) > 0
    known_items = np.bincount(inter.items[: made.training], minlength=len(inter.item_names)) > 0
    numbers = {
        "train_interactions": made.training,
        **{f"{part}_rows": len(made.parts[part].targets) for part in PARTS},
        **{f"{part}_rows_without_history_left_out": made.left_out[part] for part in PARTS},
        "test_targets_of_new_users": int((~known_users[inter.users[targets]]).sum()),
        "test_targets_that_are_new_items": int((~known_items[inter.items[targets]]).sum()),
    }
    counts = {name.replace("_", " "): f"{number:,}" for name, number in numbers.items()}
    about = {"moments": [first, second], "target": settings.target, "max_list": settings.max_list, **numbers}
    return Written(whole.interactions, config, words, counts=counts, about=about)


def _names(codes: Column, names: list[str]) -> Iterator[str]:
    for start in range(0, len(codes), _CHUNK):
        yield from map(names.__getitem__, codes[start : start + _CHUNK].tolist())


def _numbers(values: Column) -> Iterator[str]:
    whole = values.dtype.kind == "f" and bool((values == np.floor(values)).all() and (np.abs(values) < 2**53).all())
    values = values.astype(np.int64) if whole else values
    for start in range(0, len(values), _CHUNK):
        yield from map(str, values[start : start + _CHUNK].tolist())


def write_rejects(folder: Path, rejects: Iterable[Reject]) -> None:
    """Write the list of raw lines that were left out."""
    with whole_file(folder / REJECTED) as file:
        file.write("file\tline\treason\n")
        file.writelines(f"{r.file}\t{r.line}\t{r.reason}\n" for r in rejects)


def dataset_yaml(comment: str, config: Mapping[str, Any], fields: Fields = USUAL_FIELDS) -> str:
    """Return the text of ``dataset.yaml``, RecBole's settings of the dataset, ready to be passed as a config file."""
    names = dict(zip(("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD"), fields, strict=True))
    comments = "".join(f"# {line}\n" for line in comment.splitlines())
    text: str = yaml.safe_dump({**names, **config}, sort_keys=False, default_flow_style=None, width=10_000)
    return comments + text


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write ``manifest.json``, which names every other file of a `folder` that is made."""
    content = {**content, "outputs": outputs_of(folder)}
    write_text(folder / CONVERTED.manifest, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def check(folder: Path, inputs: Sequence[Path] = ()) -> None:
    """Refuse a folder that holds anything but an earlier conversion and what runs have put beside it.

    Args:
        folder: The dataset's.
        inputs: What is read.

    Raises:
        UserError: It says what is in the way (`check_folder`).
    """
    tables = [folder.name + end for end in (".inter", ".item", *(f".{part}.inter" for part in PARTS))]
    check_folder(folder, CONVERTED, "--out", inputs=inputs, writes=(*tables, *_BESIDE))
    if (folder / IMAGES).is_symlink():
        raise UserError(f"--out {folder}: {IMAGES} in it is a link, into which no image is put; give a new folder")


@contextmanager
def into(folder: Path) -> Iterator[Path]:
    """Yield an empty folder inside `folder`, of the same name, where files wait until all of them are there.

    A new `folder` gets a manifest at once, as images are put into it while the rest is being made: so what a killed
    conversion leaves is known as ours. One that fails leaves no folder behind that it has made, unless with images.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    is_first = not (folder / CONVERTED.manifest).is_file()
    if is_first:
        write_text(folder / CONVERTED.manifest, json.dumps({"converter": "", "outputs": []}) + "\n")
    try:
        with staged(folder, folder.name) as stage:
            yield stage
    finally:
        if is_first and [path.name for path in folder.iterdir()] == [CONVERTED.manifest]:
            remove_file(folder / CONVERTED.manifest)
            if is_new:
                remove_empty_folder(folder)


def images_of(folder: Path) -> frozenset[str]:
    """Return the names of the images that an earlier conversion has put into ``images/``: those its items have."""
    path = schema.item_file(folder)
    owned = path.name in {entry.get("file") for entry in CONVERTED.outputs(folder) or []}
    if not owned or schema.IMAGE not in read_columns(path):
        return frozenset()
    return frozenset(Path(row[schema.IMAGE]).name for row in read_atomic(path) if row[schema.IMAGE])
