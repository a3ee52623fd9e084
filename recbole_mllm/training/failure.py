"""A loss or gradient that is no finite number: which rows it came from, kept for people to look at."""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path

from recbole_mllm.data.atomic import whole_file

COLUMNS = ("user_id", "item_id", "position", "label", "suspect")


def write_rows(path: Path, rows: Sequence[tuple[str, str, int, int]], suspects: Container[int]) -> None:
    """Write the batch's `rows` as a table; `suspects` are the places of those computed when it happened."""
    with whole_file(path) as file:
        file.write("\t".join(COLUMNS) + "\n")
        for place, row in enumerate(rows):
            file.write("\t".join(map(str, (*row, int(place in suspects)))) + "\n")
