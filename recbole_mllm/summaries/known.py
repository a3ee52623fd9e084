"""The summary store, looked into without a trace: no file is made, none is touched."""

from __future__ import annotations

import glob
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from recbole_mllm.data.schema import store_file
from recbole_mllm.errors import UserError
from recbole_mllm.mllm.base import MOST_CHARACTERS
from recbole_mllm.summaries.shards import shards_of
from recbole_mllm.summaries.table import check_ours, wal_of

_CHUNK, _SAMPLES = 500, 512


class KnownTexts:
    """What `Scribe` asks of a dataset's store, read-only; what runs of several processes left unmerged is part of it.

    Raises:
        UserError: A file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        files = {path: _opened(path) for path in (store_file(folder), *shards_of(folder)) if path.is_file()}
        self._files = {path: db for path, db in files.items() if db is not None}

    def close(self) -> None:
        """Close the files."""
        for db in self._files.values():
            db.close()

    def get(self, keys: Iterable[str]) -> dict[str, str]:
        """Return the texts of those `keys` that are known."""
        out: dict[str, str] = {}
        wanted = list(dict.fromkeys(keys))
        for start in range(0, len(wanted), _CHUNK):
            chunk = wanted[start : start + _CHUNK]
            marks = ",".join("?" * len(chunk))
            right = f"length(text) <= {MOST_CHARACTERS}"  # what is longer is written anew (`Store.get`)
            out.update(self._rows(f"SELECT key, text FROM answers WHERE key IN ({marks}) AND {right}", chunk))
        return out

    def add(self, *_: object) -> None:
        """Keep nothing."""

    def samples(self, kind: str, model: str) -> list[tuple[str, int]]:
        """Return some texts of `kind` (``item`` or ``user``) that `model` wrote in any precision, with their tokens."""
        query = "SELECT text, new_tokens FROM answers WHERE kind = ? AND model GLOB ? AND new_tokens > 0 LIMIT ?"
        like = f"{glob.escape(model.rpartition(':')[0])}:*"
        return [(str(text), int(new)) for text, new in self._rows(query, [kind, like, _SAMPLES])]

    def _rows(self, query: str, values: list[object] | list[str]) -> list[tuple[str, str]]:
        out: list[tuple[str, str]] = []
        for path, db in self._files.items():
            with _readable(path):
                out += db.execute(query, values).fetchall()
        return out


class NothingKnown:
    """A store without answers that keeps none."""

    def get(self, keys: Iterable[str]) -> dict[str, str]:
        """Return nothing."""
        return {}

    def add(self, *_: object) -> None:
        """Keep nothing."""


def _opened(path: Path) -> sqlite3.Connection | None:
    """Open a file; None where a process that has just begun it, or was killed then, has made no table yet."""
    # `ro` alone leaves a -shm file behind; a file that another process writes must be read with its journal
    how = "mode=ro" if wal_of(path).is_file() else "immutable=1"
    with _readable(path):
        db = sqlite3.connect(f"{path.resolve().as_uri()}?{how}", uri=True)
        check_ours(db, path)
        if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'answers'").fetchone():
            return db
        db.close()
        return None


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise UserError(f"the summary store {path} cannot be read ({error}); `summarize` mends it") from error
