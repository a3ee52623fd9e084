"""RecBole's sequential dataset, each row knowing its place in the user's whole history."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from recbole.data.dataset import SequentialDataset
from recbole.data.interaction import Interaction
from recbole.utils import FeatureSource, FeatureType

from recbole_mllm.common.settings import EvaluationSettings, TrainSettings
from recbole_mllm.data.histories import HistoryNames, PerHistory, places_in_groups, raw_ids, shared_histories
from recbole_mllm.data.sampling import limited_users
from recbole_mllm.data.schema import HISTORY_NUMBER, POSITION


class MLLMMSRDataset(SequentialDataset):  # type: ignore[misc]  # RecBole is untyped
    """Adds to RecBole's rows the number of interactions before them, before ``MAX_ITEM_LIST_LENGTH`` cuts, and of what.

    A row's history is its user's: that of ``X.inter``, also beside the benchmark files of a temporal split. With other
    benchmark files it is what the row's own list says: rows share one where one's list is the beginning of the other's,
    and a user may have several.

    After `build`, the three parts share `histories`, the ordered raw item ids of each history, and `positions`, where
    training, validation and test rows stand in it, or `evaluated`, where the latter two do: all that summaries are
    needed for. They go by the names that `names` gives to the rows' numbers of histories. `met` holds the raw ids of
    all items each user meets in any row.
    """

    def data_augmentation(self) -> None:
        """Augment as RecBole does (sequential_dataset.py:77-152), then number the rows of each user from 1."""
        super().data_augmentation()
        users = self.inter_feat[self.uid_field].numpy()
        self._number_rows(places_in_groups(users) + 1, users.copy())

    def _number_rows(self, places: Any, histories: Any) -> None:
        numbers = {POSITION: torch.from_numpy(places), HISTORY_NUMBER: torch.from_numpy(histories)}
        for field in numbers:
            self.set_field_property(field, FeatureType.TOKEN, FeatureSource.INTERACTION, 1)
        self.inter_feat.update(Interaction(numbers))

    exact_order = True  # whatever the configuration says (`facts.wants_exact_order`)
    whole_lists: list[Any] | None = None
    row_times: Any = None
    whole_split: Any  # of the training part: its rows before `train_last_k` and `limit_users` thin them

    def _benchmark_presets(self) -> None:
        """Keep each row's whole history and exact time, of which RecBole will see the latest items, and a float32."""
        self.row_times = self.inter_feat[self.time_field].to_numpy() if self.time_field in self.inter_feat else None
        if self.facts is None or self.facts.whole is None:
            self.whole_lists = list(self.inter_feat[self.iid_field + self.config["LIST_SUFFIX"]])
        super()._benchmark_presets()

    def _change_feat_format(self) -> None:
        super()._change_feat_format()
        if self.facts is not None and self.facts.whole is not None:
            self._number_rows(self.facts.positions, self.inter_feat[self.uid_field].numpy().copy())
        elif self.whole_lists is not None:
            users = self.inter_feat[self.uid_field].numpy()
            lengths = np.fromiter(map(len, self.whole_lists), int, len(self.whole_lists))
            self._holders, histories = shared_histories(users, self.whole_lists)
            self._number_rows(lengths, histories)

    def build(self) -> list[Any]:
        """Split, keep the rows `train_last_k` and `limit_users` allow, and say what summaries the rows will read."""
        parts = super().build()
        train = parts[0]
        train.whole_split = train.inter_feat
        counts = None  # of each user's histories; one each
        if self.whole_lists is not None:
            counts = np.bincount(self.inter_feat[self.uid_field].numpy()[self._holders], minlength=self.user_num)
        names = HistoryNames(self.field2token_id[self.uid_field], self._raw(self.uid_field), counts)
        histories, met = self._histories(names)
        train.inter_feat = self._last(train, TrainSettings.from_config(self.config).train_last_k)
        limit = EvaluationSettings.from_config(self.config)
        if limit.limit_users is not None:
            users = [part.inter_feat[self.uid_field].numpy() for part in parts]
            chosen = limited_users(self._raw(self.uid_field), users, limit.limit_users, limit.candidate_seed)
            for part, owners, among in zip(parts, users, chosen, strict=True):
                part.inter_feat = part.inter_feat[among[owners]]
        rows = [(part.inter_feat[HISTORY_NUMBER].numpy(), part.inter_feat[POSITION].numpy()) for part in parts]
        for part in (self, *parts):
            part.history_names, part.histories, part.met = names, histories, met
            part.positions, part.evaluated = _positions(names, rows), _positions(names, rows[1:])
        return list(parts)

    def _raw(self, field: str) -> np.ndarray[Any, Any]:
        return np.asarray(self.field2id_token[field]).astype(str)

    def _last(self, train: Any, last_k: int | None) -> Any:
        """Return the rows of `train`, all of that part, that are among each user's `last_k` latest ones.

        A row's position says so where all read one history; where lists may be cut, time goes first.
        """
        rows = train.inter_feat
        if last_k is None or not len(rows):
            return rows
        users, keys = rows[self.uid_field].numpy(), [rows[POSITION].numpy()]
        if self.row_times is not None:
            keys.append(self.row_times[: len(rows)])
        latest_first = np.lexsort((*keys, users))[::-1]
        chosen = np.zeros(len(rows), bool)
        chosen[latest_first] = places_in_groups(users[latest_first]) < last_k
        return rows[chosen]

    def _histories(self, names: HistoryNames) -> tuple[PerHistory[list[str]], PerHistory[list[str]]]:
        """Return the ordered raw item ids of each history, and all that each user meets: in its rows, targets included.

        Without benchmark files that is one and the same: a user's first row lists the first interaction alone, and the
        targets follow.
        """
        rows, named = self.inter_feat, partial(raw_ids, self._raw(self.iid_field))
        if self.facts is not None and self.facts.whole is not None:
            owners, items = self.facts.pairs()
            histories = PerHistory(names, owners, items, named)
            return histories, histories
        users, targets = rows[self.uid_field].numpy(), rows[self.iid_field].numpy()
        if self.whole_lists is None:
            first = torch.from_numpy(np.flatnonzero(rows[POSITION].numpy() == 1))
            listed = rows[f"{self.iid_field}{self.config['LIST_SUFFIX']}"][first][:, 0].numpy()
            histories = PerHistory(names, np.r_[users[first], users], np.r_[listed, targets], named)
            return histories, histories
        lists = [self.whole_lists[row] for row in self._holders]
        owners = np.repeat(np.arange(len(lists)), [len(items) for items in lists])
        items = np.concatenate([np.empty(0, int), *lists])
        per_user = HistoryNames(self.field2token_id[self.uid_field], self._raw(self.uid_field))
        met = PerHistory(per_user, np.r_[names.owners[owners], users], np.r_[items, targets], named)
        return PerHistory(names, owners, items, named, empty=True), met


def _positions(names: HistoryNames, rows: list[tuple[Any, Any]]) -> PerHistory[set[int]]:
    """Return where the rows of some parts, (histories, positions) of each, stand in each history."""
    owners, places = (np.concatenate(column) for column in zip(*rows, strict=True))
    return PerHistory(names, owners, places, set)
