"""Vectors brought to one scale and a size that a baseline can read: pure functions of arrays."""

from __future__ import annotations

from typing import Any

import numpy as np


def prepared(vectors: Any, known: Any, size: int | None) -> Any:
    """Return ``[N, D']`` float64, of the `known` rows centred, cut to `size` directions and of unit variance together.

    Hidden states of language models share a large mean, and a few directions dwarf the rest: as they are, all items
    look alike to a linear layer. The directions are the first principal ones; all other rows are zeros, which is the
    mean.

    Args:
        vectors: ``[N, D]``.
        known: ``[N]`` which rows say something.
        size: How many directions are kept; None keeps all, as they are.
    """
    out = np.asarray(vectors, float)
    centred = np.where(known[:, None], out - out[known].mean(0) if known.any() else out, 0.0)
    if size is not None and centred.shape[1] > size:
        centred = centred @ principal(centred, size)
    spread = np.sqrt((centred[known] ** 2).mean()) if known.any() else 0.0
    return centred / spread if spread > 0 else centred


def principal(centred: Any, size: int) -> Any:
    """Return ``[D, size]`` orthonormal directions of most variance; each one's largest entry is positive."""
    _, directions = np.linalg.eigh(centred.T @ centred)
    kept = directions[:, ::-1][:, :size]
    largest = np.abs(kept).argmax(0)
    return kept * np.sign(kept[largest, np.arange(kept.shape[1])])
