"""Any table of interactions with named columns, and optionally one of items."""

from __future__ import annotations

import shlex
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import SequenceMatcher
from pathlib import Path

from recbole_mllm.common.errors import UserError

from .convert import Source, add_option
from .interactions import Row
from .item_rows import ItemRow
from .source import NO_NUMBER, USUAL, Intake, folder_named, moment, number

_ALIKE = 0.5
_SEPARATORS = ("::", "\t", ",", ";", "|")
_TABLES = (".csv", ".tsv", ".txt", ".dat", ".csv.gz", ".tsv.gz", ".inter", ".item")


@dataclass(frozen=True, slots=True)
class Columns:
    """The names of columns, None for the usual ones."""

    user: str | None = None
    item: str | None = None
    time: str | None = None
    rating: str | None = None
    title: str | None = None
    image: str | None = None


class CsvTable(Source):
    """Interactions from one table; titles and images from an items table, or from the same one."""

    name = "csv"
    example = "csv --raw log/ --interactions log.csv --items items.csv --user-column member --out dataset/mine"
    is_table = True
    recorded = ("separator",)

    def __init__(
        self,
        raw: Path,
        images: Path | None,
        interactions: str | None = None,
        items: str | None = None,
        separator: str | None = None,
        columns: Columns | None = None,
        encoding: str = "utf-8",
        command: Sequence[str] = ("recbole-mllm", "convert", "csv", "..."),
    ) -> None:
        self._command = command
        self._folder = folder = raw if raw.is_dir() else raw.parent
        self._encoding, self._separator, self._columns = encoding, separator, columns or Columns()
        self._table = raw if raw.is_file() else _choose(folder, interactions, items)
        self._items = folder / items if items and folder / items != self._table else None
        self._given = images
        super().__init__(images or folder_named(folder, "image", "cover", "poster"))

    @classmethod
    def add_options(cls, parser: ArgumentParser) -> None:
        """Add which file is which, what separates and what the columns are called."""
        for option, words in (("interactions", "the table of interactions in --raw"), ("items", "the table of items")):
            parser.add_argument(f"--{option}", metavar="FILE", help=words)
        parser.add_argument("--separator", type=_escaped, help="default: read off the header line")
        for column in fields(Columns):
            words = f"the column of the {column.name}, if it is none of {', '.join(USUAL[column.name])}"
            add_option(parser, f"--{column.name}-column", metavar="NAME", help=words)

    @classmethod
    def from_options(cls, raw: Path, images: Path | None, options: Namespace) -> Source:
        """Return the table or tables in a folder, or one file."""
        names = Columns(**{column.name: getattr(options, f"{column.name}_column") for column in fields(Columns)})
        files = options.interactions, options.items, options.separator
        return cls(raw, images, *files, names, options.encoding or "utf-8", ["recbole-mllm", "convert", *options.words])

    def interactions(self, intake: Intake) -> Iterator[Row]:
        """Yield each row; without a time column the file's order is each user's order."""
        self._check_columns()
        rows, header = self._open(self._table, intake)
        user, item, time, rating = (
            _find(header, key, getattr(self._columns, key), self._table) for key in ("user", "item", "time", "rating")
        )
        if time is None:
            self.notes.append("There is no column of times: the file's order is taken as the order in time.")
        assert user is not None and item is not None
        for row in rows:
            at = None if time is None else moment(row[time])
            stars = None if rating is None else number(row[rating])
            if time is not None and at is None:
                intake.refuse(f"{header[time]} {row[time][:40]!r} is no ISO date and {NO_NUMBER}")
            elif rating is not None and stars is None:
                intake.refuse(f"{header[rating]} {row[rating][:40]!r} {NO_NUMBER}")
            else:
                yield Row(row[user], row[item], at, None if stars is None else float(stars))

    def items(self, intake: Intake) -> Iterator[ItemRow]:
        """Yield each row of the items table, or of the interactions' table the first title and image of each item."""
        path = self._items or self._table
        if self._items is None:  # it is read a second time, and what is wrong with it was reported the first time
            intake = Intake(skip_bad_rows=True, multiline=intake.multiline)
        rows, header = self._open(path, intake)
        item = _find(header, "item", self._item_column(header), path)
        title, image = (_find(header, key, getattr(self._columns, key), path) for key in ("title", "image"))
        assert item is not None
        described = (
            ItemRow(row[item], "" if title is None else row[title], "" if image is None else self._below(row[image]))
            for row in rows
        )
        if self._items is not None:
            yield from described
            return
        first: dict[str, ItemRow] = {}
        for one in described:
            known = first.setdefault(one.item, one)
            if (title is not None and not known.title.strip()) or (image is not None and not known.image.strip()):
                title_of, image_of = (a if a.strip() else b for a, b in zip(known[1:3], one[1:3], strict=True))
                first[one.item] = ItemRow(one.item, title_of, image_of)
        yield from first.values()

    def images(self) -> Path | None:
        """Return the folder that image names are below, or that holds images by item id.

        Where a column names images and no folder was given or found, names start from the raw folder itself.
        """
        return self.image_folder or (self._folder if self._names_images() else None)

    def _below(self, name: str) -> str:
        """Return an image's name from the images' folder; tables mostly name that folder too, as ``images/1.jpg``."""
        if self._given or not self.image_folder:
            return name
        return name.strip().removeprefix("./").removeprefix(self.image_folder.name + "/")

    def _names_images(self) -> bool:
        path = self._items or self._table
        _, header = self._open(path, Intake(skip_bad_rows=True, multiline=True))
        return _find(header, "image", self._columns.image, path) is not None

    def _item_column(self, header: Sequence[str]) -> str | None:
        return self._columns.item if self._columns.item in header else None  # the two tables may call it differently

    def _check_columns(self) -> None:
        """Refuse tables that lack columns: all of them at once, with the options that name what comes nearest."""
        needed = {self._table: ["user", "item"]}
        if self._items is not None:
            needed[self._items] = ["item", "title"]
        headers = {path: self._open(path, Intake(skip_bad_rows=True, multiline=True))[1] for path in needed}
        said, flags, left = [], dict[str, str](), []
        for path, required in needed.items():
            header = headers[path]
            others = ["time", "rating"] if path == self._table else ["image"]
            others += ["title", "image"] if self._items is None else []
            named = {key: getattr(self._columns, key) for key in (*required, *others)}
            if path == self._items:
                named["item"] = self._item_column(header)
            places = {key: _find(header, key, name, path) for key, name in named.items()}
            lacking = [key for key, place in places.items() if place is None and (key in required or named[key])]
            unused = [name for place, name in enumerate(header) if place not in places.values()]
            if not lacking:
                left += [f"{path.name}: {', '.join(unused)[:500]}"] * bool(unused)
                continue
            shared = [name for name in unused if len(needed) > 1 and all(name in other for other in headers.values())]
            for key in lacking:
                near = shared[0] if key == "item" and len(shared) == 1 else _nearest(key, unused, named[key])
                flags[key] = near if flags.get(key, "NAME") == "NAME" else flags[key]
                unused = [name for name in unused if name != near]
            usual = [key for key in lacking if named[key] is None]
            parts = [f"{' and '.join(usual)} column under a usual name"] * bool(usual)
            parts += [f"column {named[key]!r}" for key in lacking if named[key] is not None]
            said.append(f"{path} has no {' and no '.join(parts)}; it has {', '.join(header)[:500]}")
        if said:
            more = [f"--{key}-column={near}" for key, near in flags.items()]
            raise UserError(f"{'; '.join(said)}; name them, nearest first: {shlex.join([*self._command, *more])}")
        if left:
            self.notes.append(
                f"Columns that are not read: {'; '.join(left)} (--time-column NAME and the like name one)."
            )

    def _open(self, path: Path, intake: Intake) -> tuple[Iterator[list[str]], list[str]]:
        separator = self._separator or _separator(path, self._encoding)
        rows = intake.table(path, separator, self._encoding)
        atomic = path.suffix in (".inter", ".item")  # RecBole's own files name a column's type too
        header = [(name.split(":")[0] if atomic else name).strip() for name in next(rows, [])]
        raw = intake.file
        if raw.rejected:
            raise UserError(f"{path}:{intake.rejects[-1].line}: {intake.rejects[-1].reason}; it must name the columns")
        if not header:
            raise UserError(f"{path} is empty; its first line must name the columns, and rows must follow")
        if len(set(header)) != len(header):
            held = ", ".join(header)[:200]
            raise UserError(f"{path}:{raw.at}: the first line must name the columns, each once; it holds {held!r}")
        intake.header()
        return _complete(rows, len(header), intake), header


def _complete(rows: Iterator[list[str]], width: int, intake: Intake) -> Iterator[list[str]]:
    for row in rows:
        if len(row) == width:
            yield row
        else:
            intake.refuse(f"{len(row)} values for {width} columns")


def _escaped(text: str) -> str:
    separator = {"\\t": "\t", "tab": "\t"}.get(text, text)
    if not separator or set(separator) & set('"\r\n'):
        raise ArgumentTypeError(f"{text!r} can separate nothing; give one such as ',' or '\\t'")
    return separator


def _plain(name: str) -> str:
    return name.lower().replace("_", "")


def _choose(folder: Path, interactions: str | None, items: str | None) -> Path:
    if interactions:
        return folder / interactions
    found = sorted(p for p in folder.iterdir() if p.is_file() and p.name.endswith(_TABLES) and p.name != items)
    if len(found) == 1:
        return found[0]
    names = ", ".join(path.name for path in found) or "no table"
    raise UserError(
        f"{folder} holds {names}; name the table of interactions with --interactions, and --items for titles"
    )


def _nearest(what: str, names: Sequence[str], given: str | None) -> str:
    """Return which of `names` is most like the one given or the usual ones of such a column; NAME where none is."""

    def likeness(name: str) -> float:
        usual, plain = map(_plain, [*USUAL[what], *([given] if given else [])]), _plain(name)
        return max((len(u) > 3 and u in plain) or SequenceMatcher(None, plain, u).ratio() for u in usual)

    best = max(names, key=likeness, default="NAME")
    return best if names and likeness(best) > _ALIKE else "NAME"


def _find(header: Sequence[str], what: str, given: str | None, path: Path) -> int | None:
    if given is not None and given in header:
        return header.index(given)
    lower: Mapping[str, int] = {name.lower(): place for place, name in reversed(list(enumerate(header)))}
    found = next((lower[name] for name in USUAL[what] if name in lower), None) if given is None else None
    alike = [name for name in header if found is not None and given is None and _plain(name) == _plain(header[found])]
    if len(alike) > 1:
        raise UserError(f"{path} has columns {' and '.join(alike)}; choose one with --{what}-column")
    return found


def _separator(path: Path, encoding: str) -> str:
    """Return the separator that the header line holds most of."""
    line = next(Intake(skip_bad_rows=True).lines(path, encoding), "")
    return max(_SEPARATORS, key=lambda mark: line.count(mark) * len(mark))
