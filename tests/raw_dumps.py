"""Raw dumps as their publishers write them, small enough to be worked out by hand."""

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """Write one JSON object a line, compressed where the name says so."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def review(user: str, item: str, time: int, rating: float = 5.0) -> dict[str, Any]:
    """Return a line of CATEGORY.jsonl with the fields of the released files."""
    return {
        "rating": rating,
        "title": "Nice",
        "text": 'I liked\tit\nvery "much"',
        "images": [],
        "asin": f"{item}-red",
        "parent_asin": item,
        "user_id": user,
        "timestamp": time,
        "helpful_vote": 0,
        "verified_purchase": True,
    }


def product(item: str, title: str | None, images: Any = None, **more: Any) -> dict[str, Any]:
    """Return a line of meta_CATEGORY.jsonl with the fields of the released files."""
    known = {
        "main_category": "Toys & Games",
        "title": title,
        "average_rating": 4.5,
        "rating_number": 7,
        "features": ["soft"],
        "description": [],
        "price": None,
        "images": images,
        "videos": [],
        "store": None,
        "categories": ["Toys & Games", "Puzzles"],
        "details": {},
        "parent_asin": item,
        "bought_together": None,
    }
    return {**known, **more}


def write_microlens(raw: Path, lists: Mapping[str, list[str]], titles: Mapping[str, str]) -> Path:
    """Write ``MicroLens-made_pairs.tsv`` and ``MicroLens-made_titles.csv``."""
    raw.mkdir(parents=True, exist_ok=True)
    pairs = "".join(f"{user}\t{' '.join(items)}\n" for user, items in lists.items())
    (raw / "MicroLens-made_pairs.tsv").write_text(pairs)
    rows = "".join('{},"{}"\n'.format(item, title.replace('"', '""')) for item, title in titles.items())
    (raw / "MicroLens-made_titles.csv").write_text("item,title\n" + rows)
    return raw
