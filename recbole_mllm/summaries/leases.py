"""Who is writing which answer: processes that share a store do not write the same one at the same time."""

from __future__ import annotations

import os
import socket
import sqlite3
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from recbole_mllm.errors import UserError
from recbole_mllm.mllm.base import MOST_CHARACTERS
from recbole_mllm.summaries.store import Store

_TABLE = (
    "CREATE TABLE IF NOT EXISTS leases (key TEXT PRIMARY KEY, owner TEXT NOT NULL, until REAL NOT NULL) WITHOUT ROWID"
)
_LEASE_S = 900.0  # after which a process that says nothing is no longer waited for
_RENEW_S = 60.0
_CHUNK = 500  # SQLite takes a limited number of parameters a statement


class Claimed(NamedTuple):
    """What came of a claim: keys that are this process's to write, and texts that others have written meanwhile."""

    mine: set[str]
    known: dict[str, str]


class Leases:
    """This process's claims on a store. One of a process that has ended, seen on its own machine, counts for nothing.

    A lease saves work and guards nothing: where the table cannot be written, all is this process's to write.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._owner = f"{socket.gethostname()}:{os.getpid()}:{_born(os.getpid())}"
        self._renewed = time.time()

    def claim(self, keys: Sequence[str]) -> Claimed:
        """Claim those of `keys` that nobody has answered or is about to."""
        try:
            with self._store.transaction(write=True) as db:
                db.execute(_TABLE)
                known = _found(db, "key, text FROM answers", keys)
                known = {key: text for key, text in known.items() if len(text) <= MOST_CHARACTERS}  # as `Store.get`
                taken = {key for key, owner in self._others(db, keys).items() if _is_alive(owner)}
                mine = {key for key in keys if key not in known and key not in taken}
                until = time.time() + _LEASE_S
                db.executemany(
                    "INSERT OR REPLACE INTO leases VALUES (?, ?, ?)", ((k, self._owner, until) for k in mine)
                )
                return Claimed(mine, known)
        except UserError:
            return Claimed(set(keys), {})

    def _others(self, db: sqlite3.Connection, keys: Sequence[str]) -> dict[str, str]:
        leases = _found(db, f"key, owner FROM (SELECT * FROM leases WHERE until > {time.time()})", keys)
        return {key: owner for key, owner in leases.items() if owner != self._owner}

    def release(self, keys: Iterable[str]) -> None:
        """Give back leases on what has been kept."""
        self._quietly("DELETE FROM leases WHERE key = ? AND owner = ?", [(key, self._owner) for key in keys])
        self.renew()

    def renew(self) -> None:
        """Say from time to time that this process is still at work on what it has claimed."""
        if time.time() - self._renewed > _RENEW_S:
            self._renewed = time.time()
            self._quietly("UPDATE leases SET until = ? WHERE owner = ?", [(time.time() + _LEASE_S, self._owner)])

    def release_all(self) -> None:
        """Give back all leases."""
        self._quietly("DELETE FROM leases WHERE owner = ?", [(self._owner,)])

    def _quietly(self, statement: str, values: Sequence[tuple[object, ...]]) -> None:
        try:
            with self._store.transaction(write=True) as db:
                db.execute(_TABLE)
                db.executemany(statement, values)
        except UserError:  # they lapse
            pass


def _is_alive(owner: str) -> bool:
    """Return whether a process still runs; of another machine's, only the lease's end tells."""
    host, process, born = owner.rsplit(":", 2)
    return host != socket.gethostname() or _born(int(process)) == born


def _born(process: int) -> str | None:
    """Return when a process of this machine started, which tells it from a later one of its number; None: it ended."""
    try:
        # the process's name, in brackets, may hold anything; behind it: the state, and as the 20th value the start
        state, *values = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else values[18]
    except OSError:
        pass
    try:
        os.kill(process, 0)  # a machine without /proc, or no such process
    except ProcessLookupError:
        return None
    except OSError:  # another user's
        pass
    return ""


def _found(db: sqlite3.Connection, what: str, keys: Sequence[str]) -> dict[str, str]:
    out: dict[str, str] = {}
    for start in range(0, len(keys), _CHUNK):
        chunk = keys[start : start + _CHUNK]
        out.update(db.execute(f"SELECT {what} WHERE key IN ({','.join('?' * len(chunk))})", chunk).fetchall())
    return out
