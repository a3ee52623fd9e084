"""A damaged store: the readable answers go on in a fresh file, the bad file is kept aside."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from itertools import count, pairwise
from pathlib import Path

from recbole_mllm.files import remove_file, replace_file, staged
from recbole_mllm.summaries.table import COLUMNS, PAGE, SCHEMA, VERSION, Row, explained, wal_of

_PAGES = (PAGE, 4096)  # older stores have SQLite's default
# Keys are hex digests: an unreadable page hides its own few answers, not those of other ranges
_RANGES = ("", *(f"{n:02x}" for n in range(256)), "g", "\U0010ffff")


def salvage(path: Path, seen: int | None, why: str) -> None:
    """Put a fresh store with every readable answer of `path` in its place, and keep the bad file as ``….corrupt-N``.

    Args:
        path: The store.
        seen: The inode that was found damaged; where `path` is another file by now, another process was first.
        why: What SQLite said.

    Raises:
        UserError: There is no room, or the folder is not writable; the store is left as it was.
    """
    with explained(path), _alone(path):
        if not path.is_file() or path.stat().st_ino != seen:
            return
        with staged(path.parent, f"{path.name}.salvage") as scratch:
            fresh = scratch / "fresh"
            saved = _rebuilt(path, fresh, scratch)
            aside = _kept_aside(path)
            # a log of the bad file beside the fresh one would be replayed into it
            for suffix in ("-wal", "-shm"):
                remove_file(path.with_name(path.name + suffix))
            shutil.copymode(path, fresh)
            replace_file(fresh, path)
    logging.getLogger().warning(
        f"the summary store {path} was damaged ({why}): {saved} answers were saved, what is missing will be written "
        f"again; the bad file is kept as {aside.name}"
    )


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process at a time do this; the lock of one that was killed is gone with it."""
    lock = path.with_name(f".{path.name}.lock")
    with closing(sqlite3.connect(lock, timeout=600, isolation_level=None)) as db:
        db.execute("BEGIN EXCLUSIVE")
        try:
            yield
        finally:
            db.execute("ROLLBACK")


def _kept_aside(path: Path) -> Path:
    """Copy the store (and its log) under a name that is free."""
    aside = next(p for n in count(1) if not os.path.lexists(p := path.with_name(f"{path.name}.corrupt-{n}")))
    if wal_of(path).is_file():
        shutil.copy2(wal_of(path), wal_of(aside))
    shutil.copy2(path, aside)
    return aside


def _rebuilt(path: Path, fresh: Path, scratch: Path) -> int:
    """Write a store of all that can be read of `path` to `fresh`; return how many answers."""
    insert = f"INSERT OR IGNORE INTO answers VALUES ({', '.join('?' * len(COLUMNS))})"
    _page_one(fresh, PAGE)
    saved = 0
    with closing(sqlite3.connect(fresh, isolation_level=None)) as db:
        db.execute("BEGIN")
        for head, trusted in _heads(path, scratch):
            copy = scratch / "copy"
            shutil.copyfile(path, copy)
            remove_file(wal_of(copy))
            if wal_of(path).is_file():
                shutil.copyfile(wal_of(path), wal_of(copy))
            if head:
                _transplant(copy, head)
            if trusted or _mostly_in_place(copy):
                db.executemany(insert, _readable(copy))
            if saved := int(db.execute("SELECT COUNT(*) FROM answers").fetchone()[0]):
                break
        db.execute("COMMIT")
    return saved


def _heads(path: Path, scratch: Path) -> Iterator[tuple[bytes, bool]]:
    """Yield first pages to read the file with, and whether they surely have its page size; empty = its own, as it is.

    Its own with the page count mended is for a truncated file, an empty store's for a damaged header or schema.
    """
    yield b"", True
    with path.open("rb") as file:
        own = file.read(65536)
    size = int.from_bytes(own[16:18], "big")
    known = own.startswith(b"SQLite format 3\0") and size in _PAGES
    if known:
        yield own[:size], True
    for page in (size,) if known else _PAGES:
        yield _page_one(scratch / f"empty-{page}", page), known


def _page_one(path: Path, page: int) -> bytes:
    """Write an empty store with pages of `page` bytes; return its first."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(f"PRAGMA page_size={page}")
        db.execute(SCHEMA)
        db.execute(f"PRAGMA user_version = {VERSION}")
    return path.read_bytes()[:page]


def _transplant(copy: Path, page_one: bytes) -> None:
    """Overwrite the first page, header and schema; the table's root is page 2 in every store."""
    head, pages = bytearray(page_one), copy.stat().st_size // len(page_one)
    head[18:20] = b"\x02\x02"  # read the log beside it
    head[28:32] = pages.to_bytes(4, "big")
    head[92:96] = head[24:28]  # the page count is valid
    with copy.open("r+b") as file:
        file.write(head)


def _mostly_in_place(copy: Path) -> bool:
    """Return whether most pages are what they should be: read with another page size, texts would be mixed up."""
    with closing(sqlite3.connect(copy, isolation_level=None)) as db, suppress(sqlite3.DatabaseError):
        pages = int(db.execute("PRAGMA page_count").fetchone()[0])
        found = db.execute(f"PRAGMA quick_check({pages + 1})").fetchall()
        return sum(len(str(line).splitlines()) for (line,) in found) <= pages // 2
    return False


def _readable(copy: Path) -> Iterator[Row]:
    """Yield each answer that can be read, possibly twice; nothing where the file is no database of ours."""
    with closing(sqlite3.connect(copy, isolation_level=None)) as db:
        db.text_factory = bytes
        try:
            there = {name.decode() for _, name, *_ in db.execute("PRAGMA table_info(answers)")}
        except (sqlite3.DatabaseError, UnicodeDecodeError):
            return
        columns = ", ".join(name for name in COLUMNS if name in there)
        for low, high in pairwise(_RANGES) if columns else ():
            yield from _range(db, columns, low, high)


def _range(db: sqlite3.Connection, columns: str, low: str, high: str) -> Iterator[Row]:
    """Yield the answers of a range of keys, from both ends where something unreadable lies between."""
    for order in ("ASC", "DESC"):
        query = f"SELECT {columns} FROM answers WHERE key >= ? AND key < ? ORDER BY key {order}"
        with suppress(sqlite3.DatabaseError):
            for values in db.execute(query, (low, high)):
                if (row := _sound(values)) is not None:
                    yield row
            return


def _sound(values: tuple[object, ...]) -> Row | None:
    """Return the row, or None where a value is not what its column holds."""
    try:
        row = Row(*(value.decode() if isinstance(value, bytes) else value for value in values))  # type: ignore[arg-type]
    except (UnicodeDecodeError, TypeError):
        return None
    sound = all(isinstance(value, type(default)) for value, default in zip(row, _LIKE, strict=True))
    return row if sound and "\0" not in row.text else None


_LIKE = Row("", "", "", "", 0, 0, 0.0, 0.0, "", 0)
