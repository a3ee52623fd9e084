"""Ties are broken by a permutation that knows the pair and the seed but not the label: a constant scorer is at chance.

RecBole lays positives first (general_dataloader.py:160) and topk keeps an order of its own among equal scores, so ties
would otherwise be settled by where the answer happens to stand.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_mllm.data.schema import ITEM, TIE, USER
from recbole_mllm.errors import UserError


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
    """Make RecBole's trainer rank frozen candidates without ties, and keep raw scores where `score_log` is a list.

    Wraps ``Trainer._neg_sample_batch_eval`` (trainer.py:505-524), between a model's scores and RecBole's collector.
    """
    stock = trainer_class._neg_sample_batch_eval
    if hasattr(stock, "breaks_ties"):
        return

    def batch_eval(self: Any, batched: Any) -> Any:
        interaction, scores, positive_u, positive_i = stock(self, batched)
        pairs, owner = batched[0], batched[1]
        if TIE not in pairs or scores.dim() != 2:
            return interaction, scores, positive_u, positive_i
        items = pairs[self.config["ITEM_ID_FIELD"]]
        raw = scores[owner, items].float().cpu()
        if bool(torch.isnan(raw).any()):
            raise UserError(
                f"{self.config['model']} scored {int(torch.isnan(raw).sum())} pairs with NaN; it cannot be ranked"
            )
        place = ranks(owner.numpy(), raw.numpy(), pairs[TIE].cpu().numpy())
        scores[owner, items] = torch.from_numpy(place).to(scores)
        _log(self, pairs, raw, place)
        return interaction, scores, positive_u, positive_i

    batch_eval.breaks_ties = True  # type: ignore[attr-defined]
    trainer_class._neg_sample_batch_eval = batch_eval


def _log(trainer: Any, pairs: Any, raw: Tensor, place: Any) -> None:
    log = getattr(trainer, "score_log", None)
    if log is None:
        return
    config = trainer.config
    columns = {USER: config["USER_ID_FIELD"], ITEM: config["ITEM_ID_FIELD"], "label": config["LABEL_FIELD"]}
    log.append(
        {name: pairs[field].cpu().numpy() for name, field in columns.items()} | {"score": raw.numpy(), "place": place}
    )
