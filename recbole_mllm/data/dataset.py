"""RecBole's sequential dataset, each row knowing its place in the user's whole history."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from recbole.data.dataset import SequentialDataset
from recbole.data.interaction import Interaction
from recbole.utils import FeatureSource, FeatureType

from recbole_mllm.data.sampling import sample_users
from recbole_mllm.data.schema import POSITION
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
        tokens = np.asarray(self.field2id_token[self.iid_field]).astype(str)
        out: dict[str, list[str]] = {}
        rows = zip(self._raw_users(self), self.whole_lists or [], self.inter_feat[self.iid_field].tolist(), strict=True)
        for user, items, target in rows:
            if len(items) >= len(out.get(user, [])):
                out[user] = [*tokens[items].tolist(), str(tokens[target])]
        return out

    def build(self) -> list[Any]:
        """Split, keep the rows `train_last_k` and `limit_users` allow, and say what summaries the rows will read."""
        parts = super().build()
        train, _, test = parts
        train.whole_split = train.inter_feat  # popularity is the split's, whatever part of it this model trains on
        limit = EvaluationSettings.from_config(self.config)
        chosen = sample_users(self._raw_users(test), limit.limit_users, limit.candidate_seed)
        if limit.limit_users is not None:
            for part in parts:
                part.inter_feat = part.inter_feat[np.isin(self._raw_users(part), list(chosen))]
        train.inter_feat = self._last(train, TrainSettings.from_config(self.config).train_last_k)
        histories = self._listed_histories() if self.whole_lists else self._histories(parts)
        positions: dict[str, set[int]] = {}
        for part in parts:
            for user, place in zip(self._raw_users(part), part.inter_feat[POSITION].tolist(), strict=True):
                positions.setdefault(user, set()).add(place)
        for part in (self, *parts):
            part.histories, part.positions = histories, positions
        return list(parts)

    def _raw_users(self, part: Any) -> np.ndarray[Any, Any]:
        tokens = np.asarray(self.field2id_token[self.uid_field]).astype(str)
        return np.asarray(tokens[part.inter_feat[self.uid_field].numpy()])

    def _last(self, train: Any, last_k: int | None) -> Any:
        """Return the rows of `train` that are among each user's `last_k` latest training positions."""
        rows = train.inter_feat
        if last_k is None or not len(rows):
            return rows
        users, places = rows[self.uid_field].numpy(), rows[POSITION].numpy()
        latest = np.zeros(users.max() + 1, int)
        np.maximum.at(latest, users, places)
        return rows[places > latest[users] - last_k]

    def _histories(self, parts: list[Any]) -> dict[str, list[str]]:
        """Return each user's ordered raw item ids, the targets of all rows included."""
        tokens = np.asarray(self.field2id_token[self.iid_field]).astype(str)
        rows = self.inter_feat
        lists, lengths = rows[self.item_id_list_field].numpy(), rows[self.item_list_length_field].numpy()
        targets, places = rows[self.iid_field].numpy(), rows[POSITION].numpy() if POSITION in rows else lengths
        out: dict[str, list[str]] = {}
        for i, user in enumerate(self._raw_users(self)):
            if user not in out or places[i] == lengths[i]:
                out[user] = tokens[lists[i, : lengths[i]]].tolist()
            out[user].append(str(tokens[targets[i]]))
        return out
