"""Scores that finished evaluations left, by state of the model and prompt, in an SQLite file that may be lost.

Nothing here can stop a run: a file that cannot be read is put aside, one that cannot be written is done without.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from recbole_mllm import ranks
from recbole_mllm.data.images import image_digest
from recbole_mllm.data.schema import score_file
from recbole_mllm.files import set_file_aside
from recbole_mllm.prompts import Prompt
from recbole_mllm.settings import RankingSettings
from recbole_mllm.summaries.table import log_ahead

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS models (id INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, used REAL NOT NULL)",
    "CREATE TABLE IF NOT EXISTS scores (model INTEGER NOT NULL, prompt BLOB NOT NULL, score REAL NOT NULL, "
    "PRIMARY KEY (model, prompt)) WITHOUT ROWID",
)
_VERSION = 1  # of how prompts are encoded and scored; another one makes all kept scores strangers
_CHUNK = 500  # SQLite takes a limited number of parameters a statement
_DELETED = 100_000  # rows a transaction deletes at a time
_T = TypeVar("_T")


def prompt_digest(prompt: Prompt) -> bytes:
    """Return 16 bytes that stand for the prompt's text and the bytes of its images."""
    parts = [prompt.marked, *(image_digest(path) for path in prompt.images)]
    return hashlib.sha256("\0".join(parts).encode()).digest()[:16]


def state_digest(parts: Iterable[object], tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of a model's state: what names it, and the bytes of what has been trained."""
    digest = hashlib.sha256(repr((_VERSION, *parts)).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"\0{name}:{tensor.dtype}:{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


class KeptScores:
    """Asks a model only about prompts it has not answered in the same state in an earlier evaluation.

    Nothing is looked up or kept before `use` says so: the state after an epoch is a passing one, and would only fill
    the file.
    """

    def __init__(self, folder: Path, settings: RankingSettings) -> None:
        self._folder, self._settings = folder, settings
        self._cache: ScoreCache | None = None
        self._digest: str | None = None
        self._on, self.reused = False, 0

    def use(self, wanted: bool) -> None:
        """Go on with the kept scores, or without."""
        self._on = wanted and self._settings.score_cache
        if not self._on and self._cache is not None:
            self._cache.close()
        if self._on:
            ranks.main_first(self._opened)  # several processes that make one file at a time get in each other's way

    def forget_state(self) -> None:
        """Take the model's state anew before the next score: it may have changed."""
        self._digest = None

    def scores(
        self, prompts: Sequence[Prompt], ask: Callable[[Sequence[Prompt]], list[float]], state: Callable[[], str]
    ) -> list[float]:
        """Return a score for each of `prompts`; `ask` gives those that are not known for `state`."""
        if not self._on:
            return ask(prompts)
        cache = self._opened()
        self._digest = self._digest or state()
        digests = [prompt_digest(prompt) for prompt in prompts]
        known = cache.get(self._digest, digests)
        missing = [n for n, digest in enumerate(digests) if digest not in known]
        new = dict(zip((digests[n] for n in missing), ask([prompts[n] for n in missing]), strict=True))
        cache.add(self._digest, new)
        self.reused += len(prompts) - len(missing)
        known |= new
        return [known[digest] for digest in digests]

    def _opened(self) -> ScoreCache:
        self._cache = self._cache or ScoreCache(score_file(self._folder), self._settings.score_cache_mb)
        return self._cache


class ScoreCache:
    """The scores of one dataset's prompts under any number of models.

    Args:
        path: The file, made if absent.
        megabytes: Its size; beyond it, models used longest ago are dropped, and when one alone fills it, it stays so.
    """

    def __init__(self, path: Path, megabytes: int) -> None:
        self.path, self.limit = path, megabytes * 2**20
        self._db: sqlite3.Connection | None = None
        self._log = logging.getLogger()
        self._tried(lambda db: None)

    def get(self, model: str, prompts: Sequence[bytes]) -> dict[bytes, float]:
        """Return the scores that `model`, a digest of everything that changes a score, has given to `prompts`."""
        return self._tried(lambda db: _found(db, model, prompts)) or {}

    def add(self, model: str, scores: Mapping[bytes, float]) -> None:
        """Keep `scores` by prompt, as far as the file's size allows."""
        if scores:
            self._tried(lambda db: self._added(db, model, scores))

    def close(self) -> None:
        """Close the file."""
        if self._db is not None:
            self._db.close()
            self._db = None

    def _added(self, db: sqlite3.Connection, model: str, scores: Mapping[bytes, float]) -> None:
        if _size(db) > self.limit and not _shrunk(db, model, self.limit):
            return
        with db:
            db.execute(
                "INSERT INTO models (digest, used) VALUES (?, ?) "
                "ON CONFLICT (digest) DO UPDATE SET used = excluded.used",
                (model, time.time()),
            )
            (number,) = db.execute("SELECT id FROM models WHERE digest = ?", (model,)).fetchone()
            rows = ((number, prompt, score) for prompt, score in scores.items())
            db.executemany("INSERT INTO scores VALUES (?, ?, ?) ON CONFLICT DO NOTHING", rows)

    def _tried(self, action: Callable[[sqlite3.Connection], _T]) -> _T | None:
        """Return what `action` does; a damaged file is begun anew, and one that cannot be used is left alone."""
        for attempt in (1, 2):
            try:
                self._db = self._db or _connect(self.path)
                return action(self._db)
            except (sqlite3.Error, OSError) as error:
                self.close()
                damaged = attempt == 1 and getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE
                if damaged and (aside := _put_aside(self.path)):
                    self._log.warning(
                        f"the kept scores in {self.path} are damaged, or something else's ({error}); they are begun "
                        f"anew, and the file is kept as {aside.name}"
                    )
                    continue
                self._log.warning(f"scores cannot be kept in {self.path} ({error}); going on without")
                self._tried = lambda action: None  # type: ignore[method-assign]
                return None
        raise AssertionError("unreachable")


_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR}  # the last: a table of another shape


_PATIENCE_S = 10  # with others that are at the file


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=_PATIENCE_S)
    try:
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'")}
        if others := tables - {"models", "scores"}:
            error = sqlite3.DatabaseError(f"it holds {', '.join(sorted(others)[:5])}")
            error.sqlite_errorcode = sqlite3.SQLITE_NOTADB
            raise error
        db.execute("PRAGMA auto_vacuum=INCREMENTAL")  # of a new file
        log_ahead(db, _PATIENCE_S)
        db.execute("PRAGMA synchronous=NORMAL")
        for statement in _SCHEMA:
            db.execute(statement)
    except BaseException:
        db.close()
        raise
    return db


def _put_aside(path: Path) -> Path | None:
    """Rename the file, whoever made it, with its log, which would be replayed into ours; None where that cannot be."""
    try:
        return set_file_aside(path, "corrupt", ("-wal", "-shm"))
    except OSError:
        return None


def _found(db: sqlite3.Connection, model: str, prompts: Sequence[bytes]) -> dict[bytes, float]:
    number = db.execute("SELECT id FROM models WHERE digest = ?", (model,)).fetchone()
    out = dict[bytes, float]()
    for chunk in _chunks(prompts) if number else ():
        marks = ",".join("?" * len(chunk))
        statement = f"SELECT prompt, score FROM scores WHERE model = ? AND prompt IN ({marks})"
        out.update(db.execute(statement, (*number, *chunk)).fetchall())
    if number:
        with db:
            db.execute("UPDATE models SET used = ? WHERE id = ?", (time.time(), *number))
    return out


def _chunks(prompts: Iterable[bytes]) -> Iterator[list[bytes]]:
    wanted = list(dict.fromkeys(prompts))
    for start in range(0, len(wanted), _CHUNK):
        yield wanted[start : start + _CHUNK]


def _size(db: sqlite3.Connection) -> int:
    """Return how many bytes of the file hold something."""
    pages, free, page = (
        db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * page)


def _shrunk(db: sqlite3.Connection, model: str, limit: int) -> bool:
    """Drop models other than `model`, the one used longest ago first, until the file is below `limit`; say whether."""
    for (number,) in db.execute("SELECT id FROM models WHERE digest != ? ORDER BY used", (model,)).fetchall():
        gone = 1
        while gone:
            with db:
                prompts = "SELECT prompt FROM scores WHERE model = ? LIMIT ?"
                gone = db.execute(
                    f"DELETE FROM scores WHERE model = ? AND prompt IN ({prompts})", (number, number, _DELETED)
                ).rowcount
        with db:
            db.execute("DELETE FROM models WHERE id = ?", (number,))
        if _size(db) < 0.8 * limit:  # some room, not to be back at once
            break
    db.execute("PRAGMA incremental_vacuum").fetchall()
    return _size(db) <= limit
