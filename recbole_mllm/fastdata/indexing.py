"""Choosing rows of an Interaction without a detour through Python lists."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch

from recbole_mllm.compat.patching import wrap

_LONG = 32  # torch reads shorter lists in ways of its own


def install(interaction: ModuleType) -> None:
    """Let ``Interaction.__getitem__`` (data/interaction.py:133-141) index by tensor what it indexes by list.

    The list is made again into a tensor for each column: half a second a million rows and column.
    """

    def make(stock: Callable[..., Any]) -> Callable[..., Any]:
        def __getitem__(self: Any, index: Any) -> Any:
            places = None if isinstance(index, str | slice) else as_places(index)
            if places is None:
                return stock(self, index)
            return interaction.Interaction({k: v[places.to(v.device)] for k, v in self.interaction.items()})

        return __getitem__

    wrap(interaction.Interaction, "__getitem__", make)


def as_places(index: Any) -> torch.Tensor | None:
    """Return the tensor that chooses what ``index.tolist()`` chooses; None where that is not plain places or booleans.

    Whole numbers of any width become int64 (torch would read uint8 as booleans), and nothing chooses nothing.
    """
    if isinstance(index, range):
        return torch.arange(index.start, index.stop, index.step)
    if isinstance(index, list) and len(index) > _LONG:
        index = np.asarray(index)
    if isinstance(index, np.ndarray):
        if index.ndim != 1 or (index.dtype.kind not in "iub" and index.size):
            return None
        return torch.from_numpy(np.ascontiguousarray(index if index.dtype.kind == "b" else index.astype(np.int64)))
    if isinstance(index, torch.Tensor) and index.dim() == 1:
        if index.is_floating_point() and index.numel():
            return None
        return index if index.dtype == torch.bool else index.long()
    return None
