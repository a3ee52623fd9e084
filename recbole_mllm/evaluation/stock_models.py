"""RecBole's Pop and Random, whose scores depend on the batch, and what counts as an interaction.

Pop (model/general_recommender/pop.py:47) counts an item once a batch, however often it occurs there, and sampled
negatives in the batch as if somebody had taken them. So the baseline that a comparison must beat is weaker than
popularity. The collector (evaluator/collector.py:79-94) counts the rows that a model trains on: a sequential model's
lack every user's first item, and MLLMMSR may train on few of them.

Random draws from torch's global generator (model/general_recommender/random.py:38-45), so a pair's score depends on the
batch size and on what was scored before, and a ranking of all items is the same for a batch's users.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_mllm.data.facts import wants_exact_order
from recbole_mllm.data.sampling import hashes64, mix64
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


def score_by_pair(model: Any) -> None:
    """Give the class `Random` of RecBole scores drawn evenly from [0, 1) by the run's seed and raw user and item ids.

    It is changed in place: its own methods name it through their module (``super(Random, self)``), so that a subclass
    under its name would call itself.
    """

    @replace(model)
    def __init__(stock: Any, self: Any, config: Any, dataset: Any) -> None:
        stock(self, config, dataset)
        tokens = dataset.field2id_token
        users, items = (np.asarray(tokens[field]).astype(str) for field in (self.USER_ID, self.ITEM_ID))
        self.of_user = hashes64(users, "random-user", config["seed"])
        self.of_item = hashes64(items, "random-item", config["seed"])

    @replace(model)
    def predict(stock: Any, self: Any, interaction: Any) -> Tensor:
        users, items = (interaction[field].cpu().numpy() for field in (self.USER_ID, self.ITEM_ID))
        return _scores(self.of_user[users], self.of_item[items]).to(self.device)

    @replace(model)
    def full_sort_predict(stock: Any, self: Any, interaction: Any) -> Tensor:
        users = interaction[self.USER_ID].cpu().numpy()
        return _scores(self.of_user[users][:, None], self.of_item[None]).reshape(-1).to(self.device)


def _scores(users: Any, items: Any) -> Tensor:
    bits = mix64(mix64(users) ^ items) >> np.uint64(40)  # 24 bits are what float32 holds exactly
    return torch.from_numpy(bits.astype(np.float32) * np.float32(2.0**-24))
