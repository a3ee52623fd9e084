"""Which files and which columns of a raw dump are meant."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal, overload

from dataset_converters.intake import Intake
from dataset_converters.values import number
from recbole_mllm.errors import UserError

# What a column is called, in lower case
USUAL = {
    "user": ("user_id", "user", "userid", "uid", "reviewerid", "session_id", "visitorid", "customer_id"),
    "item": ("item_id", "item", "itemid", "iid", "movieid", "video_id", "product_id", "asin", "article_id", "id"),
    "time": ("timestamp", "time", "date", "datetime", "ts", "unixreviewtime", "t_dat"),
    "rating": ("rating", "ratings", "score", "stars", "overall"),
    "title": ("title", "titles", "name", "item_title", "product_title", "movie_title", "prod_name"),
    "image": ("image", "image_path", "img", "cover", "poster", "picture"),
    "genres": ("genres", "genre"),
    "items": ("items", "item_ids", "item_id_list", "item_id", "item", "history", "sequence"),
}
_NUMBERS = ("time", "rating")


@overload
def only_one(raw: Path, pattern: str, required: Literal[True]) -> Path: ...
@overload
def only_one(raw: Path, pattern: str, required: bool) -> Path | None: ...
def only_one(raw: Path, pattern: str, required: bool) -> Path | None:
    """Return the file in `raw` that matches `pattern`.

    Raises:
        UserError: There are several, or none and it is required.
    """
    found = sorted(path for path in raw.glob(pattern) if not path.name.startswith("."))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{raw} holds several {pattern} ({names}); leave one dataset in a folder of its own")
    if not found and required:
        raise UserError(f"{raw} holds no {pattern}; give the folder of the raw files as --raw")
    return found[0] if found else None


def folder_named(raw: Path, *words: str) -> Path | None:
    """Return the first subfolder of `raw` with one of `words` in its name, the words in order of preference."""
    folders = sorted(path for path in raw.iterdir() if path.is_dir())
    return next((path for word in words for path in folders if word in path.name.lower()), None)


def columns(rows: Iterator[list[str]], intake: Intake, *wanted: str) -> Iterator[list[str]]:
    """Yield the `wanted` cells of each row, in that order.

    A first line that names each of them is a header, and they stand where it says; else they are all there is, in
    that order, and the first line is a row like any other.

    Raises:
        UserError: The first line names some of them and cannot be a row, or was a header that cannot be read.
    """
    first = next(rows, None)
    if intake.file.rejected and _names(re.split(r'[,;|\t:"]+', intake.file.first), wanted):
        raise UserError(f"{intake.file.path}:1: the names of the columns cannot be read; mend the line")
    if first is None:
        return
    places, width = named(first, wanted), len(first)
    if places is not None:
        intake.header()
    else:
        if _names(first, wanted) and not _may_be_row(first, wanted):
            raise UserError(
                f"{intake.file.path}:{intake.file.at}: is this a header? name each of {', '.join(wanted)} once, as "
                f"{', '.join(USUAL[what][0] for what in wanted)}; it holds {', '.join(first)[:200]!r}"
            )
        rows, places, width = chain([first], rows), list(range(len(wanted))), len(wanted)
    for row in rows:
        if len(row) == width:
            yield [row[place] for place in places]
        else:
            expected = ", ".join(wanted) if width == len(wanted) else f"{width}"
            intake.refuse(f"{len(row)} values where {expected} are expected")


def named(row: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    """Return the places of the `wanted` columns in `row` where it names each of them once, else None."""
    cells = [cell.strip().lower() for cell in row]
    found = [[place for place, cell in enumerate(cells) if cell in USUAL[what]] for what in wanted]
    return [places[0] for places in found] if all(len(places) == 1 for places in found) else None


def _names(cells: Sequence[str], wanted: Sequence[str]) -> bool:
    known = {name for what in wanted for name in USUAL[what]}
    return any(cell.strip().lower() in known for cell in cells)


def _may_be_row(row: Sequence[str], wanted: Sequence[str]) -> bool:
    numbers = (cell for cell, what in zip(row, wanted, strict=False) if what in _NUMBERS)
    return len(row) == len(wanted) and all(number(cell) is not None for cell in numbers)
