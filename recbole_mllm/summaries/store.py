"""Every answer of an MLLM, in one SQLite file a dataset: nothing is generated twice, a crash loses one batch.

Several processes may have the file open at once (WAL); leases say which of them generates what. A damaged file is
replaced by a fresh one with every answer that can still be read.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import logging
import os
import re
import socket
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import psutil  # type: ignore[import-untyped]

from recbole_mllm.common import distributed
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.files import remove_file, replace_file, set_file_aside, staged
from recbole_mllm.common.prompts import Prompt
from recbole_mllm.data.images import image_digest
from recbole_mllm.data.schema import store_file
from recbole_mllm.mllm.interface import Answer, Decoding

VERSION = 1  # of the table, in the file's user_version
PAGE = 16384  # a row of more than a quarter page spills into a page of its own: at 4096, the default, most answers do
SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, text TEXT NOT NULL, kind TEXT NOT NULL, model TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, new_tokens INTEGER NOT NULL, seconds REAL NOT NULL, created REAL NOT NULL,
    origin TEXT NOT NULL DEFAULT '', truncated INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID
"""
_LEASES = (
    "CREATE TABLE IF NOT EXISTS leases (key TEXT PRIMARY KEY, owner TEXT NOT NULL, until REAL NOT NULL) WITHOUT ROWID"
)
_BUSY_S = 60
_LEASE_S = 900.0  # after which a process that says nothing is no longer waited for
_RENEW_S = 60.0
_SAMPLES = 512
# Keys are hex digests: an unreadable page hides its own few answers, not those of other ranges
_RANGES = ("", *(f"{n:02x}" for n in range(256)), "g", "\U0010ffff")


class StoredAnswer(NamedTuple):
    """One stored answer; `origin` is empty where this dataset's own runs generated it."""

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


COLUMNS = StoredAnswer._fields
_INSERT = f"INSERT INTO answers ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))}) ON CONFLICT (key) DO "
_REPLACE = f"UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in COLUMNS[1:])} WHERE text != excluded.text"


class Spent(NamedTuple):
    """The seconds that generating some summaries took, whichever run did it; `reused` of them earlier ones."""

    seconds: float = 0.0
    reused: int = 0


def answer_key(identity: str, prompt: Prompt, decoding: Decoding) -> str:
    """Return the digest of everything that changes an answer: weights, prompt text, image bytes, decoding."""
    parts = [identity, prompt.marked, *(image_digest(path) for path in prompt.images), str(decoding)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def shortened_key(key: str, limit: int) -> str:
    """Return the key of the answer to a prompt that was shortened to `limit` tokens; whole, it would have `key`."""
    return hashlib.sha256(f"{key}\0max_text_tokens={limit}".encode()).hexdigest()


def wal_of(path: Path) -> Path:
    """Return the file that holds what is committed and not yet in `path` itself."""
    return path.with_name(f"{path.name}-wal")


def opened_store(folder: Path) -> Store:
    """Open the dataset's store; what version 0.1.0 has left in stores of single processes is moved into it."""
    main = store_file(folder)
    store, left = Store(main), re.compile(rf"{re.escape(main.stem)}\.rank\d+(-\d+)?{re.escape(main.suffix)}")
    for path in sorted(path for path in folder.glob(f"*{main.suffix}") if left.fullmatch(path.name)):
        if not distributed.is_main():
            break
        with closing(Store(path)) as shard, shard.transaction() as db:
            added = store.insert(map(StoredAnswer._make, db.execute(f"SELECT {', '.join(COLUMNS)} FROM answers")))
        logging.getLogger().info(f"{path}: {added} answers merged into {main.name}")
        for ending in ("", "-wal", "-shm"):
            remove_file(path.with_name(path.name + ending))
    return store


class Store:
    """The answers of one dataset. Several processes may hold it open at once.

    Raises:
        UserError: The folder or the file cannot be written, the disk is full, a newer version wrote the file, or it is
            a database of something else, which is left as it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._db = self._opened()

    def close(self) -> None:
        """Close the file; what was added is on disk."""
        self._db.close()

    def get(self, keys: Iterable[str]) -> dict[str, str]:
        """Return the texts of those `keys` that are known."""
        with self._connection() as db:
            return dict(_select(db, "key, text", keys))

    def add(self, kind: str, model: str, keys: Sequence[str], answers: Sequence[Answer], seconds: float) -> None:
        """Store a batch of answers in one transaction; what is known stays."""
        each, now = seconds / max(1, len(keys)), time.time()
        self.insert(
            StoredAnswer(key, a.text, kind, model, a.prompt_tokens, a.new_tokens, each, now, "", int(a.truncated))
            for key, a in zip(keys, answers, strict=True)
        )

    def rename(self, keys: Mapping[str, str], model: str) -> None:
        """Give the answers of some keys those that `keys` has for them, and `model` as the one that wrote them."""
        values = [(new, model, old) for old, new in keys.items()]
        with self.transaction(write=True) as db:
            db.executemany("UPDATE OR IGNORE answers SET key = ?, model = ? WHERE key = ?", values)

    def insert(self, rows: Iterable[StoredAnswer], *, replace: bool = False) -> int:
        """Store `rows`, all or none, beside what is there (`replace`: in its place); return how many changed a text."""
        with self._connection() as db:
            return _inserted(db, rows, replace=replace)

    def spent(self, keys: Iterable[str], since: float) -> Spent:
        """Return the seconds that generating the answers of `keys` took, and how many are older than moment `since`."""
        with self._connection() as db:
            rows = _select(db, "seconds, created", keys)
        return Spent(sum(seconds for seconds, _ in rows), sum(created < since for _, created in rows))

    @contextmanager
    def transaction(self, *, write: bool = False) -> Iterator[sqlite3.Connection]:
        """Give the connection for several reads of one moment's state, or to `write`: all or nothing."""
        with self._connection() as db, _transaction(db, "BEGIN IMMEDIATE" if write else "BEGIN"):
            yield db

    def compact(self) -> None:
        """Give unused space back to the disk.

        Raises:
            UserError: Another process uses the store.
        """
        with self._connection() as db:
            db.execute("VACUUM")
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def __len__(self) -> int:
        with self._connection() as db:
            return int(db.execute("SELECT COUNT(*) FROM answers").fetchone()[0])

    def _opened(self) -> sqlite3.Connection:
        self._file = _inode(self.path)
        try:
            db = _connected(self.path)
        except DamagedStore as error:
            _salvage(self.path, self._file, str(error))
            db = _connected(self.path)
        self._file = _inode(self.path)
        return db

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """Give the connection; if the file turns out to be damaged, repair it for whoever comes next.

        Raises:
            UserError: It was damaged, or cannot be read or written.
        """
        if _inode(self.path) != self._file:  # another process has replaced it
            self._db.close()
            self._db = self._opened()
        try:
            with _explained(self.path):
                yield self._db
        except DamagedStore as error:
            self._db.close()
            _salvage(self.path, self._file, str(error))
            self._db = self._opened()
            raise UserError(
                f"the summary store {self.path} was damaged and has been repaired; run the same command again"
            ) from error


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


@contextmanager
def _transaction(db: sqlite3.Connection, begin: str) -> Iterator[None]:
    with db:  # commits, or rolls back
        db.execute(begin)
        yield


def _select(db: sqlite3.Connection, columns: str, keys: Iterable[str], where: str = "answers WHERE") -> list[Any]:
    """Return `columns` of the rows with one of `keys`."""
    query = f"SELECT {columns} FROM {where} key IN (SELECT value FROM json_each(?))"
    return db.execute(query, [json.dumps(list(keys))]).fetchall()


def _inserted(db: sqlite3.Connection, rows: Iterable[StoredAnswer], *, replace: bool = False) -> int:
    with _transaction(db, "BEGIN IMMEDIATE"):
        before = db.total_changes
        db.executemany(_INSERT + (_REPLACE if replace else "NOTHING"), rows)
        return db.total_changes - before


# The file


class DamagedStore(Exception):
    """The file is no database, or parts of it cannot be read."""


def _connected(path: Path) -> sqlite3.Connection:
    """Open the store at `path`, created if absent, brought to the newest version if older.

    Raises:
        DamagedStore: It is no database, or is shorter than it says.
        UserError: It cannot be opened or written, is newer than this program, or is something else's.
    """
    with _explained(path):
        if os.path.lexists(path) and not path.is_file():  # in this order: another process may just have made it
            raise UserError(f"the summary store {path} is no file; move it away, and a new store is created")
        path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
        try:
            _check_ours(db, path)
            db.execute(f"PRAGMA page_size={PAGE}")  # of a new file; no effect on another
            patiently(db, "PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")
            _create_table(db)
        except BaseException:
            db.close()
            raise
        return db


def patiently(db: sqlite3.Connection, statement: str) -> list[Any]:
    """Return the rows of `statement`, retried for `_BUSY_S` seconds.

    Of two processes that create one file at the same moment, the second gets an error at once, whatever its timeout
    (SQLite does not wait where both might).
    """
    end = time.monotonic() + _BUSY_S
    while True:
        try:
            return db.execute(statement).fetchall()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
        time.sleep(0.02)


def _check_ours(db: sqlite3.Connection, path: Path) -> None:
    """Refuse a database that something else made, or a newer version of this program, before anything is written."""
    if db.execute("PRAGMA user_version").fetchone()[0] > VERSION:
        raise UserError(f"the summary store {path} was written by a newer version of recbole-mllm; upgrade this one")
    kinds = dict(patiently(db, "SELECT name, type FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'"))
    if kinds and not (kinds.get("answers") == "table" and _columns(db) >= set(COLUMNS)):
        raise UserError(
            f"{path} is an SQLite file of something else ({', '.join(sorted(kinds)[:5])}); move it away, and a new "
            "summary store is created"
        )


def _columns(db: sqlite3.Connection) -> set[str]:
    return {name for _, name, *_ in db.execute("PRAGMA table_info(answers)")}


def _create_table(db: sqlite3.Connection) -> None:
    if not _columns(db):
        with _transaction(db, "BEGIN IMMEDIATE"):
            db.execute(SCHEMA)
            db.execute(f"PRAGMA user_version = {VERSION}")


_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_ROOM = "cannot be written", "make room on the disk (or raise the quota) and repeat: what was finished is stored"
_RIGHTS = "cannot be opened for writing", "make its folder writable, or copy the dataset to one that is"
_IN_USE = f"has been in use by another process for {_BUSY_S} s", "wait for that process, or stop it"
_ADVICE = {  # by SQLite's code: what went wrong and what to do about it, where it is the machine's trouble and no bug
    sqlite3.SQLITE_FULL: _ROOM, sqlite3.SQLITE_IOERR: _ROOM,
    sqlite3.SQLITE_READONLY: _RIGHTS, sqlite3.SQLITE_CANTOPEN: _RIGHTS, sqlite3.SQLITE_PERM: _RIGHTS,
    sqlite3.SQLITE_BUSY: _IN_USE, sqlite3.SQLITE_LOCKED: _IN_USE, sqlite3.SQLITE_PROTOCOL: _IN_USE,
}  # fmt: skip


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what SQLite and the disk say into a `DamagedStore`, or a `UserError` that says what to do."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in _DAMAGE or "Could not decode to UTF-8" in str(error):
            raise DamagedStore(str(error)) from error
        if code in _ADVICE:
            what, advice = _ADVICE[code]
            raise UserError(f"the summary store {path} {what} ({error}); {advice}") from error
        raise
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"the summary store {path} cannot be opened ({why}); check the folder") from error


# A damaged file


def _salvage(path: Path, seen: int | None, why: str) -> None:
    """Put a fresh store with every readable answer of `path` in its place; the bad file stays as ``….corrupt-N``.

    Args:
        path: The store.
        seen: The inode that was found damaged; where `path` is another file by now, another process was first.
        why: What SQLite said.

    Raises:
        UserError: There is no room, or the folder is not writable; the store is left as it was.
    """
    with _explained(path), path.with_name(f".{path.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _inode(path) != seen or seen is None:
            return
        with staged(path.parent, f"{path.name}.salvage") as scratch:
            fresh = scratch / path.name
            with closing(_connected(fresh)) as db:
                saved = _inserted(db, _readable(path))
            fresh.chmod(path.stat().st_mode)
            # with its log, which would be replayed into the fresh one
            aside = set_file_aside(path, "corrupt", ("-wal", "-shm"))
            replace_file(fresh, path)
    logging.getLogger().warning(
        f"the summary store {path} was damaged ({why}): {saved} answers were saved, what is missing will be generated "
        f"again; the bad file is now {aside.name}"
    )


def _readable(path: Path) -> Iterator[StoredAnswer]:
    """Yield each answer that can be read, possibly twice; nothing where the file is no database of ours."""
    with (
        closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db,
        suppress(sqlite3.DatabaseError),
    ):
        db.execute("PRAGMA writable_schema = ON")  # so that SQLite opens a file that is shorter than it says
        for low, high in pairwise(_RANGES):
            for order in ("ASC", "DESC"):  # from both ends of what is unreadable
                query = f"SELECT {', '.join(COLUMNS)} FROM answers WHERE key >= ? AND key < ? ORDER BY key {order}"
                with suppress(sqlite3.DatabaseError):
                    yield from filter(_is_sound, map(StoredAnswer._make, db.execute(query, (low, high))))
                    break


def _is_sound(row: StoredAnswer) -> bool:
    """Return whether each value is what its column holds."""
    kinds = get_type_hints(StoredAnswer).values()
    return all(isinstance(value, kind) for value, kind in zip(row, kinds, strict=True)) and "\0" not in row.text


# Who generates what


class Claimed(NamedTuple):
    """What came of a claim: keys that are this process's to generate, and texts that others have stored meanwhile."""

    mine: set[str]
    known: dict[str, str]


class Leases:
    """This process's claims on a store. One of a process that has ended, seen on its own machine, counts for nothing.

    A lease saves work and guards nothing: where the table cannot be written, all is this process's to generate.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._owner = owner_of(os.getpid())
        self._renewed = time.time()

    def claim(self, keys: Sequence[str]) -> Claimed:
        """Claim those of `keys` that nobody has answered or is about to."""
        now = time.time()
        try:
            with self._store.transaction(write=True) as db:
                db.execute(_LEASES)
                known = dict(_select(db, "key, text", keys))
                owners = dict(_select(db, "key, owner", keys, f"leases WHERE until > {now} AND"))
                living = {owner for owner in set(owners.values()) - {self._owner} if _is_alive(owner)}
                taken = {key for key, owner in owners.items() if owner in living}
                mine = set(keys) - known.keys() - taken
                values = ((key, self._owner, now + _LEASE_S) for key in mine)
                db.executemany("INSERT OR REPLACE INTO leases VALUES (?, ?, ?)", values)
                return Claimed(mine, known)
        except UserError:
            return Claimed(set(keys), {})

    def release(self, keys: Iterable[str]) -> None:
        """Give back leases on what has been stored."""
        self._write("DELETE FROM leases WHERE key = ? AND owner = ?", [(key, self._owner) for key in keys])
        self.renew()

    def renew(self) -> None:
        """Say from time to time that this process is still at work on what it has claimed."""
        if time.time() - self._renewed > _RENEW_S:
            self._renewed = time.time()
            self._write("UPDATE leases SET until = ? WHERE owner = ?", [(time.time() + _LEASE_S, self._owner)])

    def release_all(self) -> None:
        """Give back all leases."""
        self._write("DELETE FROM leases WHERE owner = ?", [(self._owner,)])

    def _write(self, statement: str, values: Sequence[tuple[object, ...]]) -> None:
        with suppress(UserError), self._store.transaction(write=True) as db:  # else they lapse
            db.execute(_LEASES)
            db.executemany(statement, values)


def owner_of(process: int) -> str:
    """Return what names a process of this machine in a lease; its start tells it from a later one of its number."""
    started = None  # of one that has ended
    with suppress(psutil.NoSuchProcess):
        found = psutil.Process(process)
        started = None if found.status() == psutil.STATUS_ZOMBIE else found.create_time()
    return f"{socket.gethostname()}:{process}:{started}"


def _is_alive(owner: str) -> bool:
    """Return whether a process still runs; of another machine's, only the lease's end tells."""
    host, process, _ = owner.rsplit(":", 2)
    return host != socket.gethostname() or owner_of(int(process)) == owner


# Without a trace


class ReadOnlyStore(Store):
    """A dataset's store for reading alone: no file is created or touched, and it may be absent.

    Raises:
        UserError: The file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(store_file(folder))

    def add(self, *_: Any, **__: Any) -> None:
        """Store nothing."""

    def rename(self, *_: Any, **__: Any) -> None:
        """Leave all as it is."""

    def samples(self, kind: str, model: str) -> list[tuple[str, int]]:
        """Return some texts of `kind` (``item`` or ``user``) that `model` wrote in any precision, with their tokens."""
        query = "SELECT text, new_tokens FROM answers WHERE kind = ? AND model GLOB ? AND new_tokens > 0 LIMIT ?"
        like = f"{glob.escape(model.rpartition(':')[0])}:*"
        with self._connection() as db:
            return db.execute(query, (kind, like, _SAMPLES)).fetchall()

    def _opened(self) -> sqlite3.Connection:
        found = _opened_to_read(self.path) if self.path.is_file() else None
        if found is None:
            found = sqlite3.connect(":memory:", isolation_level=None)
            found.execute(SCHEMA)
        return found

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        with _to_read(self.path):
            yield self._db


def _opened_to_read(path: Path) -> sqlite3.Connection | None:
    """Open a file; None where a process that has just begun it, or was killed then, has created no table yet."""
    # `ro` alone leaves a -shm file behind; a file that another process writes must be read with its journal
    how = "mode=ro" if wal_of(path).is_file() else "immutable=1"
    with _to_read(path):
        db = sqlite3.connect(f"{path.resolve().as_uri()}?{how}", uri=True, isolation_level=None)
        _check_ours(db, path)
        return db if _columns(db) else None


@contextmanager
def _to_read(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise UserError(f"the summary store {path} cannot be read ({error}); `summarize` repairs it") from error
