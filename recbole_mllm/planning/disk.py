"""Bytes on disk: the very files, written small in a scratch folder, and scaled."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from recbole_mllm.mllm.base import Answer
from recbole_mllm.summaries.store import Store

_BATCH = 32  # answers a transaction of the store holds
_MOST = 20_000  # rows that are really written
_CHECKPOINT, _FOLDER = 60_000, 10_000  # bytes of settings in RecBole's checkpoint, and of PEFT's and its README


def store_bytes(kinds: Sequence[tuple[str, str, Sequence[Answer], float]]) -> float:
    """Return the size of a store with answers of each (kind, model), `rows` of each for which some stand."""
    total = sum(rows for *_, rows in kinds)
    written = sum(len(answers[:_MOST]) for _, _, answers, _ in kinds)
    if not written:
        return 0.0
    with TemporaryDirectory() as name:
        path = Path(name) / "store.sqlite"
        store = Store(path)
        empty = path.stat().st_size
        for kind, model, answers, _ in kinds:
            _fill(store, kind, model, answers[:_MOST])
        store.close()
        return empty + (path.stat().st_size - empty) * total / written


def _fill(store: Store, kind: str, model: str, answers: Sequence[Answer]) -> None:
    for start in range(0, len(answers), _BATCH):
        part = answers[start : start + _BATCH]
        keys = [hashlib.sha256(f"{kind} {start + n}".encode()).hexdigest() for n in range(len(part))]
        store.add(kind, model, keys, part, 0.123456)


def table_bytes(columns: Mapping[str, str], rows: float, each: float) -> float:
    """Return the size of an atomic file of `rows` rows of `each` bytes; without a row there is none."""
    header = "\t".join(f"{name}:{kind}" for name, kind in columns.items())
    return len(header) + 1 + rows * each if rows else 0.0


def score_cache_bytes(pairs: float) -> float:
    """Return the size of what a killed evaluation of `pairs` pairs leaves: a record each."""
    return 24.0 * pairs


def checkpoint_bytes(trained: int, *, newest: bool) -> float:
    """Return the size of RecBole's checkpoint (parameters and AdamW's two moments in float32), of a second one for the
    `newest` state, and of what is trained alone beside it.
    """
    if not trained:
        return float(_CHECKPOINT)
    return (1 + newest) * (12.0 * trained + _CHECKPOINT) + 4.0 * trained + _FOLDER
