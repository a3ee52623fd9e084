"""Measure a dataset: everything that the page and the text of `inspect` say, as numbers."""

from __future__ import annotations

import os
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recbole_mllm.common.config import checked_file
from recbole_mllm.common.errors import UserError
from recbole_mllm.data import schema
from recbole_mllm.data.atomic import (
    clean,
    id_problem,
    impossible_times,
    read_columns,
    read_numbered,
    read_values,
    unquoted,
    word_problem,
)
from recbole_mllm.data.checking import Rules, check_columns, fault, is_missing, time_problem
from recbole_mllm.data.images import ItemImages

BINS = 60  # of interactions over time
LONG_TITLE = 1_000  # characters; a prompt of ten such titles leaves no room for anything else
LAYOUT_KEYS = ("image_dir", "USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD", "LIST_SUFFIX", "benchmark_filename")
"""The configuration keys that say where a dataset's files are and what its columns are called."""


@dataclass(slots=True)
class Sample:
    """A count of what was found, with the first of it in words."""

    count: int = 0
    example: str = ""

    def add(self, example: str) -> None:
        """Count one more."""
        self.example = self.example or example
        self.count += 1


Samples = defaultdict[str, Sample]
"""What looks wrong, by a short name; `findings` says what each means."""


# ---- where the files are


@dataclass(frozen=True, slots=True)
class Layout:
    """A dataset's folder, its files of interactions and the names of its columns; `history` in benchmark files.

    `is_split` says whether a run reads a split's files, to which RecBole applies no filter.
    """

    folder: Path
    inter: tuple[Path, ...]
    user: str
    item: str
    time: str
    history: str | None
    image_dir: Path | None
    is_split: bool


def find_layout(folder: Path, given: Mapping[str, Any]) -> Layout:
    """Return the layout of the dataset in `folder`.

    Its ``dataset.yaml`` may name the columns, benchmark files and image folder; the keys `given` with the command win.

    Raises:
        UserError: There is no such folder, or it holds no interactions.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give a dataset's folder, or its name under ./dataset")
    if not folder.name or folder.name == "..":
        folder = folder.resolve()
    own = folder / "dataset.yaml"
    keys = {**(checked_file(own, of_dataset=True) if os.path.lexists(own) else {}), **given}
    # of a temporal split X.inter holds all interactions, and the benchmark files most of them again
    files = _inter_files(folder, None if keys.get("temporal_split") else keys.get("benchmark_filename"))
    columns = read_columns(files[0])
    user, item = str(keys.get("USER_ID_FIELD") or schema.USER), str(keys.get("ITEM_ID_FIELD") or schema.ITEM)
    time, history = str(keys.get("TIME_FIELD") or schema.TIME), f"{item}{keys.get('LIST_SUFFIX') or '_list'}"
    images = Path(str(keys["image_dir"])) if keys.get("image_dir") else None
    if images is not None and not images.is_dir():
        raise UserError(f"image_dir {images} is no folder; give the folder that holds the items' images")
    listed = history if history in columns else None
    return Layout(folder, files, user, item, time, listed, images, bool(keys.get("benchmark_filename")))


def _inter_files(folder: Path, named: Any) -> tuple[Path, ...]:
    """Return the benchmark files ``X.<part>.inter`` where they are `named` or alone, else ``X.inter``."""
    plain = folder / f"{folder.name}.inter"
    parts = named if isinstance(named, list) and named else ("train", "valid", "test")
    files = tuple(folder / f"{folder.name}.{part}.inter" for part in parts)
    if parts is named:
        return files
    if os.path.lexists(plain):
        return (plain,)
    if there := tuple(path for path in files if path.is_file()):
        return there
    hint = "a folder of datasets is none itself" if any(folder.iterdir()) else "it is empty"
    if others := sorted(path.name for path in folder.glob("*.inter")):
        hint = f"it holds {', '.join(others[:3])}: RecBole wants files named after their folder"
    raise UserError(f"{folder} holds no {plain.name}; {hint}")


# ---- interactions


@dataclass(slots=True)
class InteractionColumns:
    """Interactions in the files' order, read in one pass; `user` and `item` are places in `users` and `items`."""

    users: dict[str, int] = field(default_factory=dict)  # raw ids with their place
    items: dict[str, int] = field(default_factory=dict)
    user: array[int] = field(default_factory=lambda: array("i"))
    item: array[int] = field(default_factory=lambda: array("i"))
    time: array[float] = field(default_factory=lambda: array("d"))  # NaN where none is given; empty in benchmark files
    exact_time: array[float] = field(default_factory=lambda: array("d"))  # that `convert` wrote beside places
    hashes: array[int] = field(default_factory=lambda: array("q"))  # of lines, some of which are there twice


def read_interactions(layout: Layout, found: Samples) -> InteractionColumns:
    """Read all interactions; of benchmark files, each user's longest history with its target.

    Raises:
        UserError: A file cannot be read, or a time is no number (file and line are named).
    """
    out, rules = InteractionColumns(), Rules((layout.user, layout.item), None if layout.history else layout.time)
    users, items = out.users, out.items
    histories: dict[int, array[int]] = {}
    for path in layout.inter:
        columns = list(check_columns(path, rules))
        if layout.history is not None and layout.history not in columns:
            raise UserError(f"{path}:1: there is no column {layout.history}, which {layout.inter[0].name} has")
        at = {name: number for number, name in enumerate(columns)}
        at_user, at_item, at_history = at[layout.user], at[layout.item], at.get(layout.history or "")
        at_time = at.get(layout.time) if at_history is None else None
        at_exact = at.get(schema.EXACT_TIME) if at_time is not None else None
        for number, values in read_values(path):
            user = users.setdefault(values[at_user], len(users))
            if at_history is None:
                out.user.append(user)
                out.item.append(items.setdefault(values[at_item], len(items)))
            else:
                ids = [*filter(None, values[at_history].split(" ")), values[at_item]]
                row = array("i", [items.setdefault(word, len(items)) for word in ids])
                histories[user] = max(histories.get(user, row), row, key=len)
            if at_time is not None:
                time = "nan" if is_missing(values[at_time]) else values[at_time]
                if time != "nan" and (problem := time_problem(time)) is not None:
                    raise fault(path, number, layout.time, problem, rules)
                out.time.append(float(time))
            if at_exact is not None:
                out.exact_time.append(float("nan") if time_problem(values[at_exact]) else float(values[at_exact]))
            out.hashes.append(hash(tuple(values)))
            for value in values:
                if value[:1] == '"':
                    unquoted(path, number, "\t".join(values))  # what no run can read is no mere finding
                    found["quoted"].add(f"{path.name}:{number}: {value[:60]!r}")
    for user, row in histories.items():
        out.user.extend([user] * len(row))
        out.item.extend(row)
    return out


# ---- items and their images


@dataclass(slots=True)
class ItemChecks:
    """The items of ``X.item`` by raw id, with the line each stands in, how many have a title, and their images."""

    exists: bool = False
    lines: dict[str, int] = field(default_factory=dict)
    has_titles: bool = False
    titled: int = 0
    images: ItemImages = field(default_factory=ItemImages)


def read_items(layout: Layout, others: Iterable[str], found: Samples) -> ItemChecks:
    """Read ``X.item``; an item of `others`, which have interactions, may have an image in `image_dir` all the same.

    Raises:
        UserError: The file cannot be read, or has no column of item ids.
    """
    out, path = ItemChecks(), schema.item_file(layout.folder)
    images = out.images
    out.exists = os.path.lexists(path)
    columns = check_columns(path, Rules((layout.item,))) if out.exists else {}
    title = schema.title_column(columns)
    out.has_titles = title is not None
    first_with: dict[int, str] = {}
    for number, row in read_numbered(path) if out.exists else ():
        item = row[layout.item]
        if (first := out.lines.setdefault(item, number)) != number:
            found["twice"].add(f"{item!r} in lines {first} and {number}")
            continue
        images.add(layout.folder, item, row.get(schema.IMAGE, ""), layout.image_dir)
        for value in row.values():
            if value[:1] == '"':
                found["quoted"].add(f"{path.name}:{number}: {value[:60]!r}")
        if title is None:
            continue
        if not (text := clean(row[title])):
            found["untitled"].count += 1
            continue
        out.titled += 1
        if len(text) > LONG_TITLE:
            found["long_title"].add(f"{len(text):,} characters of item {item!r}")
        if (other := first_with.setdefault(hash(text), item)) is not item:
            found["same_title"].add(f"{other!r} and {item!r} are both {text[:60]!r}")
    if layout.image_dir is not None:
        for item in others:
            if item not in out.lines:
                images.add(layout.folder, item, "", layout.image_dir)
    images.check()
    for name, listed in (("unusable", images.missing), ("imageless", images.absent)):
        if listed:
            item, place, reason = listed[0]
            found[name] = Sample(len(listed), f"item {item!r}: {clean(f'{place} {reason}')}")
    return out


# ---- order


def measure_order(inter: InteractionColumns, found: Samples) -> tuple[float, float] | None:
    """Return the first and last time, None where there is none; compare the exact order with RecBole's.

    RecBole sorts float32 times, stably (data/interaction.py:307-346): today's seconds come in steps of 128 there,
    milliseconds of 131,072. It gives interactions without a time the mean, and leaves equal times (``ties``) in the
    file's order.
    """
    times, users, ids = (np.asarray(column) for column in (inter.time, inter.user, inter.item))
    gaps = np.isnan(times)
    if gaps.all():
        return None
    time = np.where(gaps, np.nanmean(times), times)
    exact = np.lexsort((time, users))
    user, at, items = users[exact], time[exact], ids[exact]
    same_user = user[1:] == user[:-1]
    in_recbole = ids[np.lexsort((time.astype(np.float32), users))]
    differs = np.unique(user[items != in_recbole])
    ends = np.flatnonzero(np.append(~same_user, True))
    found["untimed"].count = int(gaps.sum())
    found["ties"].count = np.unique(user[1:][same_user & (at[1:] == at[:-1])]).size
    if differs.size:
        found["reordered"] = Sample(differs.size, f"user {list(inter.users)[differs[0]]!r}")
        found["other_last"].count = int((items[ends] != in_recbole[ends]).sum())
    return float(np.nanmin(times)), float(np.nanmax(times))


# ---- ids


def measure_ids(inter: InteractionColumns, items: ItemChecks, in_histories: bool, found: Samples) -> None:
    """Look at every id; inside histories (``token_seq``) an item's id must hold no space."""
    item_ids = [*inter.items, *(item for item in items.lines if item not in inter.items)]
    for kind, ids in (("user", list(inter.users)), ("item", item_ids)):
        judge = word_problem if in_histories and kind == "item" else id_problem
        first_with: dict[str, str] = {}
        for text in ids:
            if (problem := judge(text)) is not None:
                found["unfit"].add(f"{kind} {text[:60]!r} {problem}")
            if (first := first_with.setdefault(text.strip().casefold(), text)) is not text:
                found[f"alike_{kind}s"].add(f"{first[:60]!r} and {text[:60]!r}")
            if not text.isprintable() and id_problem(text) is None:
                found["invisible"].add(repr(text[:60]))
    for item in item_ids:
        if item not in inter.items:
            found["unused"].add(repr(item[:60]))
        elif items.exists and item not in items.lines:
            found["unlisted"].add(repr(item[:60]))


def measure_repeats(inter: InteractionColumns, found: Samples) -> None:
    """Count identical lines, and interactions beyond the first of a user and item: all, and those on other lines."""
    found["lines_twice"].count = len(inter.hashes) - np.unique(np.asarray(inter.hashes)).size
    n_items = max(1, len(inter.items))
    pairs = np.sort(np.asarray(inter.user, np.int64) * n_items + np.asarray(inter.item, np.int64))
    again = pairs[1:][pairs[1:] == pairs[:-1]]
    if again.size:
        user, item = divmod(int(again[0]), n_items)
        example = f"user {list(inter.users)[user]!r} and item {list(inter.items)[item]!r}"
        found["pairs_twice"] = Sample(again.size, example)
        found["met_again"] = Sample(max(0, again.size - found["lines_twice"].count), example)


# ---- all of it


@dataclass(frozen=True, slots=True)
class Health:
    """What was measured of one dataset."""

    layout: Layout
    lengths: NDArray[np.int64]  # interactions of each user, ascending
    popularity: NDArray[np.int64]  # interactions of each item that has any, ascending
    over_time: NDArray[np.int64]  # how many fall into each of `BINS` equal stretches of time
    times: tuple[float, float] | None  # the first and the last, in the file's unit
    found: Samples  # what looks wrong, and how many items have no interactions (``unused``)
    items: ItemChecks
    item_tags: tuple[str, ...] = ()  # of the files of item summaries, X.TAG.isum
    user_tags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return the name that the files share with their folder."""
        return self.layout.folder.name

    @property
    def n_interactions(self) -> int:
        """Return how many interactions there are."""
        return int(self.lengths.sum())

    @property
    def n_all_items(self) -> int:
        """Return how many items there are, with interactions or without."""
        return len(self.popularity) + self.found["unused"].count

    @property
    def density(self) -> float:
        """Return the share of all (user, item) pairs that are interactions, repeats not counted."""
        once = self.n_interactions - self.found["pairs_twice"].count
        return once / max(1, len(self.lengths) * len(self.popularity))


def measure(folder: Path, given: Mapping[str, Any] | None = None) -> Health:
    """Read all files of the dataset in `folder` and measure them, with the configuration keys `given`.

    Raises:
        UserError: It is no dataset, a file cannot be read (file and line are named), or `image_dir` is no folder.
    """
    layout = find_layout(folder, given or {})
    found: Samples = defaultdict(Sample)
    inter = read_interactions(layout, found)
    items = read_items(layout, inter.items, found)
    measure_ids(inter, items, layout.history is not None, found)
    measure_repeats(inter, found)
    found["early"].count, found["late"].count = impossible_times(inter.exact_time or inter.time)
    times = np.asarray(inter.time)
    times = times[np.isfinite(times)]
    return Health(
        layout=layout,
        lengths=np.sort(np.bincount(inter.user, minlength=len(inter.users))),
        popularity=np.sort(np.bincount(inter.item, minlength=len(inter.items))),
        over_time=np.histogram(times, bins=BINS)[0] if times.size else np.zeros(0, np.int64),
        times=measure_order(inter, found),
        found=found,
        items=items,
        item_tags=schema.tags_of(layout.folder, schema.isum_file),
        user_tags=schema.tags_of(layout.folder, schema.usum_file),
    )
