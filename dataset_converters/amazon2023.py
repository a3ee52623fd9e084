"""Amazon Reviews 2023 (https://amazon-reviews-2023.github.io): one category's reviews and product descriptions."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from recbole_mllm.common.errors import UserError

from .convert import Source
from .interactions import Row
from .item_rows import ItemRow
from .source import Intake, folder_named, number, within_64_bits

_SIZES = ("large", "hi_res", "thumb")


class Amazon2023(Source):
    """``CATEGORY.jsonl[.gz]`` and ``meta_CATEGORY.jsonl[.gz]``, read line by line; parent_asin names a product."""

    name = "amazon2023"
    example = "amazon2023 --raw Baby_Products/ --k-core 5 --download-images --out dataset/baby"
    features: Mapping[str, str] = {
        "main_category": "token",
        "store": "token",
        "categories": "token_seq",
        "price": "float",
    }
    has_urls = True
    duplicates = "first"
    recorded = ("category",)

    def __init__(self, raw: Path, images: Path | None, category: str | None = None) -> None:
        found: dict[str, list[Path]] = {}
        for path in sorted(raw.glob("[!.]*.jsonl*")):
            if name := _category(path):
                found.setdefault(name, []).append(path)
        reviews = [name for name in found if not name.startswith("meta_")]
        if category is None and len(reviews) > 1:
            raise UserError(f"{raw} holds several categories ({', '.join(reviews)}); choose one with --category")
        chosen = category or next(iter(reviews), "CATEGORY")
        for name in (chosen, f"meta_{chosen}"):
            if name not in found:
                raise UserError(f"{raw} holds no {name}.jsonl or {name}.jsonl.gz; both files are needed")
            if len(found[name]) > 1:
                names = " and ".join(path.name for path in found[name])
                raise UserError(f"{raw} holds {names}; leave one of them in the folder")
        self._reviews, self._meta = found[chosen][0], found[f"meta_{chosen}"][0]
        super().__init__(images or folder_named(raw, "image"))

    @classmethod
    def add_options(cls, parser: ArgumentParser) -> None:
        """Add what only Amazon's files have: several categories a folder."""
        parser.add_argument("--category", help="where --raw holds several")

    @classmethod
    def from_options(cls, raw: Path, images: Path | None, options: Namespace) -> Source:
        """Return one category's files."""
        return cls(raw, images, options.category)

    def interactions(self, intake: Intake) -> Iterator[Row]:
        """Yield each review as (user, parent_asin, milliseconds, stars)."""
        for record in _objects(self._reviews, intake):
            user, item = record.get("user_id"), record.get("parent_asin") or record.get("asin")
            time, rating = within_64_bits(record.get("timestamp")), within_64_bits(record.get("rating"))
            if not isinstance(user, str) or not isinstance(item, str):
                intake.refuse("user_id or parent_asin is missing, or no text")
            elif time is None or rating is None:
                key = "timestamp" if time is None else "rating"
                shown = repr(record.get(key))[:40] if key in record else "missing"
                intake.refuse(f"{key} is {shown}, and must be a number that 64 bits hold")
            else:
                yield Row(user, item, time, float(rating))

    def items(self, intake: Intake) -> Iterator[ItemRow]:
        """Yield each product's title, its features that RecBole can use, and the URL of its main image."""
        for record in _objects(self._meta, intake):
            item = record.get("parent_asin")
            if not isinstance(item, str):
                intake.refuse("parent_asin is missing")
                continue
            categories = record.get("categories")
            words = categories if isinstance(categories, list) else []
            text = (
                _text(record.get("main_category")),
                _text(record.get("store")),
                " ".join("_".join(str(word).split()) for word in words if word and isinstance(word, str | int | float)),
                _price(record.get("price")),
            )
            yield ItemRow(item, _text(record.get("title")), "", text, main_image(record.get("images")))


def _category(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    return name.removesuffix(".jsonl") if name.endswith(".jsonl") else ""


def _objects(path: Path, intake: Intake) -> Iterator[dict[str, Any]]:
    read = json.JSONDecoder(object_pairs_hook=_object).decode
    for line in intake.lines(path):
        try:
            record = read(line)
        except RecursionError:
            intake.refuse("no JSON: nested too deeply")
            continue
        except ValueError as error:
            if line.strip():
                intake.refuse(f"no JSON: {error}")
            else:
                intake.file.blank += 1
            continue
        if isinstance(record, dict):
            yield record
        else:
            intake.refuse("no JSON object")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object of `pairs`.

    Raises:
        ValueError: A key is there twice, so that one of its values would vanish.
    """
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)[:40]!r} is there twice")
    return record


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _price(value: Any) -> str:
    text = str(value) if isinstance(value, str | int | float) else ""
    found = number(text.replace("$", "").replace(",", ""))
    return "" if found is None else str(found)


def main_image(images: Any) -> str:
    """Return the URL of the main image, in the size made for a page, or "".

    Args:
        images: A list of ``{thumb, large, hi_res, variant}`` as in the released files, or a dict of such lists as
            on the hub; anything in it may be null.
    """
    if isinstance(images, Mapping):
        length = max((len(column) for column in images.values() if isinstance(column, list)), default=0)
        images = [
            {key: column[place] for key, column in images.items() if isinstance(column, list) and place < len(column)}
            for place in range(length)
        ]
    if not isinstance(images, list):
        return ""
    each = [image for image in images if isinstance(image, Mapping)]
    for image in sorted(each, key=lambda image: image.get("variant") != "MAIN"):
        for size in _SIZES:
            url = image.get(size)
            # one that holds a space or a lone surrogate could be neither listed nor fetched
            if (
                isinstance(url, str)
                and url.startswith(("http://", "https://"))
                and url.isprintable()
                and " " not in url
            ):
                return url
    return ""
