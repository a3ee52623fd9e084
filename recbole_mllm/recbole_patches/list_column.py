"""A sequential dataset's ``*_list`` column without its padding: 12 bytes a row instead of 400.

RecBole lays the last ``MAX_ITEM_LIST_LENGTH`` items before each row out in a padded tensor of its own
(sequential_dataset.py:122-149). All rows are windows on one ordered column, so where each window starts and how long
it is says the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

PLAIN_ELEMENTS = 1 << 22
"""Columns of no more elements (32 MB of int64) are plain tensors: every batch, and every column of a small dataset."""

_CHUNK = 1 << 20  # elements padded at a time


class ListColumn(Tensor):
    """Rows ``flat[start:start + length]`` padded with zeros to `width`: a tensor ``[rows, width, *flat.shape[1:]]``.

    Choosing rows gives another such column, or a plain tensor where few are chosen; every other operation sees a
    padded copy, and what would write in place raises a RuntimeError.
    """

    flat: Tensor
    start: Tensor
    length: Tensor
    width: int

    @staticmethod
    def __new__(cls, flat: Tensor, start: Tensor, length: Tensor, width: int) -> Self:
        """Describe windows of `length` ``[rows]`` int32 from `start` ``[rows]`` int64 on `flat` ``[V, …]``."""
        shape = (len(start), width, *flat.shape[1:])
        # without storage, so that C++ code that reads past Python fails loudly instead of finding zeros
        column: Self = Tensor._make_wrapper_subclass(cls, shape, dtype=flat.dtype, device=flat.device)
        column.flat, column.start, column.length, column.width = flat, start, length, width
        return column

    @classmethod
    def of(cls, flat: Tensor, start: Tensor, length: Tensor, width: int) -> Tensor:
        """Return the column, as a plain tensor where it is small."""
        column = cls(flat, start, length, width)
        return column.plain() if column.numel() <= PLAIN_ELEMENTS else column

    def plain(self) -> Tensor:
        """Return the padded tensor."""
        out = torch.zeros(tuple(self.shape), dtype=self.flat.dtype, device=self.flat.device)
        step = max(1, _CHUNK // max(1, self.width))
        for low in range(0, len(self.start), step):
            start, length = self.start[low : low + step, None], self.length[low : low + step]
            reach = torch.arange(int(length.max()), device=start.device)
            rows, places = (reach < length[:, None]).nonzero(as_tuple=True)
            out[low + rows, places] = self.flat[start[rows, 0] + places]
        return out

    def choose(self, rows: Any) -> Tensor:
        """Return the rows that `rows` indexes: a slice, a list, or a 1-d tensor of places or of booleans."""
        return self.of(self.flat, self.start[rows], self.length[rows], self.width)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer what can be answered without padding; hand a padded copy to everything else."""
        given = kwargs or {}
        if func in _ABOUT_SHAPE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **given)
        if func in _LAZY and isinstance(args[0], cls) and not given:
            answer = _LAZY[func](*args)
            if answer is not NotImplemented:
                return answer
        if _writes(func) and isinstance(args[0], cls):
            raise RuntimeError(f"{func.__name__} would write into a list column; write into its clone()")
        return func(*_plain(args), **_plain(given))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pad for what reaches torch's kernels past `__torch_function__`."""
        return func(*_plain(args), **_plain(kwargs or {}))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the windows, never the padding."""
        return type(self), (self.flat, self.start, self.length, self.width)


def _plain(value: Any) -> Any:
    """Return `value` with every ListColumn in it padded."""
    if isinstance(value, ListColumn):
        return value.plain()
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return value


def _getitem(column: ListColumn, index: Any) -> Any:
    """Answer ``column[index]`` by looking at no more rows than it asks for; NotImplemented where that is not plain."""
    if isinstance(index, slice) or (isinstance(index, Tensor | np.ndarray) and index.ndim == 1):
        return column.choose(index)
    if isinstance(index, list) and all(isinstance(place, int | np.integer) for place in index[:1]):
        return column.choose(index)
    if isinstance(index, int | np.integer) and not isinstance(index, bool):
        # as FEARec asks for one row at a time (fearec.py:218)
        return column.choose([range(len(column))[index]]).clone()[0]
    return NotImplemented


def _writes(func: Any) -> bool:
    """Return whether `func` changes its first argument: ``add_``, ``__setitem__``, ``__iadd__``."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__index__", "__int__", "__invert__"))
    return bool(name.endswith("_"))


def _unsqueeze(column: ListColumn, dim: int) -> Any:
    """Interaction asks for this when it only wants to count rows (data/interaction.py:131)."""
    if dim != -1:
        return NotImplemented
    return ListColumn(column.flat.unsqueeze(-1), column.start, column.length, column.width)


_PROPERTIES = ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")
_METHODS = ("size", "dim", "numel", "nelement", "element_size", "is_floating_point", "__len__", "__hash__")
_ABOUT_SHAPE = {getattr(Tensor, name).__get__ for name in _PROPERTIES} | {getattr(Tensor, name) for name in _METHODS}
_LAZY: dict[Any, Callable[..., Any]] = {Tensor.__getitem__: _getitem, Tensor.unsqueeze: _unsqueeze}
