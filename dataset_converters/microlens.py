"""MicroLens: short videos with covers and titles (https://github.com/westlake-repl/MicroLens)."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from recbole_mllm.common.errors import UserError

from .convert import Source
from .interactions import Row
from .item_rows import ItemRow
from .source import NO_NUMBER, Intake, columns, folder_named, is_header, named, number, only_one


class MicroLens(Source):
    """``MicroLens-*_pairs.csv`` (with times) or ``_pairs.tsv`` (in order), ``_titles.csv``, and a folder of covers."""

    name = "microlens"
    example = "microlens --raw MicroLens-50k/ --out dataset/microlens"
    item_kind = "video"

    def __init__(self, raw: Path, images: Path | None) -> None:
        self._timed = only_one(raw, "*_pairs.csv", required=False)
        self._listed = only_one(raw, "*_pairs.tsv", required=self._timed is None)
        titles = only_one(raw, "*_title*.csv", required=True)
        assert titles is not None
        self._titles = titles
        super().__init__(images or folder_named(raw, "cover", "image"))
        if self._timed is not None and self._listed is not None:
            self.notes.append(f"{self._timed.name} was read, which has times; {self._listed.name} was not.")

    @classmethod
    def from_options(cls, raw: Path, images: Path | None, options: Namespace) -> Source:
        """Return the pairs and titles in a folder."""
        return cls(raw, images)

    def interactions(self, intake: Intake) -> Iterator[Row]:
        """Yield pairs with their times, or in the lists' order."""
        if self._timed is not None:
            yield from self._pairs(self._timed, intake)
        elif self._listed is not None:
            yield from self._lists(self._listed, intake)

    def _pairs(self, path: Path, intake: Intake) -> Iterator[Row]:
        for user, item, text in columns(intake.table(path, ","), intake, "user", "item", "time"):
            time = number(text)
            if time is None:
                intake.refuse(f"timestamp {text[:40]!r} {NO_NUMBER}")
            else:
                yield Row(user, item, time)

    def _lists(self, path: Path, intake: Intake) -> Iterator[Row]:
        for place, row in enumerate(intake.table(path, "\t", quoted=False)):
            items = [item for item in row[-1].split(" ") if item]
            if place == 0 and named(row, ("user", "items")) == [0, 1]:
                intake.header()
            elif place == 0 and is_header(row, ("user", "items", "item")):
                raise UserError(
                    f"{path}:1: is this a header? name the columns user and items, in this order; it holds "
                    f"{', '.join(row)[:200]!r}"
                )
            elif len(row) != 2 or not items or "," in row[-1]:
                intake.refuse("expected a user, a tab, and items separated by spaces")
            else:
                intake.file.listed += len(items) - 1
                yield from (Row(row[0], item) for item in items)

    def items(self, intake: Intake) -> Iterator[ItemRow]:
        """Yield each item's title."""
        for item, title in columns(intake.table(self._titles, ","), intake, "item", "title"):
            yield ItemRow(item, title)
