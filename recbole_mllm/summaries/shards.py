"""The stores of a run of several processes: each writes a file of its own, and all are merged into the dataset's.

``X.mllm.rank3.sqlite`` is process 3's. What a killed run leaves behind is merged by whichever run comes next.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import count
from pathlib import Path

from recbole_mllm.data.schema import store_file
from recbole_mllm.files import remove_file
from recbole_mllm.mllm.base import Answer
from recbole_mllm.summaries.leases import Leases
from recbole_mllm.summaries.store import Store
from recbole_mllm.summaries.table import COLUMNS, Row, wal_of

_OWNER = "this file"  # the lease that says who writes a shard
_ROWS = 10_000  # rows merged in a transaction


class ShardStore(Store):
    """A store of one process: it reads the dataset's too, and writes its own alone."""

    def __init__(self, folder: Path, rank: int) -> None:
        main = store_file(folder)
        for number in count(1):
            name = f"{main.stem}.rank{rank}{f'-{number}' if number > 1 else ''}{main.suffix}"
            super().__init__(main.with_name(name))
            self._leases = Leases(self)
            if self._leases.claim([_OWNER]).mine:
                break
            super().close()  # another run's, which is at work
        self._main = Store(main)

    def get(self, keys: Iterable[str]) -> dict[str, str]:
        """Return the texts of those `keys` that are known, here or in the dataset's store."""
        wanted = list(dict.fromkeys(keys))
        found = self._main.get(wanted)
        return found | super().get(key for key in wanted if key not in found)

    def add(self, kind: str, model: str, keys: Sequence[str], answers: Sequence[Answer], seconds: float) -> None:
        """Keep a batch of answers, and say that this process is at work."""
        super().add(kind, model, keys, answers, seconds)
        self._leases.release(())

    def close(self) -> None:
        """Close the files; from now on the shard may be merged."""
        self._leases.release_all()
        self._main.close()
        super().close()


def opened_store(folder: Path) -> Store:
    """Open the dataset's store, with what earlier runs of several processes have left beside it."""
    store = Store(store_file(folder))
    try:
        merge_shards(store, folder)
    except BaseException:
        store.close()
        raise
    return store


def merge_shards(store: Store, folder: Path) -> int:
    """Move the answers of all shards beside `store` into it, but those a process is writing; return how many.

    A shard goes when all it holds is on disk in `store`: killed in between, it is merged again.
    """
    moved = 0
    for path in shards_of(folder):
        with closing(Store(path)) as shard:
            leases = Leases(shard)
            if not leases.claim([_OWNER]).mine:
                continue
            added = sum(store.insert(rows) for rows in _batches(shard))
        for gone in (path, wal_of(path), path.with_name(f"{path.name}-shm"), path.with_name(f".{path.name}.lock")):
            remove_file(gone)
        if added:
            logging.getLogger().info(f"{path}: {added} answers merged into {store.path.name}")
        moved += added
    return moved


def shards_of(folder: Path) -> list[Path]:
    """Return the shards beside the dataset's store."""
    main = store_file(folder)
    name = re.compile(rf"{re.escape(main.stem)}\.rank\d+(-\d+)?{re.escape(main.suffix)}")
    return sorted(path for path in main.parent.glob(f"*{main.suffix}") if name.fullmatch(path.name))


def _batches(shard: Store) -> Iterator[list[Row]]:
    last = ""
    while True:
        with shard.transaction() as db:
            query = f"SELECT {', '.join(COLUMNS)} FROM answers WHERE key > ? ORDER BY key LIMIT {_ROWS}"
            rows = [Row(*values) for values in db.execute(query, (last,))]
        if not rows:
            return
        yield rows
        last = rows[-1].key
