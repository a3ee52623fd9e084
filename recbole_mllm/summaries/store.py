"""Every answer an MLLM gave, kept in one SQLite file a dataset: nothing is generated twice, a crash loses one batch."""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from recbole_mllm.data.images import image_digest
from recbole_mllm.errors import UserError
from recbole_mllm.mllm.base import MOST_CHARACTERS, Answer, Decoding
from recbole_mllm.prompts import Prompt
from recbole_mllm.summaries.salvage import salvage
from recbole_mllm.summaries.table import COLUMNS, DamagedStore, Row, connect, explained

_INSERT = (
    f"INSERT INTO answers ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))}) ON CONFLICT (key) DO "
    f"UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in COLUMNS[1:])} "
    f"WHERE length(answers.text) > {MOST_CHARACTERS} AND length(excluded.text) <= {MOST_CHARACTERS}"
)
_CHUNK = 500  # SQLite takes a limited number of parameters a statement
_T = TypeVar("_T")


class Spent(NamedTuple):
    """The seconds that writing some summaries took, whichever run did it; `reused` of them an earlier one had left."""

    seconds: float = 0.0
    reused: int = 0


def answer_key(identity: str, prompt: Prompt, decoding: Decoding) -> str:
    """Return the digest of everything that changes an answer: weights, prompt text, image bytes, decoding."""
    parts = [identity, prompt.marked, *(image_digest(path) for path in prompt.images), str(decoding)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class Store:
    """The answers of one dataset. Several processes may hold it open at once (WAL).

    A damaged file is noticed when it is opened or read; what is readable goes on in a fresh one (`salvage`).

    Raises:
        UserError: The folder or the file cannot be written, the disk is full, or a newer version wrote the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._db = self._opened()

    def close(self) -> None:
        """Close the file; what was added is on disk."""
        self._db.close()

    def get(self, keys: Iterable[str]) -> dict[str, str]:
        """Return the texts of those `keys` that are known."""
        wanted = list(dict.fromkeys(keys))
        return answers_of_size(self._tried(lambda db: _texts(db, wanted)), self.path)

    def add(self, kind: str, model: str, keys: Sequence[str], answers: Sequence[Answer], seconds: float) -> None:
        """Keep a batch of answers in one transaction; one that is known already stays, unless it is none (too long)."""
        each, now = seconds / max(1, len(keys)), time.time()
        rows = [
            Row(key, a.text, kind, model, a.prompt_tokens, a.new_tokens, each, now, "", int(a.truncated))
            for key, a in zip(keys, answers, strict=True)
        ]
        self._tried(lambda db: _inserted(db, rows))

    def seconds(self, kind: str, model: str, texts: Iterable[str], since: float) -> Spent:
        """Return what writing `texts` took when they were written, and how many of them are older than moment `since`.

        A text that several prompts led to counts as often as it is given, and as it was written, whichever is less.
        """
        wanted, seconds, reused = Counter(texts), 0.0, 0
        query = "SELECT text, seconds, created FROM answers WHERE kind = ? AND model = ? ORDER BY created DESC"
        for text, took, created in self._tried(lambda db: db.execute(query, (kind, model)).fetchall()):
            if wanted[text] > 0:
                wanted[text] -= 1
                seconds, reused = seconds + took, reused + (created < since)
        return Spent(seconds, reused)

    def insert(self, rows: Iterable[Row]) -> int:
        """Keep `rows`, all or none, beside what is there; return how many were new."""
        with self._mended():
            return _inserted(self._db, rows)

    @contextmanager
    def transaction(self, *, write: bool = False) -> Iterator[sqlite3.Connection]:
        """Give the connection for several reads of one moment's state, or to `write`: all or nothing."""
        with self._mended(), _transaction(self._db, "BEGIN IMMEDIATE" if write else "BEGIN"):
            yield self._db

    def compact(self) -> None:
        """Give unused space back to the disk.

        Raises:
            UserError: Another process uses the store.
        """
        with self._mended():
            self._db.execute("VACUUM")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def __len__(self) -> int:
        return self._tried(lambda db: int(db.execute("SELECT COUNT(*) FROM answers").fetchone()[0]))

    def _opened(self) -> sqlite3.Connection:
        for attempt in (1, 2):
            self._file = _inode(self.path)
            try:
                db = connect(self.path)
                self._file = _inode(self.path)
                return db
            except DamagedStore as error:
                if attempt == 2:
                    raise UserError(f"the summary store {self.path} is damaged ({error}); move it away") from error
                salvage(self.path, self._file, str(error))
        raise AssertionError("unreachable")

    def _follow(self) -> None:
        """Go on with the file that stands in the store's place now, should another process have mended it."""
        if _inode(self.path) != self._file:
            self._db.close()
            self._db = self._opened()

    def _tried(self, action: Callable[[sqlite3.Connection], _T]) -> _T:
        """Return what `action` does; on a damaged file, do it again on what could be saved of it."""
        self._follow()
        try:
            with explained(self.path):
                return action(self._db)
        except DamagedStore as error:
            self._db.close()
            salvage(self.path, self._file, str(error))
            self._db = self._opened()
        with explained(self.path):
            return action(self._db)

    @contextmanager
    def _mended(self) -> Iterator[None]:
        """Do what cannot simply be done again; a damaged file is mended, and the user asked to repeat."""
        self._follow()
        try:
            with explained(self.path):
                yield
        except DamagedStore as error:
            self._db.close()
            salvage(self.path, self._file, str(error))
            self._db = self._opened()
            raise UserError(
                f"the summary store {self.path} was damaged and is mended now; repeat the command"
            ) from error


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


@contextmanager
def _transaction(db: sqlite3.Connection, begin: str) -> Iterator[None]:
    db.execute(begin)
    try:
        yield
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def _texts(db: sqlite3.Connection, wanted: Sequence[str]) -> dict[str, str]:
    found = dict[str, str]()
    for start in range(0, len(wanted), _CHUNK):
        chunk = wanted[start : start + _CHUNK]
        marks = ",".join("?" * len(chunk))
        found.update(db.execute(f"SELECT key, text FROM answers WHERE key IN ({marks})", chunk).fetchall())
    return found


def answers_of_size(found: dict[str, str], path: Path) -> dict[str, str]:
    """Return the answers that can be one; of others a line says that they are made anew, which replaces them."""
    sound = {key: text for key, text in found.items() if len(text) <= MOST_CHARACTERS}
    if len(sound) < len(found):
        logging.getLogger().warning(
            f"the summary store {path} holds {len(found) - len(sound)} answers of more than {MOST_CHARACTERS:,} "
            "characters, which no summary has; they are left aside and written anew"
        )
    return sound


def _inserted(db: sqlite3.Connection, rows: Iterable[Row]) -> int:
    with _transaction(db, "BEGIN IMMEDIATE"):
        before = db.total_changes
        db.executemany(_INSERT, rows)
        return db.total_changes - before
