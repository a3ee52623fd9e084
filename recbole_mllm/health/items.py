"""What ``X.item`` and the summaries say of the items, and which images are there."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from recbole_mllm.data import schema
from recbole_mllm.data.atomic import clean, read_atomic, read_columns, read_numbered
from recbole_mllm.data.images import MOST_LONG
from recbole_mllm.data.item_images import ItemImages, Missing
from recbole_mllm.data.values import MAX_CHARACTERS
from recbole_mllm.errors import UserError
from recbole_mllm.health.layout import Layout
from recbole_mllm.health.sample import Sample

LONG_TITLE = 1_000  # characters; a prompt of ten such titles leaves no room for anything else


@dataclass(slots=True)
class Items:
    """The items of ``X.item`` by raw id, with the line each stands in, and what is wrong with them."""

    exists: bool = False
    lines: dict[str, int] = field(default_factory=dict)
    has_titles: bool = False
    has_images: bool = False
    titled: int = 0
    twice: Sample = field(default_factory=Sample)
    long: Sample = field(default_factory=Sample)
    longest: tuple[int, str] = (0, "")
    same_title: Sample = field(default_factory=Sample)
    quoted: Sample = field(default_factory=Sample)
    too_long: Sample = field(default_factory=Sample)
    n_images: int = 0
    missing: list[Missing] = field(default_factory=list)
    absent: list[Missing] = field(default_factory=list)
    lengthy: list[Missing] = field(default_factory=list)


def read_items(layout: Layout, others: list[str], image_dir: Path | None) -> Items:
    """Read ``X.item``; an item of `others`, which have interactions, may have an image in `image_dir` all the same.

    Raises:
        UserError: The file cannot be read, or has no column of item ids.
    """
    out, images = Items(), ItemImages()
    path = schema.item_file(layout.folder)
    if os.path.lexists(path):
        _read_file(out, images, path, layout, image_dir)
    if image_dir is not None:
        for item in others:
            if item not in out.lines:
                images.add(layout.folder, item, "", image_dir)
    images.check(layout.folder)
    out.lengthy = [
        Missing(item, str(images.found[item]), f"is {w} x {h} pixels: more than {MOST_LONG} times as long as wide")
        for item, (w, h) in images.extreme.items()
        if max(w, h) > MOST_LONG * min(w, h)
    ]
    out.n_images, out.missing, out.absent = len(images.found), images.missing, images.absent
    return out


def _read_file(out: Items, images: ItemImages, path: Path, layout: Layout, image_dir: Path | None) -> None:
    columns = read_columns(path)
    if layout.item not in columns:
        raise UserError(f"{path}:1: there is no column {layout.item}; its columns are {', '.join(columns)}")
    title = schema.title_column(columns)
    out.exists, out.has_titles, out.has_images = True, title is not None, schema.IMAGE in columns
    first_with: dict[int, str] = {}
    for number, row in read_numbered(path):
        item = row[layout.item]
        first = out.lines.setdefault(item, number)
        if first != number:
            out.twice.add(f"{item!r} in lines {first} and {number}")
            continue
        images.add(layout.folder, item, row.get(schema.IMAGE, ""), image_dir)
        _note_values(out, row, f"{path.name}:{number}")
        if title is not None:
            _note_title(out, item, clean(row[title]), first_with)


def _note_values(out: Items, row: dict[str, str], where: str) -> None:
    for name, value in row.items():
        if value[:1] == '"':
            out.quoted.add(f"{where}: {value[:60]!r}")
        if len(value) > MAX_CHARACTERS:
            out.too_long.add(f"{where}: {name} has {len(value):,} characters")


def _note_title(out: Items, item: str, title: str, first_with: dict[int, str]) -> None:
    if not title:
        return
    out.titled += 1
    if len(title) > LONG_TITLE:
        out.long.add(f"item {item!r}")
        out.longest = max(out.longest, (len(title), item))
    first = first_with.setdefault(hash(title), item)
    if first is not item:
        out.same_title.add(f"{first!r} and {item!r} are both {title[:60]!r}")


@dataclass(frozen=True, slots=True)
class Summaries:
    """One file of summaries: of items (`rows` of them) or of users (`rows` for `users`)."""

    tag: str
    rows: int
    users: int | None = None


def read_summaries(folder: Path) -> list[Summaries]:
    """Return what each ``X.<tag>.isum`` and ``X.<tag>.usum`` holds."""
    out = []
    for path in sorted(folder.glob(f"{folder.name}.*.isum")):
        items = {row.get(schema.ITEM) for row in read_atomic(path) if row.get(schema.SUMMARY)}
        out.append(Summaries(_tag(path, folder), len(items)))
    for path in sorted(folder.glob(f"{folder.name}.*.usum")):
        users = [row.get(schema.USER) for row in read_atomic(path)]
        out.append(Summaries(_tag(path, folder), len(users), len(set(users))))
    return out


def _tag(path: Path, folder: Path) -> str:
    return path.stem.removeprefix(folder.name + ".")
