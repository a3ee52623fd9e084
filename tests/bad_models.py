"""RecBole models that fail in the ways models fail, and a worker that knows them: ``python bad_models.py JOB``."""

import os
import signal
import sys
from typing import Any

import torch
from recbole.model.abstract_recommender import GeneralRecommender
from recbole.utils import InputType

from recbole_mllm import registration

SECRET = "/home/somebody/private/table.bin"


class Sound(GeneralRecommender):
    """A matrix factorisation that works; the others are this with one fault."""

    input_type = InputType.PAIRWISE

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.users, self.items = torch.nn.Embedding(self.n_users, 8), torch.nn.Embedding(self.n_items, 8)

    def calculate_loss(self, interaction: Any) -> torch.Tensor:
        return (
            -(self.score(interaction, self.ITEM_ID) - self.score(interaction, self.NEG_ITEM_ID)).sigmoid().log().mean()
        )

    def score(self, interaction: Any, field: str) -> torch.Tensor:
        return (self.users(interaction[self.USER_ID]) * self.items(interaction[field])).sum(-1)

    def predict(self, interaction: Any) -> torch.Tensor:
        return self.score(interaction, self.ITEM_ID)


class Crashing(Sound):
    def calculate_loss(self, interaction: Any) -> torch.Tensor:
        raise RuntimeError(f"cannot map {SECRET}\nand more")


class NoNumber(Sound):
    def calculate_loss(self, interaction: Any) -> torch.Tensor:
        return super().calculate_loss(interaction) * float("nan")


class NoScore(Sound):
    def predict(self, interaction: Any) -> torch.Tensor:
        return super().predict(interaction).where(interaction[self.ITEM_ID] % 3 != 0, float("nan"))


class Starved(Sound):
    def calculate_loss(self, interaction: Any) -> torch.Tensor:
        raise MemoryError


class Killed(Sound):
    def calculate_loss(self, interaction: Any) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


BAD = ("Crashing", "NoNumber", "NoScore", "Starved", "Killed")
for name in ("Sound", *BAD):
    registration.MODELS[name] = "bad_models"

if __name__ == "__main__":
    from recbole_mllm.benchmark.worker import main

    sys.exit(main())
