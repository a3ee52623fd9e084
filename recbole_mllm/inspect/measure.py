"""Measure a dataset: everything that the page and the text of `inspect` say, as numbers."""

from __future__ import annotations

import os
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recbole_mllm.common.config import checked_file
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.files import head
from recbole_mllm.data import schema
from recbole_mllm.data.atomic import (
    MAX_CHARACTERS,
    clean,
    id_problem,
    impossible_times,
    read_atomic,
    read_columns,
    read_numbered,
    read_values,
    unquoted,
    word_problem,
)
from recbole_mllm.data.checking import Rules, check_columns, fault, is_missing, time_problem
from recbole_mllm.data.images import MOST_LONG, ItemImages, Missing

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
    """A dataset's folder, its files of interactions and the names of its columns."""

    folder: Path
    inter: tuple[Path, ...]
    user: str
    item: str
    time: str
    history: str | None
    image_dir: Path | None

    @property
    def name(self) -> str:
        """Return the name that the files share with the folder."""
        return self.folder.name


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
    files = _inter_files(folder, keys)
    columns = read_columns(files[0])
    user, item = str(keys.get("USER_ID_FIELD") or schema.USER), str(keys.get("ITEM_ID_FIELD") or schema.ITEM)
    for name in (user, item):
        if name not in columns:
            raise UserError(
                f"{files[0]}:1: there is no column {name}; its columns are {', '.join(columns)}; name yours with "
                "USER_ID_FIELD and ITEM_ID_FIELD, in dataset.yaml or a config file"
            )
    history = f"{item}{keys.get('LIST_SUFFIX') or '_list'}"
    time, images = str(keys.get("TIME_FIELD") or schema.TIME), keys.get("image_dir")
    return Layout(
        folder, files, user, item, time, history if history in columns else None, Path(str(images)) if images else None
    )


def _inter_files(folder: Path, keys: Mapping[str, Any]) -> tuple[Path, ...]:
    """Return the benchmark files ``X.<part>.inter`` where they are named or alone, else ``X.inter``."""
    plain, named = folder / f"{folder.name}.inter", keys.get("benchmark_filename")
    if isinstance(named, list) and named:
        return tuple(folder / f"{folder.name}.{part}.inter" for part in named)
    if os.path.lexists(plain):
        return (plain,)
    files = [folder / f"{folder.name}.{part}.inter" for part in ("train", "valid", "test")]
    if there := tuple(path for path in files if path.is_file()):
        return there
    others = sorted(path.name for path in folder.glob("*.inter"))
    hint = "a folder of datasets is none itself" if any(folder.iterdir()) else "it is empty"
    if others:
        hint = f"it holds {', '.join(others[:3])}: RecBole wants files named after their folder"
    raise UserError(f"{folder} holds no {plain.name}; {hint}")


# ---- interactions


@dataclass(slots=True)
class InteractionColumns:
    """Interactions in the files' order, read in one pass; `user` and `item` are places in `users` and `items`.

    Attributes:
        users, items: Raw ids with their place.
        time: NaN where none is given; empty where the dataset has no time, as benchmark files.
        exact_time: The source's own times, where `convert` wrote them beside places in the order.
        hashes: One of each line, to find lines that are there twice.
        parts: Rows of each file, by its part's name ("" for ``X.inter``).
    """

    users: dict[str, int] = field(default_factory=dict)
    items: dict[str, int] = field(default_factory=dict)
    user: array[int] = field(default_factory=lambda: array("i"))
    item: array[int] = field(default_factory=lambda: array("i"))
    time: array[float] = field(default_factory=lambda: array("d"))
    exact_time: array[float] = field(default_factory=lambda: array("d"))
    hashes: array[int] = field(default_factory=lambda: array("q"))
    parts: dict[str, int] = field(default_factory=dict)


def read_interactions(layout: Layout, found: Samples) -> InteractionColumns:
    """Read all interactions; of benchmark files, each user's longest history with its target.

    Raises:
        UserError: A file cannot be read, or a time is no number (file and line are named).
    """
    out = InteractionColumns()
    histories: dict[int, array[int]] = {}
    timed = layout.history is None and layout.time in read_columns(layout.inter[0])
    for path in layout.inter:
        before = len(out.hashes)
        _read_file(out, found, histories, path, layout, timed)
        part = path.name.removeprefix(layout.name + ".").removesuffix("inter").rstrip(".")
        out.parts[part] = len(out.hashes) - before
    for user, items in histories.items():
        out.user.extend([user] * len(items))
        out.item.extend(items)
    return out


def _read_file(
    out: InteractionColumns, found: Samples, histories: dict[int, array[int]], path: Path, layout: Layout, timed: bool
) -> None:
    rules = Rules((layout.user, layout.item), layout.time)
    columns = list(check_columns(path, rules) if layout.history is None else read_columns(path))
    if layout.history is not None and layout.history not in columns:
        raise UserError(f"{path}:1: there is no column {layout.history}, which {layout.inter[0].name} has")
    at_user, at_item = columns.index(layout.user), columns.index(layout.item)
    at_history = None if layout.history is None else columns.index(layout.history)
    at_time = columns.index(layout.time) if timed else None
    at_exact = columns.index(schema.EXACT_TIME) if timed and schema.EXACT_TIME in columns else None
    users, items = out.users, out.items
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
                raise fault(path, number, str(rules.time), problem, rules)
            out.time.append(float(time))
        if at_exact is not None:
            out.exact_time.append(float("nan") if time_problem(values[at_exact]) else float(values[at_exact]))
        out.hashes.append(hash(tuple(values)))
        for value in values:
            if value[:1] == '"':
                unquoted(path, number, "\t".join(values))  # what no run can read is no mere finding
                found["quoted"].add(f"{path.name}:{number}: {value[:60]!r}")


# ---- items, their images and summaries


@dataclass(slots=True)
class ItemChecks:
    """The items of ``X.item`` by raw id, with the line each stands in, and which titles and images they have."""

    exists: bool = False
    lines: dict[str, int] = field(default_factory=dict)
    has_titles: bool = False
    titled: int = 0
    long: int = 0
    longest: tuple[int, str] = (0, "")
    n_images: int = 0
    missing: list[Missing] = field(default_factory=list)
    absent: list[Missing] = field(default_factory=list)
    lengthy: list[Missing] = field(default_factory=list)


def read_items(layout: Layout, others: Iterable[str], found: Samples) -> ItemChecks:
    """Read ``X.item``; an item of `others`, which have interactions, may have an image in `image_dir` all the same.

    Raises:
        UserError: The file cannot be read, or has no column of item ids.
    """
    out, images = ItemChecks(), ItemImages()
    path = schema.item_file(layout.folder)
    if os.path.lexists(path):
        _read_item_file(out, found, images, path, layout)
    if layout.image_dir is not None:
        for item in others:
            if item not in out.lines:
                images.add(layout.folder, item, "", layout.image_dir)
    images.check()
    out.lengthy = [
        Missing(item, str(images.found[item]), f"is {w} x {h} pixels: more than {MOST_LONG} times as long as wide")
        for item, (w, h) in images.extreme.items()
        if max(w, h) > MOST_LONG * min(w, h)
    ]
    out.n_images, out.missing, out.absent = len(images.found), images.missing, images.absent
    return out


def _read_item_file(out: ItemChecks, found: Samples, images: ItemImages, path: Path, layout: Layout) -> None:
    columns = read_columns(path)
    if layout.item not in columns:
        raise UserError(f"{path}:1: there is no column {layout.item}; its columns are {', '.join(columns)}")
    title = schema.title_column(columns)
    out.exists, out.has_titles = True, title is not None
    first_with: dict[int, str] = {}
    for number, row in read_numbered(path):
        item = row[layout.item]
        if (first := out.lines.setdefault(item, number)) != number:
            found["twice"].add(f"{item!r} in lines {first} and {number}")
            continue
        images.add(layout.folder, item, row.get(schema.IMAGE, ""), layout.image_dir)
        for name, value in row.items():
            if value[:1] == '"':
                found["quoted"].add(f"{path.name}:{number}: {value[:60]!r}")
            if len(value) > MAX_CHARACTERS:
                found["too_long"].add(f"{path.name}:{number}: {name} has {len(value):,} characters")
        if title is None or not (text := clean(row[title])):
            continue
        out.titled += 1
        if len(text) > LONG_TITLE:
            out.long += 1
            out.longest = max(out.longest, (len(text), item))
        if (other := first_with.setdefault(hash(text), item)) is not item:
            found["same_title"].add(f"{other!r} and {item!r} are both {text[:60]!r}")


class SummaryFile(NamedTuple):
    """A file of summaries: of items (`rows` of them) or of users (`rows` for `users`)."""

    tag: str
    rows: int
    users: int | None = None


def read_summaries(folder: Path) -> list[SummaryFile]:
    """Return what each ``X.<tag>.isum`` and ``X.<tag>.usum`` holds."""
    out = []
    for path in sorted(folder.glob(f"{folder.name}.*.isum")):
        items = {row.get(schema.ITEM) for row in read_atomic(path) if row.get(schema.SUMMARY)}
        out.append(SummaryFile(path.stem.removeprefix(folder.name + "."), len(items)))
    for path in sorted(folder.glob(f"{folder.name}.*.usum")):
        users = [row.get(schema.USER) for row in read_atomic(path)]
        out.append(SummaryFile(path.stem.removeprefix(folder.name + "."), len(users), len(set(users))))
    return out


# ---- order


@dataclass(frozen=True, slots=True)
class TimeOrder:
    """What the times say.

    Attributes:
        first, last: The range of times, in the file's unit.
        missing: Interactions without a time; RecBole gives them the mean.
        sorted: "file", "users" (each user's rows stand in order, the file does not) or "no".
        ties: Users with two interactions at the same time, whose order is the file's.
        reordered: Users whose items stand in another order in RecBole than by exact time, then place in the file.
        other_last: Those of them whose last item, the one a leave-one-out test asks for, is another.
    """

    first: float
    last: float
    missing: int
    sorted: str
    ties: int
    reordered: Sample
    other_last: int


def measure_order(inter: InteractionColumns) -> TimeOrder | None:
    """Compare the exact order with RecBole's, which sorts float32 times, stably (data/interaction.py:307-346).

    Float32 counts whole numbers up to 16,777,216 only: today's seconds come in steps of 128, milliseconds of 131,072.
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
    in_file, in_users = (time[1:] >= time[:-1]).all(), (np.diff(exact)[same_user] > 0).all()
    return TimeOrder(
        first=float(np.nanmin(times)),
        last=float(np.nanmax(times)),
        missing=int(gaps.sum()),
        sorted="file" if in_file else "users" if in_users else "no",
        ties=int(np.unique(user[1:][same_user & (at[1:] == at[:-1])]).size),
        reordered=Sample(int(differs.size), list(inter.users)[differs[0]] if differs.size else ""),
        other_last=int((items[ends] != in_recbole[ends]).sum()),
    )


# ---- ids


def measure_ids(inter: InteractionColumns, items: ItemChecks, in_histories: bool, found: Samples) -> None:
    """Look at every id; inside histories (``token_seq``) an item's id must hold no space.

    `found` gets items with interactions that have no row in ``X.item`` (``unlisted``), items without interactions
    (``unused``), ids that RecBole's reader loses or changes (``unfit``), that differ only in case or outer space from
    one before (``alike_users``, ``alike_items``), and that hold what nobody sees, as zero-width spaces (``invisible``).
    """
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


# ---- all of it


@dataclass(frozen=True, slots=True)
class Health:
    """What was measured of one dataset.

    Attributes:
        parts: Rows of each file of interactions, by its part's name ("" for ``X.inter``).
        lengths, popularity: Interactions of each user and of each item that has any, ascending.
        over_time: How many interactions fall into each of `BINS` equal stretches of time.
        impossible_times: How many times lie at or before 1970, and after tomorrow.
        rows_twice: Lines that are there already.
        found: What looks wrong; ``pairs_twice`` counts interactions beyond the first of the same user and item.
        marked: Files that begin with a byte order mark.
    """

    layout: Layout
    parts: dict[str, int]
    n_users: int
    n_items: int
    n_all_items: int
    n_interactions: int
    lengths: NDArray[np.int64]
    popularity: NDArray[np.int64]
    over_time: NDArray[np.int64]
    order: TimeOrder | None
    impossible_times: tuple[int, int]
    rows_twice: int
    found: Samples
    items: ItemChecks
    summaries: list[SummaryFile]
    marked: list[str]

    @property
    def density(self) -> float:
        """Return the share of all (user, item) pairs that are interactions, repeats not counted."""
        return (self.n_interactions - self.found["pairs_twice"].count) / max(1, self.n_users * self.n_items)


def measure(folder: Path, given: Mapping[str, Any] | None = None) -> Health:
    """Read all files of the dataset in `folder` and measure them, with the configuration keys `given`.

    Raises:
        UserError: It is no dataset, a file cannot be read (file and line are named), or `image_dir` is no folder.
    """
    layout = find_layout(folder, given or {})
    if layout.image_dir is not None and not layout.image_dir.is_dir():
        raise UserError(f"image_dir {layout.image_dir} is no folder; give the folder that holds the items' images")
    found: Samples = defaultdict(Sample)
    inter = read_interactions(layout, found)
    items = read_items(layout, inter.items, found)
    measure_ids(inter, items, layout.history is not None, found)
    found["pairs_twice"] = _pairs_twice(inter)
    times, hashes = np.asarray(inter.time), np.asarray(inter.hashes)
    known = times[np.isfinite(times)]
    files = [path for path in (*layout.inter, schema.item_file(layout.folder)) if path.is_file()]
    return Health(
        layout=layout,
        parts=inter.parts,
        n_users=len(inter.users),
        n_items=len(inter.items),
        n_all_items=len(inter.items.keys() | items.lines.keys()),
        n_interactions=len(inter.user),
        lengths=np.sort(np.bincount(inter.user, minlength=len(inter.users))),
        popularity=np.sort(np.bincount(inter.item, minlength=len(inter.items))),
        over_time=np.histogram(known, bins=BINS)[0] if known.size else np.zeros(0, np.int64),
        order=measure_order(inter),
        impossible_times=impossible_times(inter.exact_time or inter.time),
        rows_twice=len(hashes) - int(np.unique(hashes).size),
        found=found,
        items=items,
        summaries=read_summaries(layout.folder),
        marked=[path.name for path in files if head(path).startswith(b"\xef\xbb\xbf")],
    )


def _pairs_twice(inter: InteractionColumns) -> Sample:
    pairs = np.sort(np.asarray(inter.user, np.int64) * max(1, len(inter.items)) + np.asarray(inter.item, np.int64))
    again = pairs[1:][pairs[1:] == pairs[:-1]]
    if not again.size:
        return Sample()
    user, item = divmod(int(again[0]), len(inter.items))
    return Sample(int(again.size), f"user {list(inter.users)[user]!r} and item {list(inter.items)[item]!r}")
