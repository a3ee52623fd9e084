"""The files of a converted dataset: interactions, settings, a README for people and a manifest for machines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.files import (
    CONVERTED,
    check_folder,
    remove_empty_folder,
    remove_file,
    staged,
    whole_file,
    write_text,
)
from recbole_mllm.data import schema
from recbole_mllm.data.atomic import read_atomic, read_columns, word_problem, write_atomic
from recbole_mllm.data.images import IMAGES
from recbole_mllm.data.sampling import hash64

from .interactions import Column, Interactions, float32_confuses, places
from .item_rows import MISSING, URLS
from .source import Reject

REJECTED = "rejected.tsv"
_EXACT_FLOAT32 = 2**24  # whole numbers up to here are float32 values
_CHUNK = 100_000
_SHOWN = 50  # RecBole's MAX_ITEM_LIST_LENGTH
_LIST = schema.ITEM + "_list"
_LEFT_OUT = "users without a history, left out"
_PARTS = ("train", "valid", "test")
_BESIDE = ("dataset.yaml", "README.md", REJECTED, MISSING, URLS)


@dataclass(slots=True)
class Written:
    """What a dataset's interactions were written as: files, and the settings and words that go with them."""

    files: list[Path]
    interactions: int
    config: dict[str, Any]
    order: str
    counts: dict[str, int] = field(default_factory=dict)


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
    return Written([path], count, {"load_col": {"inter": [schema.USER, schema.ITEM, schema.TIME]}}, order)


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


def write_benchmark_files(folder: Path, inter: Interactions, seed: int) -> Written:
    """Write the paper's protocol as RecBole benchmark files: users split 8:1:1, a row a user, its last item the target.

    Raises:
        UserError: An item id holds a space, at which RecBole splits lists, or there are fewer than ten users to split.
    """
    for name in inter.item_names:
        if (trouble := word_problem(name)) is not None:
            raise UserError(f"item id {name!r} {trouble}; use --protocol loo, or other ids")
    order = np.argsort(inter.users, kind="stable")
    users, items = inter.users[order], inter.items[order]
    starts = np.flatnonzero(np.r_[True, users[1:] != users[:-1]])
    ends = np.r_[starts[1:], len(users)]
    names = [inter.user_names[u] for u in users[starts]]
    part_of = _split({name for name, start, end in zip(names, starts, ends, strict=True) if end - start > 1}, seed)

    written: list[int] = []

    def rows(part: str) -> Iterator[tuple[str, str, str]]:
        for name, start, end in zip(names, starts.tolist(), ends.tolist(), strict=True):
            if part_of.get(name) == part:
                ids = [inter.item_names[i] for i in items[start:end].tolist()]
                written.append(end - start)
                yield name, " ".join(ids[:-1]), ids[-1]

    types = {schema.USER: "token", _LIST: "token_seq", schema.ITEM: "token"}
    paths = [folder / f"{folder.name}.{part}.inter" for part in _PARTS]
    counts = {part: write_atomic(path, types, rows(part)) for part, path in zip(_PARTS, paths, strict=True)}
    counts[_LEFT_OUT] = len(names) - len(part_of)  # each with a single interaction
    longest = int((ends - starts).max()) - 1
    config = {
        "load_col": {"inter": list(types)},
        "benchmark_filename": list(_PARTS),
        "alias_of_item_id": [_LIST],
        "train_on_histories": True,
        "MAX_ITEM_LIST_LENGTH": min(longest, _SHOWN),
    }
    words = "Each row is a user: the history in exact time order, and the last item as the target."
    if longest > _SHOWN:
        words += (
            f" The longest history has {longest} items; sequential models are shown the last MAX_ITEM_LIST_LENGTH of "
            f"them, which takes `import recbole_mllm` (RecBole alone needs files made with --max-history {_SHOWN + 1})."
        )
    return Written(paths, sum(written) + counts[_LEFT_OUT], config, words, counts)


def _split(users: set[str], seed: int) -> dict[str, str]:
    """Return each user's part, 8:1:1 by a seeded draw that knows the raw id alone."""
    if len(users) < 10:
        raise UserError(f"{len(users)} users with a history cannot be split 8:1:1; use --protocol loo")
    ranked = sorted(users, key=lambda user: (hash64("split", seed, user), user))
    tenth = round(len(ranked) / 10)
    cut = len(ranked) - 2 * tenth
    parts = ["train"] * cut + ["valid"] * tenth + ["test"] * tenth
    return dict(zip(ranked, parts, strict=True))


def _names(codes: Column, names: list[str]) -> Iterator[str]:
    for start in range(0, len(codes), _CHUNK):
        yield from map(names.__getitem__, codes[start : start + _CHUNK].tolist())


def _numbers(values: Column) -> Iterator[str]:
    whole = values.dtype.kind == "f" and bool((values == np.floor(values)).all() and (np.abs(values) < 2**53).all())
    values = values.astype(np.int64) if whole else values
    for start in range(0, len(values), _CHUNK):
        yield from map(str, values[start : start + _CHUNK].tolist())


def write_rejects(folder: Path, rejects: Iterable[Reject]) -> Path:
    """Write the list of raw lines that were left out."""
    path = folder / REJECTED
    with whole_file(path) as file:
        file.write("file\tline\treason\n")
        file.writelines(f"{r.file}\t{r.line}\t{r.reason}\n" for r in rejects)
    return path


def dataset_yaml(comment: str, config: Mapping[str, Any], item_kind: str) -> str:
    """Return the text of ``dataset.yaml``, RecBole's settings of the dataset, ready to be passed as a config file."""
    lines = [f"# {line}" for line in comment.splitlines()]
    lines += [f"USER_ID_FIELD: {schema.USER}", f"ITEM_ID_FIELD: {schema.ITEM}", f"TIME_FIELD: {schema.TIME}"]
    lines += [f"{key}: {json.dumps(value).replace(chr(34), '')}" for key, value in config.items()]
    return "\n".join([*lines, f"item_kind: {item_kind}", ""])


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write ``manifest.json``, which names every file but itself and the images."""
    write_text(folder / CONVERTED.manifest, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def check(folder: Path, inputs: Sequence[Path] = ()) -> None:
    """Refuse a folder that holds anything but an earlier conversion and what runs have put beside it.

    Args:
        folder: The dataset's.
        inputs: What is read.

    Raises:
        UserError: It says what is in the way (`check_folder`).
    """
    tables = [folder.name + end for end in (".inter", ".item", *(f".{part}.inter" for part in _PARTS))]
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
        write_manifest(folder, {"converter": "", "outputs": []})
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
