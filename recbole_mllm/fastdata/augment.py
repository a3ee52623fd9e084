"""RecBole's augmentation of sequences, as arrays."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch

from recbole_mllm.compat.patching import wrap
from recbole_mllm.fastdata.listcolumn import ListColumn


def install(module: ModuleType) -> None:
    """Replace ``SequentialDataset.data_augmentation`` (data/dataset/sequential_dataset.py:77-152), a loop over rows."""

    def make(stock: Callable[..., None]) -> Callable[..., None]:
        def data_augmentation(self: Any) -> None:
            self._aug_presets()
            self._check_field("uid_field", "time_field")
            self.sort(by=[self.uid_field, self.time_field], ascending=True)
            target, length = windows(self.inter_feat[self.uid_field].numpy(), self.config["MAX_ITEM_LIST_LENGTH"])
            if not len(target) or not _shapes_fit(self):
                stock(self)
                return
            self.logger.debug("data_augmentation")
            _augment(self, module.Interaction, target, length)

        return data_augmentation

    wrap(module.SequentialDataset, "data_augmentation", make)


def windows(users: Any, longest: int) -> tuple[Any, Any]:
    """Return the places of rows that have a history, and how many rows before them it holds.

    Args:
        users: ``[rows]``, each user's rows together and in order.
        longest: At most so many rows.
    """
    first = np.flatnonzero(np.r_[True, users[1:] != users[:-1]]) if len(users) else np.array([], int)
    place = np.arange(len(users)) - np.repeat(first, np.diff(np.r_[first, len(users)]))
    target = np.flatnonzero(place)
    return target, np.minimum(place[target], longest)


def _shapes_fit(dataset: Any) -> bool:
    """Return whether each field has the shape its list needs; where not, RecBole broadcasts or fails."""
    return dataset.max_item_list_len == dataset.config["MAX_ITEM_LIST_LENGTH"] and all(
        tuple(dataset.inter_feat[field].shape[1:]) == _tail(dataset, field)
        for field in dataset.inter_feat
        if field != dataset.uid_field
    )


def _tail(dataset: Any, field: str) -> tuple[int, ...]:
    """Return the shape of one entry of the field's list (:125-140)."""
    listed = dataset.field2seqlen[getattr(dataset, f"{field}_list_field")]
    tail = () if isinstance(listed, int) else tuple(listed[1:])
    numerical = field in dataset.float_like_fields and field in dataset.config["numerical_features"]
    return (*tail, 2) if numerical else tail


def _augment(dataset: Any, interaction: Any, target: Any, length: Any) -> None:
    """Replace the rows by those at `target`, each with the `length` rows before it as lists (:119-152)."""
    rows = dataset.inter_feat
    chosen = rows[target]
    start, short = torch.from_numpy(target - length), torch.from_numpy(length.astype(np.int32))
    lists = {dataset.item_list_length_field: torch.from_numpy(length.astype(np.int64))}
    for field in rows:
        if field != dataset.uid_field:
            name = getattr(dataset, f"{field}_list_field")
            lists[name] = ListColumn.of(rows[field], start, short, dataset.max_item_list_len)
    chosen.update(interaction(lists))
    dataset.inter_feat = chosen
