"""What a person wants to know of a store, and how it is made smaller."""

from __future__ import annotations

import time
from dataclasses import dataclass

from recbole_mllm.errors import UserError
from recbole_mllm.summaries.marks import forget_marks
from recbole_mllm.summaries.store import Store
from recbole_mllm.summaries.table import wal_of

_DAY_S = 86400.0
_EVER = 1e6  # days


@dataclass(frozen=True, slots=True)
class Group:
    """The answers of one model to one kind of prompt from one origin (empty: this dataset's own runs)."""

    model: str
    kind: str
    origin: str
    answers: int
    prompt_tokens: int
    new_tokens: int
    seconds: float
    truncated: int
    empty: int


@dataclass(frozen=True, slots=True)
class Pruned:
    """What went, or would go: how many answers of each model, how many stay, and the bytes the file became smaller."""

    gone: dict[str, int]
    left: int
    freed: int


def groups(store: Store) -> list[Group]:
    """Return what the store holds, by model, kind and origin."""
    query = """
        SELECT model, kind, origin, COUNT(*), SUM(prompt_tokens), SUM(new_tokens), SUM(seconds), SUM(truncated),
               SUM(text = '') FROM answers GROUP BY model, kind, origin ORDER BY model, kind, origin
    """
    with store.transaction() as db:
        return [Group(*row) for row in db.execute(query)]


def size(store: Store) -> int:
    """Return the bytes on disk, with what is not yet in the main file."""
    return sum(path.stat().st_size for path in (store.path, wal_of(store.path)) if path.is_file())


def prune(store: Store, model: str | None, older_than: float | None, *, dry_run: bool) -> Pruned:
    """Delete the answers of models like the pattern `model` that are older than `older_than` days.

    Raises:
        UserError: Neither is given, or another process keeps the file from being compacted (the answers are gone).
    """
    if model is None and older_than is None:
        raise UserError("say what to prune: --model PATTERN, --older-than DAYS, or both; --dry-run shows what would go")
    if older_than is not None and not 0 <= older_than < _EVER:
        raise UserError(f"--older-than {older_than:g} must be a number of days, at least 0")
    parts, given = ["1"], list[str | float]()
    if model is not None:
        parts.append("(model = ? OR model GLOB ?)")
        given += [model, model]
    if older_than is not None:
        parts.append("created < ?")
        given.append(time.time() - older_than * _DAY_S)
    where = " AND ".join(parts)
    before = size(store)
    with store.transaction(write=not dry_run) as db:
        query = f"SELECT model, COUNT(*) FROM answers WHERE {where} GROUP BY model ORDER BY model"
        gone = {str(name): int(answers) for name, answers in db.execute(query, given)}
        if gone and not dry_run:
            db.execute(f"DELETE FROM answers WHERE {where}", given)
            forget_marks(db)
        left = int(db.execute("SELECT COUNT(*) FROM answers").fetchone()[0])
    if gone and not dry_run:
        store.compact()
        return Pruned(gone, left, before - size(store))
    return Pruned(gone, left - sum(gone.values()), 0)
