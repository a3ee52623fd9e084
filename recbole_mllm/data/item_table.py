"""Titles, images and summaries, looked up by raw id and read by our own reader (RecBole's mangles free text)."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from recbole_mllm.common.errors import UserError
from recbole_mllm.data import schema
from recbole_mllm.data.atomic import clean, id_fault, read_atomic, read_columns, read_numbered
from recbole_mllm.data.images import ItemImages


@dataclass(frozen=True, slots=True)
class Items:
    """What is known of each item, by raw id; without a readable image an item is not in `images`.

    `extreme` holds width and height, in pixels, of images that a model's processor may refuse.
    """

    titles: Mapping[str, str]
    images: Mapping[str, Path]
    extreme: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def title(self, item: str) -> str:
        """Return the item's title, or "" where none is known."""
        return self.titles.get(item, "")

    def image(self, item: str) -> Path | None:
        """Return the item's image, or None."""
        return self.images.get(item)


def read_items(folder: Path, image_dir: Path | None, item_field: str = schema.ITEM) -> Items:
    """Read titles from ``X.item`` and find images by its ``image`` column, else by item id in `image_dir`.

    Images that cannot be used count as missing, with one line in the log.

    Raises:
        UserError: `image_dir` is no folder, or ``X.item`` cannot be read or holds an item twice.
    """
    if image_dir is not None and not image_dir.is_dir():
        raise UserError(f"image_dir {image_dir} is no folder; give the folder that holds the items' images")
    path = schema.item_file(folder)
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; MLLMMSR reads item titles from it (columns {item_field}:token, title:token_seq)"
        )
    titles, images = {}, ItemImages()
    lines: dict[str, int] = {}
    columns = read_columns(path)
    if item_field not in columns:
        raise UserError(
            f"{path}:1: there is no column {item_field}:token (ITEM_ID_FIELD); its columns are {', '.join(columns)}"
        )
    title = schema.title_column(columns)
    for number, row in read_numbered(path):
        item = row[item_field]
        if (problem := "starts with a quote" if item[:1] == '"' else id_fault(item)) is not None:
            raise UserError(
                f"{path}:{number}: the item's id {problem}; RecBole would know it by another, or not at all"
            )
        if (first := lines.setdefault(item, number)) != number:
            raise UserError(f"{path}:{number}: item {item} is already in line {first}; keep one of the two")
        titles[item] = clean(row[title]) if title else ""
        images.add(folder, item, row.get(schema.IMAGE, ""), image_dir)
    images.check()
    if images.missing:
        item, file, reason = images.missing[0]
        logging.getLogger(__name__).warning(
            f"{len(images.missing)} of {len(images.missing) + len(images.found)} images cannot be used and count as "
            f"missing, the first of item {item}: {file} {reason}; `recbole-mllm inspect {folder}` lists them"
        )
    return Items(titles, images.found, images.extreme)


def read_titles(folder: Path, item_field: str, wanted: Container[str]) -> dict[str, str]:
    """Return the titles of the `wanted` items alone, without a look at images."""
    path = schema.item_file(folder)
    title = schema.title_column(read_columns(path))
    return (
        {row[item_field]: clean(row[title]) for row in read_atomic(path) if row[item_field] in wanted} if title else {}
    )
