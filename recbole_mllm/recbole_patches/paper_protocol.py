"""Benchmark files whose rows are a user's history and a target, as ``convert --protocol paper|temporal`` writes them.

RecBole reads them (data/dataset/dataset.py:290-318, sequential_dataset.py:154-165) but shows a sequential model lists
of any length, and a general model nothing but the targets. Of a temporal split it does not see the whole ``X.inter``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.progress import warn_once
from recbole_mllm.data.atomic import read_columns
from recbole_mllm.data.facts import temporal_split
from recbole_mllm.data.schema import PLACE
from recbole_mllm.recbole_patches.hooks import replace

_TARGETS_ALONE = {"Pop"}  # counts what users take next, which is what it is asked for


def read_whole_log(dataset_module: Any) -> None:
    """Read ``X.inter`` behind the benchmark files of a temporal split, so that its users and items are numbered too.

    It stands in the frame until `facts` are taken (`cut_whole_log`).
    """

    @replace(dataset_module.Dataset)
    def _load_inter_feat(stock: Any, self: Any, token: str, dataset_path: str) -> None:
        stock(self, token, dataset_path)
        if (known := temporal_split(self.config)) is None:
            return
        import pandas as pd

        listed, path = f"{self.iid_field}{self.config['LIST_SUFFIX']}", Path(dataset_path) / f"{token}.inter"
        lengths = dict(self.field2seqlen)
        missing = [name for name in (listed, PLACE) if name not in self.inter_feat]
        if missing or len(self.file_size_list) != 3 or not path.is_file():
            raise UserError(
                f"a temporal split wants {path} and three benchmark files with {listed}:token_seq and {PLACE}:float, "
                "all named in load_col; write them again with `split --protocol temporal`"
            )
        whole = self._load_feat(str(path), dataset_module.FeatureSource.INTERACTION)
        if (made_of := known.get("interactions", len(whole))) != len(whole):
            warn_once(
                f"{path} holds {len(whole):,} interactions, and its temporal split was made of {made_of:,}: targets "
                "and training are those of the split, histories and candidates are not; `split --protocol temporal` "
                "from the grown dataset makes a new one"
            )
        whole[listed] = [np.empty(0, str)] * len(whole)
        self.inter_feat = pd.concat([self.inter_feat, whole], ignore_index=True)
        self.field2seqlen.update(lengths)


def cut_whole_log(dataset: Any) -> None:
    """Leave of a temporal split the rows of its benchmark files alone, and none of their places."""
    dataset.inter_feat = dataset.inter_feat.iloc[: sum(dataset.file_size_list)].copy()
    dataset._del_col(dataset.inter_feat, PLACE)


def require_lists(dataset_module: Any) -> None:
    """Refuse benchmark files that give a sequential model no histories, once they are read (dataset.py:119)."""

    @replace(dataset_module.Dataset)
    def _init_alias(stock: Any, self: Any) -> None:
        if self.config["benchmark_filename"] is not None and hasattr(self, "item_list_length_field"):
            _check_lists(self)
        stock(self)


def _check_lists(dataset: Any) -> None:
    listed = f"{dataset.iid_field}{dataset.config['LIST_SUFFIX']}"
    if listed not in dataset.inter_feat:
        file = Path(dataset.dataset_path) / f"{dataset.dataset_name}.{dataset.config['benchmark_filename'][0]}.inter"
        if listed in read_columns(file):
            raise UserError(f"load_col does not name {listed}, in which the rows list their histories; add it to inter")
        raise UserError(
            f"{file}:1: there is no column {listed}:token_seq; benchmark files must list in it the items before each "
            f"row, as `convert --protocol paper` writes them; or put all rows into {dataset.dataset_name}.inter and "
            "leave benchmark_filename out, and eval_args will split them"
        )
    if listed not in (dataset.config["alias_of_item_id"] or []):
        raise UserError(
            f"the ids of {listed} would be numbered apart from those of {dataset.iid_field}; "
            f"set alias_of_item_id: [{listed}]"
        )


def cut_lists(sequential_dataset: Any) -> None:
    """Cut ready-made lists to the last ``MAX_ITEM_LIST_LENGTH`` entries, and pad to that width, as augmentation does.

    Without it a longer list indexes past a model's positions, and a shorter one does not fit models of fixed width.
    """

    @replace(sequential_dataset.SequentialDataset)
    def _benchmark_presets(stock: Any, self: Any) -> None:
        longest = self.max_item_list_len
        for field in _list_fields(self):
            self.inter_feat[field] = self.inter_feat[field].map(lambda values: values[-longest:])
            self.field2seqlen[field] = longest
        self.item_id_list_field = self.iid_field + self.config["LIST_SUFFIX"]  # RecBole knows one name alone (:164)
        stock(self)

    @replace(sequential_dataset.SequentialDataset)
    def _change_feat_format(stock: Any, self: Any) -> None:
        stock(self)
        if self.config["benchmark_filename"] is not None:
            for field in _list_fields(self):
                lists = self.inter_feat[field]
                padded = torch.nn.functional.pad(lists, (0, self.max_item_list_len - lists.shape[1]))
                self.inter_feat.update(Interaction({field: padded}))
            if hasattr(self, "neg_item_list_field"):
                self.inter_feat.update(Interaction({self.neg_item_list_field: _negatives(self)}))


def _list_fields(dataset: Any) -> list[str]:
    suffix = dataset.config["LIST_SUFFIX"]
    return [field + suffix for field in dataset.inter_feat if field + suffix in dataset.inter_feat]


def _negatives(dataset: Any) -> torch.Tensor:
    """Return another item for each item of each list, which DIEN wants (customized_dataset.py:144-151)."""
    lists = dataset.inter_feat[dataset.iid_field + dataset.config["LIST_SUFFIX"]]
    out = torch.zeros_like(lists)
    out[lists > 0] = torch.as_tensor(dataset.seq_sampler.sample_neg_sequence(lists[lists > 0]), dtype=lists.dtype)
    return out


def train_on_histories(dataset_module: Any) -> None:
    """Where ``train_on_histories`` asks for it, give general models all users' histories and the train users' targets.

    Each interaction is a row once, however many rows of its user list it, and no validation or test target is one,
    though another row's history may list it (`facts.Split.trained`). `Pop` learns from the train users' targets alone,
    but of a temporal split from all that lies before its first moment.
    """

    @replace(dataset_module.Dataset)
    def build(stock: Any, self: Any) -> Any:
        parts = stock(self)
        listed = f"{self.iid_field}{self.config['LIST_SUFFIX']}"
        if self.config["train_on_histories"] is not True or hasattr(self, "item_list_length_field"):
            return parts
        split = self.facts.split(self.config)
        alone = self.config["model"] in _TARGETS_ALONE and self.facts.whole is None
        if split is not None and not alone:
            users, items, times = split.trained()
            pairs = {self.uid_field: np.repeat(users, times), self.iid_field: np.repeat(items, times)}
            learnt = {field: torch.from_numpy(values.astype(np.int64)) for field, values in pairs.items()}
            parts[0].inter_feat = Interaction(learnt)
        for part in parts:
            columns = part.inter_feat.interaction.items()
            part.inter_feat = Interaction({name: column for name, column in columns if name != listed})
        for table in (self.field2type, self.field2source, self.field2id_token, self.field2seqlen):
            table.pop(listed, None)  # by which context-aware models choose what they read; the parts share them
        return parts
