"""What counts as an interaction: once for Pop, and the whole training split for metrics of popularity.

RecBole's Pop (model/general_recommender/pop.py:47) counts an item once a batch, however often it occurs there, and
sampled negatives in the batch as if somebody had taken them. So the baseline that a comparison must beat is weaker than
popularity, and depends on the batch size. Its collector (evaluator/collector.py:79-94) counts the rows that a model
trains on: a sequential model's lack every user's first item, and MLLMMSR may train on few of them.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch

from recbole_mllm.data.facts import wants_exact_order
from recbole_mllm.evaluation.protocol import training_counts
from recbole_mllm.recbole_patches.hooks import replace


def count_all(module: Any) -> None:
    """Let ``Pop`` count each interaction once, in every run."""

    @replace(module.Pop)
    def __init__(stock: Any, self: Any, config: Any, dataset: Any) -> None:
        stock(self, config, dataset)
        self.config_label = config["LABEL_FIELD"]

    @replace(module.Pop)
    def calculate_loss(stock: Any, self: Any, interaction: Any) -> Any:
        items, label = interaction[self.ITEM_ID], self.config_label
        taken = interaction[label] > 0 if label in interaction else torch.ones_like(items)
        self.item_cnt.index_add_(0, items, taken.to(items)[:, None])
        self.max_cnt = torch.max(self.item_cnt, dim=0)[0]
        return torch.nn.Parameter(torch.zeros(1)).to(self.device)


def count_training(module: Any) -> None:
    """Let the collector count the whole training split, alike for every model with frozen candidates."""

    @replace(module.Collector)
    def data_collect(stock: Any, self: Any, train_data: Any) -> None:
        stock(self, train_data)
        train = train_data.dataset
        if train.facts is None or not wants_exact_order(train):
            return
        # not those that only `.item` names, which some models load; and the padding, as RecBole's
        found: dict[str, Any] = {"num_items": train.facts.n_items + 1}
        items, users = training_counts(train, train.user_num, train.item_num)
        for name, counts in (("count_items", items), ("count_users", users)):
            found[name] = Counter({n: int(counts[n]) for n in np.flatnonzero(counts).tolist()})
        for name in found:
            if self.register.need(f"data.{name}"):
                self.data_struct.set(f"data.{name}", found[name])
