"""RecBole's leave-one-out split, as arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

from recbole_mllm.compat.patching import wrap

_DENSE = 1000  # keys far beyond the number of rows are no ids; RecBole's dictionary takes less then


class Groups:
    """The places of equal keys, keys in the order in which they first appear; iterates over lists as RecBole's do.

    Args:
        keys: ``[rows]`` whole numbers from 0.
    """

    def __init__(self, keys: Any) -> None:
        first = np.zeros(int(keys.max()) + 1 if len(keys) else 0, np.int64)
        first[keys[::-1]] = np.arange(len(keys))[::-1]  # the last to be written is the first to appear
        self.order = np.argsort(first[keys], kind="stable")
        grouped = keys[self.order]
        change = np.flatnonzero(grouped[1:] != grouped[:-1]) + 1 if len(keys) else np.array([], int)
        self.bounds = np.r_[0, change, len(keys)] if len(keys) else np.array([0])

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __iter__(self) -> Iterator[list[int]]:
        places = self.order.tolist()
        bounds = self.bounds.tolist()
        return (places[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True))

    def leave_out(self, count: int) -> list[Any]:
        """Return the places of each part: the last `count` of a group go one to each later part, at least one stays.

        A group of two with `count` 2 has nothing in the middle part, as in RecBole.
        """
        sizes = np.diff(self.bounds)
        from_end = np.repeat(self.bounds[1:], sizes) - 1 - np.arange(len(self.order))
        part = np.where(from_end < np.repeat(np.minimum(count, sizes - 1), sizes), count - from_end, 0)
        return [self.order[part == number] for number in range(count + 1)]


def install(module: ModuleType) -> None:
    """Replace the loops of ``Dataset._grouped_index`` and the split by it (data/dataset/dataset.py:1591, :1666)."""

    def make_grouped(stock: Callable[..., Any]) -> Callable[..., Any]:
        def _grouped_index(self: Any, group_by_list: Any) -> Any:
            keys = np.asarray(group_by_list)
            plain = keys.ndim == 1 and keys.dtype.kind in "iu" and (not len(keys) or keys.min() >= 0)
            if plain and (not len(keys) or keys.max() <= _DENSE * len(keys)):
                return Groups(keys)
            return stock(self, group_by_list)

        return _grouped_index

    def make_split(stock: Callable[..., Any]) -> Callable[..., Any]:
        def _split_index_by_leave_one_out(self: Any, grouped_index: Any, leave_one_num: int) -> Any:
            if isinstance(grouped_index, Groups):
                return grouped_index.leave_out(leave_one_num)
            return stock(self, grouped_index, leave_one_num)

        return _split_index_by_leave_one_out

    wrap(module.Dataset, "_grouped_index", make_grouped)
    wrap(module.Dataset, "_split_index_by_leave_one_out", make_split)
