"""Rows of scores of all items as rankings without ties: pure functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from recbole_mllm.errors import UserError
from recbole_mllm.fastdata.pairs import Pairs
from recbole_mllm.retrieval.shortlist import shortlist

_COMPARED = 2**24  # scores held against targets at a time


class Rules(Protocol):
    """What is ranked and how equal scores are ordered (`allitems.AllItems`)."""

    @property
    def pool(self) -> Any:
        """``[items]`` bool: which items are ranked at all."""

    @property
    def met(self) -> Pairs | None:
        """Pairs to leave out, but for a row's own targets."""

    @property
    def keys(self) -> Callable[[Any, Any], Any]:
        """Of (users, items): of equal scores, the lower key comes first."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """Some rows' rankings of all items.

    Args:
        scores: ``[B, items]`` as the model gave them, -inf for what is not ranked.
        collected: ``[B, items]`` float32 that RecBole's collector ranks: the head best first, above all others; every
            other item by how many of its row's targets it beats. No target is tied with anything.
        head: ``[B, M]`` the best items, best first; 0 where a row has fewer.
        place: ``[P]`` how many items rank above each target.
        among: ``[B]`` how many items are ranked.
    """

    scores: Tensor
    collected: Tensor
    head: Any
    place: Any
    among: Any


def rank_all(scores: Tensor, users: Any, owner: Any, targets: Any, ranking: Rules, depth: int) -> Ranked:
    """Rank each row's items without ties; of equal scores the one with the lower key comes first.

    Args:
        scores: ``[B, items]`` of a model, padding and what RecBole leaves out already at -inf.
        users: ``[B]`` internal ids.
        owner: ``[P]`` the row of each target.
        targets: ``[P]`` internal item ids.
        depth: How many of a row's best items are put in order.
    """
    table = _left_out(scores.float().cpu().clone(), users, owner, targets, ranking)
    short = shortlist(table, users, 0, depth, ranking.keys)
    levels = torch.zeros_like(table)
    place = np.empty(len(targets), np.int64)
    step = max(1, _COMPARED // table.shape[1])
    for low in range(0, len(targets), step):
        part = slice(low, low + step)
        above = _above(table, users, owner[part], targets[part], ranking)
        place[part] = above.sum(1).numpy()
        levels.index_add_(0, torch.from_numpy(owner[part]), above * 2.0)
    levels[owner, targets] += 1.0
    rows, columns = np.nonzero(short.head)
    lifts = torch.from_numpy(short.head.shape[1] - columns).to(levels)
    levels[rows, short.head[rows, columns]] = float(levels.max()) + lifts
    ranked = table > -torch.inf
    return Ranked(table, levels.where(ranked, -torch.inf), short.head, place, ranked.sum(1).numpy())


def _left_out(table: Tensor, users: Any, owner: Any, targets: Any, ranking: Rules) -> Tensor:
    """Set to -inf, in place, what is not ranked; a score of -inf that a model gives is the worst of what is."""
    lost = int(torch.isnan(table).sum())
    if lost:
        raise UserError(f"the model scored {lost} items with NaN; it cannot be ranked")
    kept = table[owner, targets]
    if ranking.met is not None:
        table.clamp_(min=torch.finfo(table.dtype).min)
        rows, items = _met(ranking.met, users)
        table[rows, items] = -torch.inf
    table[:, ~ranking.pool] = -torch.inf
    table[owner, targets] = kept.clamp(min=torch.finfo(table.dtype).min)  # a target may have been met before
    return table


def _met(met: Pairs, users: Any) -> tuple[Any, Any]:
    """Return (row, item) of everything the rows' `users` have met."""
    start, end = (np.searchsorted(met.keys, (users + more) * np.int64(met.width)) for more in (0, 1))
    rows = np.repeat(np.arange(len(users)), end - start)
    place = np.arange(len(rows)) - np.repeat(np.cumsum(end - start) - (end - start), end - start)
    return rows, met.keys[start[rows] + place] % met.width


def _above(table: Tensor, users: Any, owner: Any, targets: Any, ranking: Rules) -> Tensor:
    """Return ``[P, items]``: which items of its row rank above each target."""
    rows = table[owner]
    bound = rows[torch.arange(len(owner)), targets][:, None]
    above = rows > bound
    tied, equal = (rows == bound).nonzero(as_tuple=True)
    place, item = tied.numpy(), equal.numpy()
    user = users[owner[place]]
    sooner = ranking.keys(user, item) < ranking.keys(user, targets[place])
    above[tied, equal] = torch.from_numpy(sooner)
    return above
