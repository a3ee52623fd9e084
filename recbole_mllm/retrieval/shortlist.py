"""The best items of a retriever's ranking, put in another order: pure functions of scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_STEP = 2.0**-20  # relative distance between placed scores: eight units of float32's last place


@dataclass(frozen=True, slots=True)
class Shortlist:
    """The heads of some rows' rankings.

    Args:
        scores: ``[B, items]`` float32 of the retriever, -inf for items that are not to be ranked.
        head: ``[B, M]`` the best items, best first and without ties; 0, the padding, where a row has fewer.
        count: How many of a row's first items are re-ranked, at most M.
    """

    scores: Tensor
    head: Any
    count: int

    @property
    def asked(self) -> Any:
        """``[B, K]`` the items to be re-ranked, 0 where a row has fewer."""
        return self.head[:, : self.count]

    def ranked(self, logodds: Any, share: float) -> Tensor:
        """Return ``[B, items]`` float32: re-ranked items first, then the retriever's order.

        Args:
            logodds: ``[B, K]`` of the items `asked` about; what stands at padding is not read.
            share: The MLLM's part of a re-ranked item's score, between 0 and 1.
        """
        asked = self.asked
        before = np.take_along_axis(self.scores.numpy(), asked, 1).astype(float)
        mixed = np.where(asked > 0, fused(logodds, before, asked > 0, share), -np.inf)
        order = np.argsort(-mixed, axis=1, kind="stable")  # what is equal keeps the retriever's order
        head = self.head.copy()
        head[:, : self.count] = np.take_along_axis(asked, order, 1)
        return _placed(self.scores, torch.from_numpy(head))


def fused(logodds: Any, before: Any, real: Any, share: float) -> Any:
    """Return ``share * P(Yes) + (1 - share) * r``, r being a row's retriever scores brought to [0, 1]; all ``[B, K]``.

    A share of 1 gives the log-odds themselves, which do not tie where P(Yes) rounds to 0 or 1.
    """
    if share == 1:
        return logodds
    low = np.where(real, before, np.inf).min(1, keepdims=True, initial=np.inf)
    high = np.where(real, before, -np.inf).max(1, keepdims=True, initial=-np.inf)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        wide = np.where(real & (high > low), (before - low) / (high - low), 0.0)
        return share / (1 + np.exp(-logodds)) + (1 - share) * wide


def shortlist(scores: Tensor, users: Any, count: int, depth: int, keys: Callable[[Any, Any], Any]) -> Shortlist:
    """Return the `count` best items of each row to re-rank, ties broken by key, down to place `depth` or `count`.

    Args:
        scores: ``[B, items]`` float32 on the CPU; -inf for what is not to be ranked.
        users: ``[B]`` internal ids.
        count: How many items are re-ranked.
        depth: Down to which place the order matters to a metric.
        keys: ``data.sampling.tie_keys`` of users and items.
    """
    items = scores.shape[1]
    count, reach = min(count, items - 1), min(max(count, depth), items - 1)
    bounds = torch.topk(scores, reach, dim=1).values[:, -1].numpy()
    table, head = scores.numpy(), np.zeros((len(scores), reach), np.int64)
    for row, (values, bound, user) in enumerate(zip(table, bounds, users, strict=True)):
        best = np.flatnonzero((values >= bound) & (values > -np.inf))
        order = np.lexsort((keys(np.full(len(best), user), best), -values[best]))[:reach]
        head[row, : len(order)] = best[order]
    return Shortlist(scores, head, count)


def _placed(scores: Tensor, head: Tensor) -> Tensor:
    """Return `scores` with the items of `head` lifted above all others, each above the next."""
    most = scores.where(scores > -torch.inf, -torch.inf).max(1, keepdim=True).values.double()
    most = most.where(most > -torch.inf, 0.0)
    lifts = torch.arange(head.shape[1], 0, -1) * _STEP
    lifted = most + lifts * most.abs().clamp(min=1e-30)
    lifted = lifted.where(most != 0, lifts)
    out = scores.clone()
    rows, places = (head > 0).nonzero(as_tuple=True)
    out[rows, head[rows, places]] = lifted[rows, places].float()
    return out
