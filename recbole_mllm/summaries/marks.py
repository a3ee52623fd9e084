"""What a user's rows in the last ``X.<tag>.usum`` had read, so that a refresh finds who has changed without a prompt.

Marks live in the store's file: what was pruned, salvaged or deleted takes them along, and then all is looked up again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from recbole_mllm.data.texts import Items
from recbole_mllm.errors import UserError
from recbole_mllm.prompts import Style, item_line
from recbole_mllm.settings import SummarySettings
from recbole_mllm.summaries.chains import state_at
from recbole_mllm.summaries.store import Store

_TABLES = (
    "CREATE TABLE IF NOT EXISTS exports (tag TEXT PRIMARY KEY, size INTEGER NOT NULL, modified INTEGER NOT NULL) "
    "WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS marks (tag TEXT NOT NULL, user TEXT NOT NULL, first INTEGER NOT NULL, "
    "seen INTEGER NOT NULL, content BLOB NOT NULL, moments BLOB NOT NULL, PRIMARY KEY (tag, user)) WITHOUT ROWID",
)


class Mark(NamedTuple):
    """A user's rows read interactions ``[first, seen)``: `content` digests those, `moments` the rows' positions."""

    first: int
    seen: int
    content: bytes
    moments: bytes


Stamp = tuple[int, int]  # of a file: its size and when it was modified (ns)


class Marker:
    """Makes marks: everything that changes a user's texts goes into them, as digests.

    Args:
        style: The wording.
        items: Titles.
        summaries: Item summaries, by raw id.
        settings: What summaries are made of.
        writer: Names the model and how it decodes.
    """

    def __init__(
        self, style: Style, items: Items, summaries: Mapping[str, str], settings: SummarySettings, writer: str
    ) -> None:
        self._style, self._items, self._summaries, self._settings = style, items, summaries, settings
        shape = (settings.summary_mode, settings.block_size, settings.partial_block, settings.max_history)
        self._basis = blake2b(repr((writer, asdict(style), shape)).encode(), digest_size=16).digest()
        self._lines: dict[str, bytes] = {}

    def mark_of(self, histories: Sequence[tuple[Sequence[str], Iterable[int]]]) -> Mark:
        """Return the mark of a user with these histories and positions of rows in them, in any order."""
        marks = sorted(self.mark(history, positions) for history, positions in histories)
        if len(marks) == 1:
            return marks[0]
        content, moments = (repr([mark[part] for mark in marks]).encode() for part in (slice(0, 3), 3))
        return Mark(0, 0, blake2b(content, digest_size=16).digest(), blake2b(moments, digest_size=8).digest())

    def mark(self, history: Sequence[str], positions: Iterable[int]) -> Mark:
        """Return the mark of one whose rows stand at `positions` of `history` (raw item ids in order)."""
        places = sorted(positions)
        last = state_at(places[-1], self._settings) if places else None
        most = self._settings.max_history
        first = 0 if most is None or not places else max(0, places[0] - most)
        seen = last.seen if last is not None else first
        moments = blake2b(repr(places).encode(), digest_size=8).digest()
        return Mark(first, seen, self.content(history[first:seen]), moments)

    def content(self, items: Sequence[str]) -> bytes:
        """Return the digest of what prompts say of `items`, in this order: titles and summaries, not ids alone."""
        lines = self._lines
        try:
            parts = [lines[item] for item in items]
        except KeyError:
            lines.update((item, self._line(item)) for item in items if item not in lines)
            parts = [lines[item] for item in items]
        return blake2b(b"".join([self._basis, *parts]), digest_size=16).digest()

    def _line(self, item: str) -> bytes:
        # the id too, as rows name the history they have read by ids
        text = f"{item}\0{item_line(self._style, self._items.title(item), self._summaries.get(item, ''))}"
        return blake2b(text.encode(), digest_size=16).digest()


def stamp_of(path: Path) -> Stamp | None:
    """Return what tells this state of the file from another, or None where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def read_marks(store: Store, tag: str, path: Path) -> tuple[dict[str, Mark], Stamp | None]:
    """Return the marks of the export at `path`, by user, and its state; nothing where it is not as it was written."""
    stamp = stamp_of(path)
    try:
        with store.transaction() as db:
            if stamp is None or _stamped(db, tag) != stamp:
                return {}, None
            rows = db.execute("SELECT user, first, seen, content, moments FROM marks WHERE tag = ?", (tag,))
            return {user: Mark(*mark) for user, *mark in rows}, stamp
    except UserError:  # it was damaged, and is mended now: without marks
        return {}, None


def write_marks(
    store: Store, tag: str, path: Path, before: Stamp | None, changed: Mapping[str, Mark], gone: Iterable[str]
) -> None:
    """Note that `path` is the export of `tag`: the marks of its state `before`, with `changed` and without `gone`.

    Where another process has exported in between, the marks are dropped, and all is looked up next time.
    """
    stamp = stamp_of(path)
    with store.transaction(write=True) as db:
        for statement in _TABLES:
            db.execute(statement)
        overtaken = stamp is None or (before is not None and _stamped(db, tag) != before)
        db.execute("DELETE FROM exports WHERE tag = ?", (tag,))
        if overtaken or before is None:
            db.execute("DELETE FROM marks WHERE tag = ?", (tag,))
        if overtaken or stamp is None:
            return
        db.executemany("DELETE FROM marks WHERE tag = ? AND user = ?", ((tag, user) for user in gone))
        rows = ((tag, user, *mark) for user, mark in changed.items())
        db.executemany("INSERT OR REPLACE INTO marks VALUES (?, ?, ?, ?, ?, ?)", rows)
        db.execute("INSERT INTO exports VALUES (?, ?, ?)", (tag, *stamp))


def forget_marks(db: sqlite3.Connection) -> None:
    """Drop all marks, within a transaction: answers they rest on go."""
    for table in ("exports", "marks"):
        db.execute(f"DROP TABLE IF EXISTS {table}")


def _stamped(db: sqlite3.Connection, tag: str) -> Stamp | None:
    """Return the state of the file that the marks of `tag` are of."""
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'exports'").fetchone():
        return None
    row: Stamp | None = db.execute("SELECT size, modified FROM exports WHERE tag = ?", (tag,)).fetchone()
    return row
