"""A trained RecBole model that scores all items for the rows of our own dataset, and where it comes from.

It is trained here with its own defaults on this run's data and split, or loaded from a checkpoint.
"""

from __future__ import annotations

import hashlib
import logging
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.data import create_dataset, data_preparation
from recbole.data.interaction import Interaction
from recbole.utils import ModelType, get_model, get_trainer, init_seed
from recbole.utils.argument_list import dataset_arguments
from torch import Tensor

from recbole_mllm.common.checkpoint import read_checkpoint
from recbole_mllm.common.config import check_keys, recbole_config
from recbole_mllm.common.errors import UserError, first_line
from recbole_mllm.common.files import make_once
from recbole_mllm.common.fitting import Fit
from recbole_mllm.common.resources import MLLM
from recbole_mllm.common.seeding import undisturbed
from recbole_mllm.common.settings import RankingSettings
from recbole_mllm.data.schema import HISTORY_NUMBER, POSITION
from recbole_mllm.retrieval.baseline import NOT_EVALUATED, check_ranks_all, fill, load_baseline

# What a retriever shares with the run it serves; how it is trained is its own affair
_SHARED = (
    *dataset_arguments, "seed", "reproducibility", "gpu_id", "use_gpu", "state", "checkpoint_dir", "show_progress",
    "metrics", "topk", "valid_metric", "metric_decimal_place", "train_on_histories", "candidate_seed",
)  # fmt: skip
# What decides which rows are training rows; a checkpoint must agree, or it may have learnt this run's answers
_SPLIT = (
    "benchmark_filename", "user_inter_num_interval", "item_inter_num_interval", "val_interval", "rm_dup_inter",
    "filter_inter_by_user_or_item",
)  # fmt: skip
_NO_TRACE = {
    "data_path", "checkpoint_dir", "device", "gpu_id", "show_progress", "state", "per_model", "metrics", "topk",
    "metric_decimal_place",
}  # fmt: skip


class Retriever:
    """Translates rows and scores between two datasets' internal ids.

    No ``nn.Module``, so that its parameters are never among those the MLLM trains or saves.

    Args:
        model: The trained model.
        dataset: What it was made with.
        identity: Names the model, its settings and what it was trained on.
        ours: The dataset whose rows are to be ranked.

    Raises:
        UserError: The model does not know a user or an item of `ours`.
    """

    def __init__(self, model: Any, dataset: Any, identity: str, ours: Any) -> None:
        name = identity.partition("#")[0]
        self.model, self.identity, self.ours = model.eval(), identity, ours
        self.train_s = 0.0  # what its training took, whoever trained it
        self.is_sequential = dataset.config["MODEL_TYPE"] == ModelType.SEQUENTIAL
        self.fields = dataset.uid_field, dataset.iid_field
        self._users = _places(ours, dataset, ours.uid_field, dataset.uid_field, f"retriever {name} knows no user")
        self._items = _places(ours, dataset, ours.iid_field, dataset.iid_field, f"retriever {name} knows no item")
        self._list = ours.iid_field + ours.config["LIST_SUFFIX"]
        self._depth = int(dataset.config["MAX_ITEM_LIST_LENGTH"])
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))

    @torch.no_grad()
    def scores(self, rows: Interaction) -> Tensor:
        """Return ``[B, items]`` float32 on the CPU, -inf for what RecBole's full ranking of this model leaves out.

        That is the padding and, for a model that is not sequential, what the user has met before the row's target
        (general_dataloader.py:232, trainer.py:483-486); a sequential model may be asked about met items again.
        """
        found = self.model.full_sort_predict(self._translated(rows).to(self.device))
        out: Tensor = found.reshape(len(rows), -1).float().cpu()[:, self._items]
        if bool(torch.isnan(out).any()):
            raise UserError(f"the retriever {self.identity} scored items with NaN; it cannot be ranked with")
        out[:, 0] = -torch.inf
        if not self.is_sequential:
            ours = self.ours
            ids, name = ours.field2token_id[ours.iid_field], ours.history_names.name
            columns = zip(*(rows[f].tolist() for f in (HISTORY_NUMBER, POSITION, ours.iid_field)), strict=True)
            for row, (history, place, target) in enumerate(columns):  # the target may be met again
                out[row, list({ids[item] for item in ours.histories[name(history)][:place]} - {target})] = -torch.inf
        return out

    def _translated(self, rows: Interaction) -> Interaction:
        """Return the rows in the retriever's ids, with histories as long as it was trained on."""
        ours = self.ours
        user, item = self.fields
        made = {user: self._users[rows[ours.uid_field].cpu()], item: self._items[rows[ours.iid_field].cpu()]}
        if self.is_sequential:
            listed, lengths = self._items[rows[self._list].cpu()], rows[ours.item_list_length_field].cpu()
            used = lengths.clamp(max=self._depth)
            place = (lengths - used)[:, None] + torch.arange(self._depth)
            inside = torch.arange(self._depth) < used[:, None]
            made[self._list] = listed.gather(1, place.clamp(max=listed.shape[1] - 1)).where(inside, 0)
            made[ours.item_list_length_field] = used
        return Interaction(made)


def _places(ours: Any, theirs: Any, field: str, their_field: str, complaint: str) -> Tensor:
    """Return their internal id of each of our internal ids; 0 is the padding of both."""
    known = theirs.field2token_id[their_field]
    raw = np.asarray(ours.field2id_token[field]).astype(str)
    unknown = [name for name in raw[1:] if name not in known]
    if unknown:
        raise UserError(
            f"{complaint} {unknown[0]!r} ({len(unknown)} of {len(raw) - 1} unknown); it must be trained on this "
            "dataset with the same filters"
        )
    return torch.tensor([0, *(int(known[name]) for name in raw[1:])])


def obtain(config: Any, settings: RankingSettings, ours: Any) -> Retriever:
    """Return the retriever that `settings` ask for; random numbers continue as if nothing had been trained.

    Args:
        config: RecBole's, of the run whose rows are to be ranked.
        settings: Name the model or its checkpoint.
        ours: The run's training part, with `histories`.

    Raises:
        UserError: There is no such model or checkpoint, or it belongs to other data or another split.
    """
    with undisturbed():
        if settings.retriever_checkpoint:
            return _loaded(Path(settings.retriever_checkpoint), config, ours)
        return _trained(str(settings.retriever), config, ours)


def _config(name: str, config: Any) -> Any:
    own = (config["per_model"] or {}).get(name, {})
    check_keys(own, f"per_model, {name}")
    shared = {key: config[key] for key in _SHARED if key in config}
    modes = {"valid": "full", "test": "full"}
    keys = {**shared, **NOT_EVALUATED, "eval_args": {**config["eval_args"], "mode": modes}, **own}
    keys["data_path"] = str(Path(config["data_path"]).parent)
    try:
        return recbole_config(name, config["dataset"], [], keys)
    except ValueError as error:
        raise UserError(f"retriever {name!r} cannot be had: {first_line(error)}") from error


def _trained(name: str, config: Any, ours: Any) -> Retriever:
    """Train `name`, or take it from where a run that would train the same has left it."""
    log = logging.getLogger()
    theirs = _config(name, config)
    dataset = create_dataset(theirs)
    dataset.exact_order = True  # as this run's is split
    train, valid, _ = data_preparation(theirs, dataset)
    identity = f"{name}#{_digest(theirs, train._dataset)}"
    folder = Path(config["retriever_dir"] or theirs["checkpoint_dir"])
    path = folder / f"retriever-{identity.replace('#', '-')}.pth"
    init_seed(theirs["seed"], theirs["reproducibility"])
    started = time.perf_counter()
    model = get_model(name)(theirs, train._dataset).to(theirs["device"])
    made = time.perf_counter() - started if model.type == ModelType.TRADITIONAL else 0.0  # then it is the training
    check_ranks_all(model, f"retriever {name}")
    retriever = Retriever(model, train._dataset, identity, ours)  # refused before it is trained

    def fit(scratch: Path) -> None:
        log.info(f"training the retriever {identity}")
        trainer = get_trainer(theirs["MODEL_TYPE"], name)(theirs, model)
        trainer.saved_model_file = str(scratch)
        training = Fit(trainer)
        training.run(train, valid, saved=True, show_progress=theirs["show_progress"])
        torch.save({**read_checkpoint(scratch, theirs["device"]), "train_s": made + training.seconds}, scratch)

    if not make_once(path, fit):
        log.info(f"retriever {identity} was trained before: {path}")
    try:
        checkpoint = read_checkpoint(path, theirs["device"])
        fill(model, checkpoint)
    except (UserError, RuntimeError) as error:
        raise UserError(f"{path} is no whole checkpoint of {name}; remove it, and it is trained again") from error
    retriever.train_s = float(checkpoint.get("train_s", 0.0))
    model.eval()
    return retriever


def _digest(config: Any, train: Any) -> str:
    """Return 12 hex digits of the settings, the training rows and the versions of what trains."""
    decisive = {key: value for key, value in config.final_config_dict.items() if key not in _NO_TRACE}
    decisive |= {name: version(name) for name in ("recbole", "torch")}
    digest = hashlib.sha256(repr(sorted(decisive.items(), key=lambda item: str(item[0]))).encode())
    for field in (train.uid_field, train.iid_field):
        digest.update("\0".join(map(str, train.field2id_token[field])).encode())
        digest.update(train.inter_feat[field].numpy().tobytes())
    return digest.hexdigest()[:12]


def _loaded(path: Path, config: Any, ours: Any) -> Retriever:
    """Load a RecBole checkpoint, its dataset read again from this run's folder."""
    try:
        checkpoint = read_checkpoint(path, config["device"])
        theirs = checkpoint["config"]
        if found := _difference(theirs, config):
            raise UserError(f"{path} was trained with {found}; train one on this data and split")
        theirs["checkpoint_dir"], frozen = config["checkpoint_dir"], theirs["frozen_candidates"] is True
        model, dataset, train = load_baseline(path, checkpoint, config["data_path"], config["device"])
    except UserError as error:
        raise UserError(f"retriever_checkpoint: {error}") from error
    if dataset.facts is not None and dataset.facts.reordered and not frozen:
        raise UserError(
            f"retriever_checkpoint {path} was trained without frozen_candidates, in the order of RecBole's float32 "
            f"times: for {dataset.facts.reordered} users that is not the exact order, so it may have learnt their "
            "answers; train it with frozen_candidates: true"
        )
    return Retriever(model, train, f"{theirs['model']}#{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}", ours)


def _difference(theirs: Any, ours: Any) -> str | None:
    """Return what a checkpoint's training rows were decided by otherwise than this run's are; None for nothing."""
    if theirs["model"] == MLLM:
        return "MLLMMSR, which is no retriever"
    mine, its = ({"dataset": config["dataset"]} for config in (ours, theirs))
    for values, config in ((mine, ours), (its, theirs)):
        values |= {f"eval_args.{key}": config["eval_args"][key] for key in ("split", "order")}
        values |= {key: config[key] for key in _SPLIT}
    return next((f"{key} {its[key]}, not {mine[key]}" for key in mine if its[key] != mine[key]), None)
