"""A trained baseline: one of RecBole's models that ranks all items, filled from its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from recbole.data import create_dataset
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.utils import get_model, init_seed

from recbole_mllm.common.errors import UserError, as_user_error

NOT_EVALUATED = {"frozen_candidates": None, "limit_users": None, "save_dataset": False, "save_dataloaders": False}
"""Keys by which nothing is drawn, left out or saved where the training part of a split alone is wanted."""


class Baseline(NamedTuple):
    """A model ready to score, and what it was made with: the dataset and its training part."""

    model: Any
    dataset: Any
    train: Any


def load_baseline(path: Path, checkpoint: Mapping[str, Any], data_path: str, device: torch.device) -> Baseline:
    """Return the model of a checkpoint, its dataset read anew and split as it was then.

    Args:
        path: The checkpoint's file, for messages.
        checkpoint: What `read_checkpoint` returned for it; its config is changed to what is asked for here.
        data_path: The dataset's folder.
        device: Where the model goes.

    Raises:
        UserError: The dataset is another one, or the model cannot rank all items.
    """
    dataset, train = training_part(config := checkpoint["config"], data_path, device)
    name = config["model"]
    with as_user_error(f"load checkpoint {path}", name, config["dataset"]):
        model = get_model(name)(config, train)
        check_ranks_all(model, name)
        try:
            fill(model, checkpoint)
        except RuntimeError as error:  # names and shapes of all weights, a line each
            raise UserError(
                f"checkpoint {path} does not fit dataset {config['dataset']} in {data_path}, which has other users or "
                f"items than at training; give that state's folder as data_path, or train {name} again"
            ) from error
    return Baseline(model.to(device).eval(), dataset, train)


def training_part(config: Any, data_path: str, device: torch.device) -> tuple[Any, Any]:
    """Return the dataset of a checkpoint's `config`, which is changed to it, and its training part, as at training."""
    exact = config["frozen_candidates"] is True
    for key, value in {**NOT_EVALUATED, "data_path": data_path, "device": device}.items():
        config[key] = value
    init_seed(config["seed"], config["reproducibility"])
    with as_user_error("read and split the dataset", config["model"], config["dataset"]):
        dataset = create_dataset(config)
        dataset.exact_order |= exact
        return dataset, dataset.build()[0]


def check_ranks_all(model: Any, name: str) -> None:
    """Refuse a model that can only score given pairs.

    Raises:
        UserError: It is one.
    """
    if type(model).full_sort_predict is AbstractRecommender.full_sort_predict:
        raise UserError(f"{name} cannot rank all items at once; take a general or sequential model")


def fill(model: Any, checkpoint: Mapping[str, Any]) -> None:
    """Give `model` the state of a checkpoint.

    Raises:
        RuntimeError: It is of other shapes.
    """
    model.load_state_dict(checkpoint["state_dict"])
    model.load_other_parameter(checkpoint.get("other_parameter"))
