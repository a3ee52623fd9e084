"""Every answer an MLLM gave, kept in one SQLite file a dataset: nothing is generated twice, a crash loses one batch."""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from recbole_mllm.data.images import image_digest
from recbole_mllm.errors import UserError
from recbole_mllm.mllm.base import Answer, Decoding
from recbole_mllm.prompts import Prompt

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, text TEXT NOT NULL, kind TEXT NOT NULL, model TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, new_tokens INTEGER NOT NULL, seconds REAL NOT NULL, created REAL NOT NULL
) WITHOUT ROWID
"""
_INSERT = "INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO NOTHING"
_CHUNK = 500  # SQLite takes a limited number of parameters a statement


def answer_key(identity: str, prompt: Prompt, decoding: Decoding) -> str:
    """Return the digest of everything that changes an answer: weights, prompt text, image bytes, decoding."""
    parts = [
        identity,
        prompt.marked,
        *(image_digest(path) for path in prompt.images),
        str(decoding),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class Store:
    """The answers of one dataset. Several processes may hold it open at once (WAL)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=60, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute(_SCHEMA)
        except (sqlite3.DatabaseError, OSError) as error:
            raise UserError(
                f"the summary store {path} cannot be opened ({error}); check the folder, or move the file away"
            ) from error

    def close(self) -> None:
        """Close the file; what was added is on disk."""
        self._db.close()

    def get(self, keys: Iterable[str]) -> dict[str, str]:
        """Return the texts of those `keys` that are known."""
        wanted, found = list(dict.fromkeys(keys)), dict[str, str]()
        for start in range(0, len(wanted), _CHUNK):
            chunk = wanted[start : start + _CHUNK]
            marks = ",".join("?" * len(chunk))
            found.update(self._db.execute(f"SELECT key, text FROM answers WHERE key IN ({marks})", chunk).fetchall())
        return found

    def add(self, kind: str, model: str, keys: Sequence[str], answers: Sequence[Answer], seconds: float) -> None:
        """Keep a batch of answers in one transaction; an answer that is known already stays as it is."""
        each, now = seconds / max(1, len(keys)), time.time()
        rows = [
            (key, a.text, kind, model, a.prompt_tokens, a.new_tokens, each, now)
            for key, a in zip(keys, answers, strict=True)
        ]
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany(_INSERT, rows)

    def __len__(self) -> int:
        return int(self._db.execute("SELECT COUNT(*) FROM answers").fetchone()[0])
