"""RecBole's sequential dataset, each row knowing its place in the user's whole history."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from recbole.data.dataset import SequentialDataset
from recbole.data.interaction import Interaction
from recbole.utils import FeatureSource, FeatureType

from recbole_mllm.data.peruser import Named, PerUser
from recbole_mllm.data.sampling import limited_users
from recbole_mllm.data.schema import POSITION
from recbole_mllm.settings import EvaluationSettings, TrainSettings


class MLLMMSRDataset(SequentialDataset):  # type: ignore[misc]  # RecBole is untyped
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

    exact_order = True  # whatever the configuration says (`facts.wants_exact_order`)
    whole_lists: list[Any] | None = None

    def _benchmark_presets(self) -> None:
        """Keep each row's whole history, of which RecBole will see only the latest items."""
        self.whole_lists = list(self.inter_feat[self.iid_field + self.config["LIST_SUFFIX"]])
        super()._benchmark_presets()

    def _change_feat_format(self) -> None:
        super()._change_feat_format()
        if self.whole_lists is not None:
            self._add_positions(torch.tensor([len(items) for items in self.whole_lists]))

    def _listed_histories(self) -> dict[str, list[str]]:
        """Return each user's ordered raw item ids from benchmark files; the longest where a user has several rows."""
        users, tokens = self._raw(self.uid_field)[self.inter_feat[self.uid_field].numpy()], self._raw(self.iid_field)
        out: dict[str, list[str]] = {}
        rows = zip(users.tolist(), self.whole_lists or [], self.inter_feat[self.iid_field].tolist(), strict=True)
        for user, items, target in rows:
            if len(items) >= len(out.get(user, [])):
                out[user] = [*tokens[items].tolist(), str(tokens[target])]
        return out

    def build(self) -> list[Any]:
        """Split, keep the rows `train_last_k` and `limit_users` allow, and say what summaries the rows will read."""
        parts = super().build()
        train = parts[0]
        train.whole_split = train.inter_feat  # popularity is the split's, whatever part of it this model trains on
        self._limit_users(parts)
        train.inter_feat = self._last(train, TrainSettings.from_config(self.config).train_last_k)
        histories = self._listed_histories() if self.whole_lists else self._histories()
        rows = [(part.inter_feat[self.uid_field].numpy(), part.inter_feat[POSITION].numpy()) for part in parts]
        owners, places = (np.concatenate(column) for column in zip(*rows, strict=True))
        positions = self._per_user(owners, places, set)
        for part in (self, *parts):
            part.histories, part.positions = histories, positions
        return list(parts)

    def _limit_users(self, parts: list[Any]) -> None:
        """Keep the rows of `limit_users` users."""
        limit = EvaluationSettings.from_config(self.config)
        if limit.limit_users is None:
            return
        owners = [part.inter_feat[self.uid_field].numpy() for part in parts]
        kept = limited_users(self._raw(self.uid_field), owners, limit.limit_users, limit.candidate_seed)
        for part, users, chosen in zip(parts, owners, kept, strict=True):
            part.inter_feat = part.inter_feat[chosen[users]]

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

        A user's first row lists the first interaction alone; the targets follow.
        """
        rows = self.inter_feat
        users, targets = rows[self.uid_field].numpy(), rows[self.iid_field].numpy()
        first = torch.from_numpy(np.flatnonzero(rows[POSITION].numpy() == 1))
        listed = rows[self.item_id_list_field][first][:, 0].numpy()
        owners, items = np.r_[users[first], users], np.r_[listed, targets]
        return self._per_user(owners, items, Named(self._raw(self.iid_field)))

    def _per_user(self, owners: Any, values: Any, make: Any) -> PerUser[Any]:
        return PerUser(self.field2token_id[self.uid_field], self._raw(self.uid_field), owners, values, make)
