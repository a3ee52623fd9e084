"""MovieLens-100k as RecBole ships it, with titles a person would write; posters are found by movie id."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from recbole_mllm.common.files import write_text
from recbole_mllm.data import schema
from recbole_mllm.data.atomic import clean, read_atomic, write_atomic

from .interactions import Row, collect, in_time_order
from .output import dataset_yaml, write_interactions
from .source import Intake


def convert(source: Path, folder: Path) -> None:
    """Write the dataset into `folder` (its last part names the files) from RecBole's ``ml-100k`` in `source`."""
    read = read_atomic(source / "ml-100k.inter")
    rows = (Row(row[schema.USER], row[schema.ITEM], int(float(row[schema.TIME]))) for row in read)
    written = write_interactions(folder, in_time_order(collect(rows, Intake())))
    types = {schema.ITEM: "token", schema.TITLE: "token_seq"}
    write_atomic(schema.item_file(folder), types, _items(source / "ml-100k.item"))
    comment = f"MovieLens-100k in exact time order.\n{written.order}"
    write_text(folder / "dataset.yaml", dataset_yaml(comment, {**written.config, "item_kind": "movie"}))


def _items(path: Path) -> Iterator[tuple[str, str]]:
    for row in read_atomic(path):
        year = row.get("release_year", "")
        yield row[schema.ITEM], clean(row["movie_title"]) + (f" ({year})" if year else "")
