"""Amazon Reviews 2023 (https://amazon-reviews-2023.github.io): one category's reviews and product descriptions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dataset_converters.catalog import ItemRow
from dataset_converters.finding import folder_named
from dataset_converters.intake import Intake
from dataset_converters.interactions import Row
from dataset_converters.values import number
from recbole_mllm.errors import UserError

_SIZES = ("large", "hi_res", "thumb")


class Amazon2023:
    """``CATEGORY.jsonl[.gz]`` and ``meta_CATEGORY.jsonl[.gz]``, read line by line; parent_asin names a product."""

    name = "amazon2023"
    item_kind = "product"
    features: Mapping[str, str] = {
        "main_category": "token",
        "store": "token",
        "categories": "token_seq",
        "price": "float",
    }
    has_urls = True

    def __init__(self, raw: Path, images: Path | None, category: str | None = None) -> None:
        found = {_category(path): path for path in sorted(raw.glob("*.jsonl*")) if _category(path)}
        reviews = {name: path for name, path in found.items() if not name.startswith("meta_")}
        if category is None and len(reviews) > 1:
            raise UserError(f"{raw} holds several categories ({', '.join(reviews)}); choose one with --category")
        chosen = category or next(iter(reviews), "CATEGORY")
        for name in (chosen, f"meta_{chosen}"):
            if name not in found:
                raise UserError(f"{raw} holds no {name}.jsonl or {name}.jsonl.gz; both files are needed")
        self._reviews, self._meta = found[chosen], found[f"meta_{chosen}"]
        self._images = images or folder_named(raw, "image")
        self.notes: list[str] = []

    def interactions(self, intake: Intake) -> Iterator[Row]:
        """Yield each review as (user, parent_asin, milliseconds, stars)."""
        for record in _objects(self._reviews, intake):
            user, item = record.get("user_id"), record.get("parent_asin") or record.get("asin")
            time, rating = record.get("timestamp"), record.get("rating")
            if time.__class__ is str:
                time = number(time)
            if not isinstance(user, str) or not isinstance(item, str):
                intake.refuse("user_id or parent_asin is missing")
            elif not isinstance(time, int | float) or not isinstance(rating, int | float):
                intake.refuse("timestamp or rating is missing, or no number")
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
            told = (
                _text(record.get("main_category")),
                _text(record.get("store")),
                " ".join("_".join(str(word).split()) for word in words if word),
                _price(record.get("price")),
            )
            yield ItemRow(item, _text(record.get("title")), "", told, main_image(record.get("images")))

    def images(self) -> Path | None:
        """Return a folder with images by parent_asin, if there is one."""
        return self._images


def _category(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    return name.removesuffix(".jsonl") if name.endswith(".jsonl") else ""


def _objects(path: Path, intake: Intake) -> Iterator[dict[str, Any]]:
    loads = json.loads
    for line in intake.lines(path):
        try:
            record = loads(line)
        except ValueError as error:
            if line.strip():
                intake.refuse(f"no JSON: {error}")
            continue
        if isinstance(record, dict):
            yield record
        else:
            intake.refuse("no JSON object")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _price(value: Any) -> str:
    found = number(str(value).replace("$", "").replace(",", "").strip())
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
            if isinstance(url, str) and url.startswith(("http://", "https://")):
                return url
    return ""
