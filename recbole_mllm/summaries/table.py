"""The store's table: its columns, opening and migrating a file, and SQLite's errors in words that help."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, get_type_hints

from recbole_mllm.errors import UserError

VERSION = 1  # of the table, in the file's user_version; 0 has neither origin nor truncated
SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, text TEXT NOT NULL, kind TEXT NOT NULL, model TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, new_tokens INTEGER NOT NULL, seconds REAL NOT NULL, created REAL NOT NULL,
    origin TEXT NOT NULL DEFAULT '', truncated INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID
"""
_ADDED = {"origin": "TEXT NOT NULL DEFAULT ''", "truncated": "INTEGER NOT NULL DEFAULT 0"}
# what else may stand in a store (leases.py, marks.py): tables whose columns must be there
_BESIDE = {
    "leases": {"key", "owner", "until"},
    "exports": {"tag", "size", "modified"},
    "marks": {"tag", "user", "first", "seen", "content", "moments"},
}
_CHECKED_BYTES = 256 * 2**20  # a file up to this size is checked whole (about a second) when it was not closed properly
_BUSY_S = 60
PAGE = 16384  # a row of more than a quarter page spills into a page of its own: at 4096, the default, most answers do


class Row(NamedTuple):
    """One answer as it is kept; `origin` is empty where this dataset's own runs wrote it."""

    key: str
    text: str
    kind: str
    model: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    created: float
    origin: str = ""
    truncated: int = 0


COLUMNS = Row._fields
_KINDS = {str: "TEXT", int: "INTEGER", float: "REAL"}
_BASE = {(name, _KINDS[kind]) for name, kind in get_type_hints(Row).items() if name not in _ADDED}  # of every version


class DamagedStore(Exception):
    """The file is no database, or parts of it cannot be read."""


def wal_of(path: Path) -> Path:
    """Return the file that holds what is committed and not yet in `path` itself."""
    return path.with_name(f"{path.name}-wal")


def connect(path: Path) -> sqlite3.Connection:
    """Open the store at `path`, made if absent, brought to the newest version if older.

    Raises:
        DamagedStore: It is no database, is shorter than it says, or failed its check after an unclean end.
        UserError: It cannot be opened or written, is newer than this program, or is something else's; then it is left
            as it is.
    """
    with explained(path):
        if not path.is_file() and (path.exists() or path.is_symlink()):
            what = "a link that leads nowhere" if path.is_symlink() and not path.exists() else "no file"
            raise UserError(f"the summary store {path} is {what}; move it away, and a new store is made")
        path.parent.mkdir(parents=True, exist_ok=True)
        wal = wal_of(path)
        unclean = wal.is_file() and wal.stat().st_size > 0  # or another process is at work: no harm in checking then
        db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
        try:
            check_ours(db, path)
            db.execute(f"PRAGMA page_size={PAGE}")  # of a new file; no effect on another
            log_ahead(db, _BUSY_S)
            db.execute("PRAGMA synchronous=NORMAL")
            if unclean and path.stat().st_size <= _CHECKED_BYTES:
                _quick_check(db)
            _migrate(db, path)
        except BaseException:
            db.close()
            raise
        return db


def log_ahead(db: sqlite3.Connection, patience: float) -> None:
    """Turn on the write-ahead log."""
    _patiently(db, "PRAGMA journal_mode=WAL", patience)


def _patiently(db: sqlite3.Connection, statement: str, patience: float) -> list[tuple[str, ...]]:
    """Return the rows of `statement`, tried again until `patience` seconds are over.

    Of two processes that make one file at the same moment, the second is told at once that it is locked, whatever its
    timeout (SQLite does not wait where both might).
    """
    end = time.monotonic() + patience
    while True:
        try:
            return db.execute(statement).fetchall()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
        time.sleep(0.02)


def check_ours(db: sqlite3.Connection, path: Path) -> None:
    """Refuse a database that something else made, before anything is written into it.

    Raises:
        UserError: It says so, or a newer version of this program wrote it.
    """
    _version(db, path)
    there = _patiently(db, "SELECT name, type FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'", _BUSY_S)
    kinds: dict[str, str] = dict(there)  # type: ignore[arg-type]  # two columns each
    ours = kinds.get("answers") == "table" and set(_columns(db, "answers")) >= _BASE
    for name, columns in _BESIDE.items():
        ours = ours and (name not in kinds or columns <= {column for column, _ in _columns(db, name)})
    if there and not ours:
        raise UserError(
            f"{path} is an SQLite file of something else ({', '.join(sorted(kinds)[:5])}); move it away, and a new "
            "summary store is made"
        )


def _columns(db: sqlite3.Connection, table: str) -> list[tuple[str, str]]:
    return [(name, kind) for _, name, kind, *_ in db.execute(f"PRAGMA table_info({table})")]


def _quick_check(db: sqlite3.Connection) -> None:
    (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise DamagedStore(" ".join(str(verdict).split()))


def _migrate(db: sqlite3.Connection, path: Path) -> None:
    if _version(db, path) == VERSION and db.execute("PRAGMA table_info(answers)").fetchone():
        return
    db.execute("BEGIN IMMEDIATE")
    if _version(db, path) <= VERSION:  # another process may have been first
        db.execute(SCHEMA)
        there = {name for _, name, *_ in db.execute("PRAGMA table_info(answers)")}
        for name, kind in _ADDED.items():
            if name not in there:
                db.execute(f"ALTER TABLE answers ADD COLUMN {name} {kind}")
        db.execute(f"PRAGMA user_version = {VERSION}")
    db.execute("COMMIT")


def _version(db: sqlite3.Connection, path: Path) -> int:
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    if version > VERSION:
        raise UserError(f"the summary store {path} was written by a newer version of recbole-mllm; upgrade this one")
    return version


_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_CLOSED = {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH}
_TAKEN = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}
_NO_ROOM = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what SQLite and the disk say into a `DamagedStore`, or a `UserError` that says what to do."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in _DAMAGE or "Could not decode to UTF-8" in str(error):
            raise DamagedStore(str(error)) from error
        if advice := _advice(code):
            raise UserError(f"the summary store {path} {advice[0]} ({error}); {advice[1]}") from error
        raise
    except OSError as error:
        raise UserError(
            f"the summary store {path} cannot be opened ({error.strerror or error}); check the folder"
        ) from error


def _advice(code: int) -> tuple[str, str] | None:
    """Return what went wrong and what to do about it, for what is the machine's trouble and not a bug."""
    if code in _NO_ROOM:
        return "cannot be written", "make room on the disk (or raise the quota) and repeat: what was finished is kept"
    if code in _CLOSED:
        return "cannot be opened for writing", "make its folder writable, or copy the dataset to one that is"
    if code in _TAKEN:
        return f"has been in use by another process for {_BUSY_S} s", "wait for that process, or stop it"
    return None
