"""The pairs an evaluation asks about, in the order in which they are scored; no list where they are too many."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from recbole_mllm.data.schema import HISTORY_NUMBER, POSITION
from recbole_mllm.evaluation.protocol import training_counts
from recbole_mllm.planning.prepared import Prepared

Row = tuple[int, int, int]
_DENSE = 2**25  # scores drawn at a time for a retriever that is not trained yet


class Pairs(Protocol):
    """(history, position, item) of a split, item by item."""

    @property
    def total(self) -> int:
        """How many pairs there are."""
        ...

    def span(self, start: int, stop: int) -> list[Row]:
        """Return the pairs at places ``[start, stop)``."""
        ...

    def items(self) -> Any:
        """Return the distinct items among them."""
        ...


class Listed:
    """Pairs that are known one by one."""

    def __init__(self, histories: Any, positions: Any, items: Any) -> None:
        rows = np.unique(np.c_[items, histories, positions], axis=0)
        self.rows = rows

    @property
    def total(self) -> int:
        """How many pairs there are."""
        return len(self.rows)

    def span(self, start: int, stop: int) -> list[Row]:
        """Return the pairs at places ``[start, stop)``."""
        return [(h, p, i) for i, h, p in self.rows[start:stop].tolist()]

    def items(self) -> Any:
        """Return the distinct items among them."""
        return np.unique(self.rows[:, 0])


@dataclass(slots=True)
class Crossed:
    """Every row with every item, in batches of `batch` rows, each of which is scored item by item."""

    histories: Any
    positions: Any
    count: int
    batch: int

    @property
    def total(self) -> int:
        """How many pairs there are."""
        return len(self.histories) * self.count

    def span(self, start: int, stop: int) -> list[Row]:
        """Return the pairs at places ``[start, stop)``."""
        return [self._at(place) for place in range(start, min(stop, self.total))]

    def _at(self, place: int) -> Row:
        first = place // (self.batch * self.count) * self.batch
        rows = min(self.batch, len(self.histories) - first)
        item, row = divmod(place - first * self.count, rows)
        return int(self.histories[first + row]), int(self.positions[first + row]), item + 1

    def items(self) -> Any:
        """Return all items."""
        return np.arange(1, self.count + 1)


def pairs_of(p: Prepared, phase: str) -> Pairs:
    """Return the pairs that an evaluation on ``valid`` or ``test`` scores.

    Which items a retriever that is not trained yet would put first is not known: popular ones stand for them.
    """
    loader = p.loaders[phase]
    part = loader._dataset
    feat = part.inter_feat
    histories, places, targets = (feat[f].numpy() for f in (HISTORY_NUMBER, POSITION, part.iid_field))
    if hasattr(loader, "negatives"):
        rows = np.r_[np.arange(len(targets)), np.repeat(np.arange(len(targets)), loader.count)]
        return Listed(histories[rows], places[rows], np.r_[targets, loader.negatives])
    ranking = p.settings.ranking
    if ranking.full_sort == "brute":
        return Crossed(
            histories, places, int(part.item_num) - 1, max(1, min(len(histories), int(loader.batch_size or 1)))
        )
    top = min(ranking.top_k, int(part.item_num) - 1)
    rng = np.random.default_rng(p.config["seed"])
    drawn = np.concatenate(list(_popular(p, len(histories), top, rng)), axis=0)
    return Listed(np.repeat(histories, top), np.repeat(places, top), drawn.ravel())


def _popular(p: Prepared, rows: int, top: int, rng: np.random.Generator) -> Iterator[Any]:
    """Yield `top` distinct items a row, drawn by popularity: Gumbel noise on logarithms draws without replacement."""
    own = p.loaders["train"]._dataset
    counts, _ = training_counts(own, 0, int(own.item_num))
    weights = np.log(counts[1:] + 0.1)
    step = max(1, _DENSE // len(weights))
    for start in range(0, rows, step):
        noisy = weights + rng.gumbel(size=(min(step, rows - start), len(weights)))
        yield 1 + np.argpartition(-noisy, top - 1, axis=1)[:, :top]
    if not rows:
        yield np.empty((0, top), int)
