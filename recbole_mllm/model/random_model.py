"""RecBole's Random, with one score for each (seed, user, item) whatever else is in the batch.

The stock model draws from torch's global generator (model/general_recommender/random.py:38-45), so a pair's score
depends on the batch size and on what was scored before, and a ranking of all items is the same for a batch's users.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_mllm.data.sampling import hashes64, mix64
from recbole_mllm.recbole_patches.hooks import replace


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
