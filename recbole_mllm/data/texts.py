"""Titles, images and summaries, looked up by raw id and read by our own reader (RecBole's mangles free text)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from recbole_mllm.data import schema
from recbole_mllm.data.atomic import clean, read_atomic, write_atomic
from recbole_mllm.data.images import find_image, inside, is_readable
from recbole_mllm.errors import UserError

_TITLES = (schema.TITLE, "movie_title", "name")


@dataclass(frozen=True, slots=True)
class Items:
    """What is known of each item, by raw id; without a readable image an item is not in `images`."""

    titles: Mapping[str, str]
    images: Mapping[str, Path]

    def title(self, item: str) -> str:
        """Return the item's title, or "" where none is known."""
        return self.titles.get(item, "")

    def image(self, item: str) -> Path | None:
        """Return the item's image, or None."""
        return self.images.get(item)


def read_items(folder: Path, image_dir: Path | None) -> Items:
    """Read titles from ``X.item`` and find images by its ``image`` column, else by item id in `image_dir`.

    Unreadable images count as missing, with one line in the log.

    Raises:
        UserError: `image_dir` is no folder, or ``X.item`` cannot be read.
    """
    if image_dir is not None and not image_dir.is_dir():
        raise UserError(f"image_dir {image_dir} is no folder; give the folder that holds the items' images")
    path = schema.item_file(folder)
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; MLLMMSR reads item titles from it (columns item_id:token, title:token_seq)"
        )
    titles: dict[str, str] = {}
    images: dict[str, Path] = {}
    for row in read_atomic(path):
        item = row[schema.ITEM]
        titles[item] = clean(next((row[name] for name in _TITLES if name in row), ""))
        image = inside(folder, row.get(schema.IMAGE, ""))
        if image is None and image_dir is not None:
            image = find_image(image_dir, item)
        if image is not None:
            images[item] = image
    broken = sorted(item for item, image in images.items() if not is_readable(image))
    for item in broken:
        del images[item]
    if broken:
        log = logging.getLogger(__name__)
        log.warning("%d images cannot be read and count as missing, the first of item %s", len(broken), broken[0])
    return Items(titles, images)


def write_item_summaries(path: Path, summaries: Mapping[str, str]) -> int:
    """Write ``X.<tag>.isum``, one row an item."""
    return write_atomic(path, schema.ISUM_TYPES, ((item, text) for item, text in summaries.items()))


@dataclass(frozen=True, slots=True)
class UserSummary:
    """One state of a user's preference: it has read `seen` interactions, those `history` is the digest of."""

    user: str
    seen: int
    history: str
    text: str


def write_user_summaries(path: Path, rows: Iterable[UserSummary]) -> int:
    """Write ``X.<tag>.usum``, one row a (user, moment)."""
    return write_atomic(path, schema.USUM_TYPES, ((r.user, str(r.seen), r.history, r.text) for r in rows))


def read_user_summaries(path: Path) -> list[UserSummary]:
    """Read ``X.<tag>.usum``."""
    return [
        UserSummary(r[schema.USER], int(float(r[schema.SEEN])), r[schema.HISTORY], r[schema.SUMMARY])
        for r in read_atomic(path)
    ]
