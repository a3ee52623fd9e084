"""Names of files, columns and fields, in one place."""

from __future__ import annotations

from collections.abc import Callable, Container
from pathlib import Path

USER, ITEM, TIME = "user_id", "item_id", "timestamp"
EXACT_TIME = "exact_time"  # the source's own time, where `convert` had to make TIME a place in the order
PLACE = "position"  # in benchmark files beside an X.inter: how many of the user's interactions there precede the row's
TITLE, IMAGE, SUMMARY = "title", "image", "summary"
SEEN, HISTORY = "seen", "history"

# Fields this project adds to RecBole's interactions; a leading underscore keeps them apart from a dataset's own.
POSITION = "_position"
HISTORY_NUMBER = "_history"
TIE = "_tie"

ISUM_TYPES = {ITEM: "token", SUMMARY: "token_seq"}
USUM_TYPES = {USER: "token", SEEN: "float", HISTORY: "token", SUMMARY: "token_seq"}
ITEM_TYPES = {ITEM: "token", TITLE: "token_seq", IMAGE: "token"}
INTER_TYPES = {USER: "token", ITEM: "token", TIME: "float"}


def title_column(names: Container[str]) -> str | None:
    """Return the column of ``.item`` that holds the titles, under our name or that of RecBole's own datasets."""
    return next((name for name in (TITLE, "movie_title", "name") if name in names), None)


def item_file(folder: Path) -> Path:
    """Return the ``.item`` file of the dataset in `folder` (its last part names the files)."""
    return folder / f"{folder.name}.item"


def isum_file(folder: Path, tag: str) -> Path:
    """Return the file of item summaries made as `tag` says."""
    return folder / f"{folder.name}.{tag}.isum"


def usum_file(folder: Path, tag: str) -> Path:
    """Return the file of user summaries made as `tag` says."""
    return folder / f"{folder.name}.{tag}.usum"


def tags_of(folder: Path, file_of: Callable[[Path, str], Path]) -> tuple[str, ...]:
    """Return the tags of the summaries in `folder`, of items or users as `file_of` says (`isum_file`, `usum_file`)."""
    before, after = file_of(folder, "\0").name.split("\0")  # which no name holds
    paths = (path.name for path in folder.iterdir())
    return tuple(
        sorted(name[len(before) : -len(after)] for name in paths if name.startswith(before) and name.endswith(after))
    )


def store_file(folder: Path) -> Path:
    """Return the SQLite store of every answer an MLLM gave for this dataset."""
    return folder / f"{folder.name}.mllm.sqlite"
