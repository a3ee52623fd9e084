"""A trained baseline: one of RecBole's models that ranks all items, filled from its checkpoint.

RecBole's checkpoints hold users and items by their number in the data, and no ids. So a run leaves beside its own a
file with a digest of both, by which a checkpoint of other ids is known.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch
from recbole.data import create_dataset
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.utils import get_model, init_seed

from recbole_mllm.common.errors import UserError, as_user_error
from recbole_mllm.common.files import write_text
from recbole_mllm.common.model_names import TINY

NOT_EVALUATED = {"frozen_candidates": None, "limit_users": None, "save_dataset": False, "save_dataloaders": False}
"""Keys by which nothing is drawn, left out or saved where the training part of a split alone is wanted."""


class Baseline(NamedTuple):
    """A model ready to score, and what it was made with: the dataset and its training part."""

    model: Any
    dataset: Any
    train: Any


def load_baseline(path: Path, checkpoint: Mapping[str, Any], data_path: str, device: torch.device) -> Baseline:
    """Return the model of a checkpoint, its dataset read again and split as it was then.

    Args:
        path: The checkpoint's file, for messages.
        checkpoint: What `read_checkpoint` returned for it; its config is changed to what is asked for here.
        data_path: The dataset's folder.
        device: Where the model goes.

    Raises:
        UserError: The dataset has other ids than at training, or the model cannot rank all items.
    """
    dataset, train = training_part(config := checkpoint["config"], data_path, device)
    name, ids = config["model"], ids_file(path)
    other = UserError(
        f"checkpoint {path} does not fit dataset {config['dataset']} in {data_path}, which has other users or items "
        f"than at training, or in another order; give that state's folder as data_path, or train {name} again"
    )
    if not ids.is_file():
        _warn_of_newer_data(path, config)
    elif ids.read_text(encoding="utf-8").strip() != _digest(dataset):
        raise other
    with as_user_error(f"load checkpoint {path}", name, config["dataset"]):
        model = get_model(name)(config, train)
        check_ranks_all(model, name)
        try:
            fill(model, checkpoint)
        except RuntimeError as error:  # names and shapes of all weights, a line each
            raise other from error
    return Baseline(model.to(device).eval(), dataset, train)


def training_part(config: Any, data_path: str, device: torch.device) -> tuple[Any, Any]:
    """Return the dataset of a checkpoint's `config`, which is changed to it, and its training part, as at training."""
    exact = config["frozen_candidates"] is True
    if config["item_features"]:
        config["mllm"] = config["mllm"] or TINY  # the default when a checkpoint that names none was made
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


def ids_file(checkpoint: Path) -> Path:
    """Return the file beside a baseline's checkpoint that says of which users and items it is."""
    return checkpoint.with_suffix(".ids")


def write_ids(checkpoint: Path, dataset: Any) -> None:
    """Write of which users and items of `dataset` the `checkpoint` is, by a digest of their ids in order."""
    write_text(ids_file(checkpoint), f"{_digest(dataset)}\n")


def _digest(dataset: Any) -> str:
    ids = [list(map(str, dataset.field2id_token[field])) for field in (dataset.uid_field, dataset.iid_field)]
    return hashlib.sha256(repr(ids).encode()).hexdigest()[:16]


def _warn_of_newer_data(checkpoint: Path, config: Any) -> None:
    """Say that the dataset was written after a checkpoint beside which no ids are stored."""
    trained = checkpoint.stat().st_mtime
    for path in sorted(Path(config["data_path"]).glob(f"{escape(config['dataset'])}*.inter")):
        if path.stat().st_mtime > trained:
            logging.getLogger().warning(
                f"{path} was written after {checkpoint.name}, which knows users and items by their number in the data: "
                f"unless the data is the same, train {config['model']} again"
            )
            return
