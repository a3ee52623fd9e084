"""What counts as an interaction: once for Pop, and the whole training split for metrics of popularity.

RecBole's Pop (model/general_recommender/pop.py:47) counts an item once a batch, however often it occurs there, and
sampled negatives in the batch as if somebody had taken them. So the baseline that a comparison must beat is weaker than
popularity, and depends on the batch size. Its collector (evaluator/collector.py:79-94) counts the rows that a model
trains on: a sequential model's lack every user's first item, and MLLMMSR may train on few of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from recbole_mllm.data.facts import wants_exact_order
from recbole_mllm.evaluation.protocol import training_counts
from recbole_mllm.recbole_patches.hooks import wrap


def count_all(pop: Any) -> None:
    """Let ``Pop`` count each interaction once, in every run."""

    def make_loss(stock: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def calculate_loss(self: Any, interaction: Any) -> Any:
            items, label = interaction[self.ITEM_ID], self.config_label
            taken = interaction[label] > 0 if label in interaction else torch.ones_like(items)
            self.item_cnt.index_add_(0, items, taken.to(items)[:, None])
            self.max_cnt = torch.max(self.item_cnt, dim=0)[0]
            return torch.nn.Parameter(torch.zeros(1)).to(self.device)

        return calculate_loss

    def make_init(stock: Callable[..., None]) -> Callable[..., None]:
        def __init__(self: Any, config: Any, dataset: Any) -> None:
            stock(self, config, dataset)
            self.config_label = config["LABEL_FIELD"]

        return __init__

    wrap(pop.Pop, "__init__", make_init)
    wrap(pop.Pop, "calculate_loss", make_loss)


def count_training(collector: Any) -> None:
    """Let the collector count the whole training split, alike for every model with frozen candidates."""

    def make(stock: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def data_collect(self: Any, train_data: Any) -> None:
            stock(self, train_data)
            train = train_data.dataset
            if getattr(train, "facts", None) is None or not wants_exact_order(train):
                return
            if self.register.need(
                "data.num_items"
            ):  # what only `.item` names is loaded by some models and not by others
                self.data_struct.set("data.num_items", train.facts.n_items + 1)  # and the padding, as RecBole's
            for name, counts in zip(
                ("items", "users"), training_counts(train, train.user_num, train.item_num), strict=True
            ):
                if self.register.need(f"data.count_{name}"):
                    found = np.flatnonzero(counts)
                    pairs = zip(found.tolist(), counts[found].tolist(), strict=True)
                    self.data_struct.set(f"data.count_{name}", Counter(dict(pairs)))

        return data_collect

    wrap(collector.Collector, "data_collect", make)
