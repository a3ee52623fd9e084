"""Names of files, columns and fields, in one place."""

from __future__ import annotations

from pathlib import Path

USER, ITEM, TIME = "user_id", "item_id", "timestamp"
TITLE, IMAGE, SUMMARY = "title", "image", "summary"
SEEN, HISTORY = "seen", "history"

# Fields this project adds to RecBole's interactions; a leading underscore keeps them apart from a dataset's own.
POSITION = "_position"
TIE = "_tie"

ISUM_TYPES = {ITEM: "token", SUMMARY: "token_seq"}
USUM_TYPES = {USER: "token", SEEN: "float", HISTORY: "token", SUMMARY: "token_seq"}
ITEM_TYPES = {ITEM: "token", TITLE: "token_seq", IMAGE: "token"}
INTER_TYPES = {USER: "token", ITEM: "token", TIME: "float"}


def item_file(folder: Path) -> Path:
    """Return the ``.item`` file of the dataset in `folder` (its last part names the files)."""
    return folder / f"{folder.name}.item"


def isum_file(folder: Path, tag: str) -> Path:
    """Return the file of item summaries made as `tag` says."""
    return folder / f"{folder.name}.{tag}.isum"


def usum_file(folder: Path, tag: str) -> Path:
    """Return the file of user summaries made as `tag` says."""
    return folder / f"{folder.name}.{tag}.usum"


def store_file(folder: Path) -> Path:
    """Return the SQLite store of every answer an MLLM gave for this dataset."""
    return folder / f"{folder.name}.mllm.sqlite"
