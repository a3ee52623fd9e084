"""RecBole's sequential dataset, each row knowing its place in the user's whole history."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from recbole.data.dataset import SequentialDataset
from recbole.data.interaction import Interaction
from recbole.utils import FeatureSource, FeatureType

from recbole_mllm.data.peruser import Named, PerUser
from recbole_mllm.data.sampling import sample_users
from recbole_mllm.data.schema import POSITION
from recbole_mllm.fastdata.listcolumn import entries
from recbole_mllm.settings import EvaluationSettings, TrainSettings


class MLLMMSRDataset(SequentialDataset):  # type: ignore[misc]
    """Adds to RecBole's rows the number of interactions before them, before ``MAX_ITEM_LIST_LENGTH`` cuts.

    After `build`, the three parts share `histories`, each user's ordered raw item ids, and `positions`, where the
    user's training, validation and test rows stand: all that summaries must be made for.
    """

    def data_augmentation(self) -> None:
        """Augment as RecBole does (sequential_dataset.py:77-152), then number the rows of each user from 1."""
        super().data_augmentation()
        users = self.inter_feat[self.uid_field].numpy()
        first = np.flatnonzero(np.r_[True, users[1:] != users[:-1]]) if len(users) else np.array([], int)
        place = np.arange(len(users)) - np.repeat(first, np.diff(np.r_[first, len(users)])) + 1
        self._add_positions(torch.from_numpy(place))

    def _add_positions(self, place: torch.Tensor) -> None:
        self.set_field_property(POSITION, FeatureType.TOKEN, FeatureSource.INTERACTION, 1)
        self.inter_feat.update(Interaction({POSITION: place}))

    def build(self) -> list[Any]:
        """Split, keep the rows `train_last_k` and `limit_users` allow, and say what summaries the rows will read."""
        parts = super().build()
        if POSITION not in self.inter_feat:  # benchmark files: one ready-made row a user, its list the history
            for part in parts:
                part._add_positions(part.inter_feat[self.item_list_length_field].clone())
        train, _, test = parts
        train.whole_split = train.inter_feat  # popularity is the split's, whatever part of it this model trains on
        self._limit_users(parts, test)
        train.inter_feat = self._last(train, TrainSettings.from_config(self.config).train_last_k)
        histories = self._histories()
        rows = [(part.inter_feat[self.uid_field].numpy(), part.inter_feat[POSITION].numpy()) for part in parts]
        owners, places = (np.concatenate(column) for column in zip(*rows, strict=True))
        positions = self._per_user(owners, places, set)
        for part in (self, *parts):
            part.histories, part.positions = histories, positions
        return list(parts)

    def _limit_users(self, parts: list[Any], test: Any) -> None:
        """Keep the rows of `limit_users` of the users in `test`."""
        limit = EvaluationSettings.from_config(self.config)
        if limit.limit_users is None:
            return
        raw = self._raw(self.uid_field)
        chosen = sample_users(
            raw[np.unique(test.inter_feat[self.uid_field].numpy())], limit.limit_users, limit.candidate_seed
        )
        kept = np.isin(raw, list(chosen))
        for part in parts:
            part.inter_feat = part.inter_feat[kept[part.inter_feat[self.uid_field].numpy()]]

    def _raw(self, field: str) -> np.ndarray[Any, Any]:
        """Return the raw id of each internal id."""
        return np.asarray(self.field2id_token[field]).astype(str)

    def _last(self, train: Any, last_k: int | None) -> Any:
        """Return the rows of `train` that are among each user's `last_k` latest training positions."""
        rows = train.inter_feat
        if last_k is None or not len(rows):
            return rows
        users, places = rows[self.uid_field].numpy(), rows[POSITION].numpy()
        latest = np.zeros(users.max() + 1, int)
        np.maximum.at(latest, users, places)
        return rows[places > latest[users] - last_k]

    def _histories(self) -> PerUser[list[str]]:
        """Return each user's ordered raw item ids, the targets of all rows included.

        A user's latest row whose list begins at the first interaction says what came before it; the targets follow.
        """
        rows = self.inter_feat
        users, targets = rows[self.uid_field].numpy(), rows[self.iid_field].numpy()
        lengths = rows[self.item_list_length_field].numpy()
        whole = rows[POSITION].numpy() == lengths if POSITION in rows else np.ones(len(users), bool)
        latest = np.full(self.user_num, len(users))
        latest[users[::-1]] = np.arange(len(users))[::-1]  # the first row, where no list is whole
        latest[users[whole]] = np.flatnonzero(whole)
        after = np.arange(len(users)) >= latest[users]
        told = torch.from_numpy(np.unique(latest[users]))
        listed = entries(rows[self.item_id_list_field][told], rows[self.item_list_length_field][told]).numpy()
        owners = np.r_[np.repeat(users[told], lengths[told]), users[after]]
        return self._per_user(owners, np.r_[listed, targets[after]], Named(self._raw(self.iid_field)))

    def _per_user(self, owners: Any, values: Any, make: Any) -> PerUser[Any]:
        return PerUser(self.field2token_id[self.uid_field], self._raw(self.uid_field), owners, values, make)
