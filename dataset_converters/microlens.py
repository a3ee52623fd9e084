"""MicroLens: short videos with covers and titles (https://github.com/westlake-repl/MicroLens)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from dataset_converters.catalog import ItemRow
from dataset_converters.finding import folder_named, only_one
from dataset_converters.intake import Intake
from dataset_converters.interactions import Row
from dataset_converters.values import number


class MicroLens:
    """``MicroLens-*_pairs.csv`` (with times) or ``_pairs.tsv`` (in order), ``_titles.csv``, and a folder of covers."""

    name = "microlens"
    item_kind = "video"
    features: Mapping[str, str] = {}
    has_urls = False

    def __init__(self, raw: Path, images: Path | None) -> None:
        self._timed = only_one(raw, "*_pairs.csv", required=False)
        self._listed = only_one(raw, "*_pairs.tsv", required=self._timed is None)
        self._titles = only_one(raw, "*_title*.csv", required=True)
        self._images = images or folder_named(raw, "cover", "image")
        self.notes = []
        if self._timed is not None and self._listed is not None:
            self.notes.append(f"{self._timed.name} was read, which has times; {self._listed.name} was not.")

    def interactions(self, intake: Intake) -> Iterator[Row]:
        """Yield pairs with their times, or in the lists' order."""
        if self._timed is not None:
            yield from self._pairs(self._timed, intake)
        elif self._listed is not None:
            yield from self._lists(self._listed, intake)

    def _pairs(self, path: Path, intake: Intake) -> Iterator[Row]:
        for place, row in enumerate(intake.table(path, ",")):
            if place == 0 and len(row) == 3 and number(row[2]) is None:
                continue  # a header
            if len(row) != 3:
                intake.refuse(f"{len(row)} values where user, item and timestamp are expected")
            elif (time := number(row[2])) is None:
                intake.refuse(f"timestamp {row[2][:40]!r} is no number")
            else:
                yield Row(row[0], row[1], time)

    def _lists(self, path: Path, intake: Intake) -> Iterator[Row]:
        for line in intake.lines(path):
            user, tab, items = line.partition("\t")
            if not line:
                continue
            if not tab or "\t" in items or not items.split():
                intake.refuse("expected a user, a tab, and items separated by spaces")
                continue
            for item in items.split():
                yield Row(user, item)

    def items(self, intake: Intake) -> Iterator[ItemRow]:
        """Yield each item's title."""
        assert self._titles is not None
        for place, row in enumerate(intake.table(self._titles, ",")):
            if place == 0 and [cell.strip().lower() for cell in row[1:]] in (["title"], ["titles"]):
                continue
            if len(row) != 2:
                intake.refuse(f"{len(row)} values where item and title are expected")
                continue
            yield ItemRow(row[0], row[1])

    def images(self) -> Path | None:
        """Return the covers' folder."""
        return self._images
