"""MovieLens-100k as RecBole ships it, with titles a person would write; posters are found by movie id."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from recbole_mllm.data import schema
from recbole_mllm.data.atomic import clean, read_atomic, whole_file, write_atomic

DATASET_YAML = """\
# MovieLens-100k in exact time order. `timestamp` is each interaction's place in that order: RecBole sorts float32 time,
# whose steps of 64 s would shuffle the last item of one user in six.
USER_ID_FIELD: user_id
ITEM_ID_FIELD: item_id
TIME_FIELD: timestamp
load_col: {inter: [user_id, item_id, timestamp]}
item_kind: movie
"""


def convert(source: Path, folder: Path) -> None:
    """Write the dataset into `folder` (its last part names the files) from RecBole's ``ml-100k`` in `source`."""
    rows = list(read_atomic(source / "ml-100k.inter"))
    rows.sort(key=lambda row: int(float(row[schema.TIME])))  # stable: equal times keep the file's order
    inter = ([row[schema.USER], row[schema.ITEM], str(place)] for place, row in enumerate(rows, start=1))
    write_atomic(folder / f"{folder.name}.inter", schema.INTER_TYPES, inter)
    types = {schema.ITEM: "token", schema.TITLE: "token_seq"}
    write_atomic(schema.item_file(folder), types, _items(source / "ml-100k.item"))
    with whole_file(folder / "dataset.yaml") as file:
        file.write(DATASET_YAML)


def _items(path: Path) -> Iterator[tuple[str, str]]:
    for row in read_atomic(path):
        year = row.get("release_year", "")
        yield row[schema.ITEM], clean(row["movie_title"]) + (f" ({year})" if year else "")
