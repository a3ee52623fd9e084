"""Pop counts every interaction, and nothing else, where candidates are frozen.

RecBole's (model/general_recommender/pop.py:47) counts an item once a batch, however often it occurs there, and sampled
negatives in the batch as if somebody had taken them. So the baseline that a comparison must beat is weaker than
popularity, and depends on the batch size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from recbole_mllm.compat.patching import wrap


def count_all(pop: Any) -> None:
    """Let ``Pop`` add up; without frozen candidates it stays as RecBole has it."""

    def make_init(stock: Callable[..., None]) -> Callable[..., None]:
        def __init__(self: Any, config: Any, dataset: Any) -> None:
            stock(self, config, dataset)
            self.counts_all = config["frozen_candidates"] is True
            self.label_field = config["LABEL_FIELD"]

        return __init__

    def make_loss(stock: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def calculate_loss(self: Any, interaction: Any) -> Any:
            if not getattr(self, "counts_all", False):
                return stock(self, interaction)
            items = interaction[self.ITEM_ID]
            taken = interaction[self.label_field] > 0 if self.label_field in interaction else torch.ones_like(items)
            self.item_cnt.index_add_(0, items, taken.to(items)[:, None])
            self.max_cnt = torch.max(self.item_cnt, dim=0)[0]
            return torch.nn.Parameter(torch.zeros(1)).to(self.device)

        return calculate_loss

    wrap(pop.Pop, "__init__", make_init)
    wrap(pop.Pop, "calculate_loss", make_loss)
