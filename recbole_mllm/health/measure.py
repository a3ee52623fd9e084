"""Measure a dataset: everything that the page and the text say, as numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recbole_mllm.data import schema
from recbole_mllm.errors import UserError
from recbole_mllm.health.ids import Ids, measure_ids
from recbole_mllm.health.interactions import Interactions, read_interactions
from recbole_mllm.health.items import Items, Summaries, read_items, read_summaries
from recbole_mllm.health.layout import Layout, find_layout
from recbole_mllm.health.order import Order, measure_order
from recbole_mllm.health.sample import Sample

BINS = 60  # of interactions over time


@dataclass(frozen=True, slots=True)
class Health:
    """What was measured of one dataset.

    Attributes:
        parts: Rows of each file of interactions, by its part's name ("" for ``X.inter``).
        lengths, popularity: Interactions of each user and of each item that has any, ascending.
        over_time: How many interactions fall into each of `BINS` equal stretches of time.
        impossible_times: How many times lie at or before 1970, and after tomorrow.
        pairs_twice: Interactions beyond the first of the same user with the same item.
        rows_twice: Lines that are there already.
        marked: Files that begin with a byte order mark.
    """

    layout: Layout
    parts: dict[str, int]
    n_users: int
    n_items: int
    n_all_items: int
    n_interactions: int
    lengths: NDArray[np.int64]
    popularity: NDArray[np.int64]
    over_time: NDArray[np.int64]
    order: Order | None
    impossible_times: tuple[int, int]
    pairs_twice: Sample
    rows_twice: int
    quoted: Sample
    items: Items
    ids: Ids
    summaries: list[Summaries]
    marked: list[str]

    @property
    def density(self) -> float:
        """Return the share of all (user, item) pairs that are interactions, repeats not counted."""
        return (self.n_interactions - self.pairs_twice.count) / max(1, self.n_users * self.n_items)


def measure(folder: Path, given: Mapping[str, Any] | None = None) -> Health:
    """Read all files of the dataset in `folder` and measure them, with the configuration keys `given`.

    Raises:
        UserError: It is no dataset, a file cannot be read (file and line are named), or `image_dir` is no folder.
    """
    layout = find_layout(folder, given or {})
    image_dir = layout.image_dir
    if image_dir is not None and not image_dir.is_dir():
        raise UserError(f"image_dir {image_dir} is no folder; give the folder that holds the items' images")
    inter = read_interactions(layout)
    items = read_items(layout, inter.items, image_dir)
    return Health(
        layout=layout,
        parts=inter.parts,
        n_users=len(inter.users),
        n_items=len(inter.items),
        n_all_items=len(set(inter.items).union(items.lines)),
        n_interactions=len(inter.user),
        lengths=np.sort(inter.lengths),
        popularity=np.sort(inter.popularity),
        over_time=_over_time(inter),
        order=measure_order(inter),
        impossible_times=inter.impossible_times,
        pairs_twice=_pairs_twice(inter),
        rows_twice=len(inter.row_hashes) - int(np.unique(inter.row_hashes).size),
        quoted=inter.quoted,
        items=items,
        ids=measure_ids(inter, items, layout.history is not None),
        summaries=read_summaries(layout.folder),
        marked=[p.name for p in (*layout.inter, schema.item_file(layout.folder)) if _is_marked(p)],
    )


def _over_time(inter: Interactions) -> NDArray[np.int64]:
    if inter.time is None or not np.isfinite(inter.time).any():
        return np.zeros(0, np.int64)
    return np.histogram(inter.time[np.isfinite(inter.time)], bins=BINS)[0].astype(np.int64)


def _pairs_twice(inter: Interactions) -> Sample:
    pairs = inter.user.astype(np.int64) * max(1, len(inter.items)) + inter.item
    pairs.sort()
    again = pairs[1:][pairs[1:] == pairs[:-1]]
    if not again.size:
        return Sample()
    user, item = divmod(int(again[0]), len(inter.items))
    return Sample(int(again.size), f"user {inter.users[user]!r} and item {inter.items[item]!r}")


def _is_marked(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(3) == b"\xef\xbb\xbf"
