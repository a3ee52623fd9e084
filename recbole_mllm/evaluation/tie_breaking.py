"""Ties are broken by a permutation that knows the pair and the seed but not the label: a constant scorer is at chance.

RecBole lays positives first (general_dataloader.py:160) and topk keeps an order of its own among equal scores, so ties
would otherwise be settled by where the answer happens to stand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch

from recbole_mllm.common.errors import UserError
from recbole_mllm.data.schema import ITEM, TIE, USER
from recbole_mllm.recbole_patches.hooks import replace

Keys = Callable[[Any, Any], Any]
"""Of internal (users, items) ``[B]``: int64 ``[B]`` that order equal scores (`data.sampling.tie_keys`)."""

_RECORDED: ContextVar[list[dict[str, Any]] | None] = ContextVar("recorded", default=None)


def evaluate(trainer: Any, loader: Any, **options: Any) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return RecBole's result of a `loader`, and what was scored and ranked for it, batch by batch (`metrics.joined`).

    No pairs are returned where candidates are not frozen.

    Args:
        trainer: RecBole's.
        loader: An evaluation loader.
        options: Of ``Trainer.evaluate``.
    """
    with recording() as batches:
        return dict(trainer.evaluate(loader, **options) or {}), batches


@contextmanager
def recording() -> Iterator[list[dict[str, Any]]]:
    """Yield a list that receives each batch that is scored and ranked within (`metrics.joined`)."""
    batches: list[dict[str, Any]] = []
    token = _RECORDED.set(batches)
    try:
        yield batches
    finally:
        _RECORDED.reset(token)


def record_scores(columns: dict[str, Any]) -> None:
    """Add a batch's columns to what the innermost `recording` yields, if there is one."""
    if (batches := _RECORDED.get()) is not None:
        batches.append(columns)


def ranks(owner: Any, scores: Any, keys: Any) -> Any:
    """Return the place of each pair among its owner's pairs, 0 for the worst; equal scores are ordered by key.

    Args:
        owner: ``[B]`` whose pair it is, non-decreasing.
        scores: ``[B]`` float.
        keys: ``[B]`` int.
    """
    order = np.lexsort((keys, scores, owner))
    starts = np.searchsorted(owner, owner[order], side="left")
    out = np.empty(len(owner), dtype=np.int64)
    out[order] = np.arange(len(owner)) - starts
    return out


def install(trainer_class: Any) -> None:
    """Make RecBole's trainer rank frozen candidates without ties, and record raw scores.

    Wraps ``Trainer._neg_sample_batch_eval`` (trainer.py:505-524), between a model's scores and RecBole's collector.
    """

    @replace(trainer_class)
    def _neg_sample_batch_eval(stock: Any, self: Any, batched: Any) -> Any:
        interaction, scores, positive_u, positive_i = stock(self, batched)
        pairs, owner = batched[0], batched[1]
        if TIE not in pairs or scores.dim() != 2:
            return interaction, scores, positive_u, positive_i
        config = self.config
        fields = {USER: config["USER_ID_FIELD"], ITEM: config["ITEM_ID_FIELD"], "label": config["LABEL_FIELD"]}
        items = pairs[fields[ITEM]]
        raw = scores[owner, items].float().cpu()
        if lost := int(torch.isnan(raw).sum()):
            raise UserError(f"{config['model']} scored {lost} pairs with NaN; it cannot be ranked")
        place = ranks(owner.numpy(), raw.numpy(), pairs[TIE].cpu().numpy())
        scores[owner, items] = torch.from_numpy(place).to(scores)
        columns = {name: pairs[field].cpu().numpy() for name, field in fields.items()}
        record_scores(columns | {"score": raw.numpy(), "place": place})
        return interaction, scores, positive_u, positive_i
