"""MLLMMSR's training rows: the negatives an epoch asks for, and which rows meet in a batch.

RecBole's RepeatableSampler excludes a row's target alone (sampler.py:426), so that some negatives are items of the
user's own history, and it draws from numpy's global generator. Here an epoch is known by (seed, epoch) alone, which
is also what lets a run continue in the middle of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from recbole.data.dataloader import TrainDataLoader
from recbole.data.interaction import Interaction

from recbole_mllm.common.errors import UserError
from recbole_mllm.data.histories import places_in_groups
from recbole_mllm.data.sampling import Pairs, hash64
from recbole_mllm.data.schema import HISTORY_NUMBER, POSITION

_ROWS_TOGETHER = 8  # most rows of one item that stand together: sharing gains little beyond, and batches stay mixed


class Negatives:
    """Draws items that occur in training and that a user has not met there.

    A user's validation and test items may be drawn: were they never negatives, they would stand out.

    Args:
        met: ``[n, 2]`` distinct (user, item) pairs of the training split, internal ids.
        power: 0 draws every item alike, above 0 in proportion to its count to this power.
    """

    def __init__(self, met: Any, power: float = 0.0) -> None:
        self.items, count = np.unique(met[:, 1], return_counts=True)
        share = np.cumsum(count.astype(float) ** power)
        self._cumulative = share / share[-1]
        self._met = Pairs(met[:, 0], met[:, 1], int(self.items[-1]) + 1)

    def draw(self, users: Any, rng: np.random.Generator) -> Any:
        """Return one item for each of `users` (internal ids), with replacement."""
        out = np.zeros(len(users), self.items.dtype)
        left = np.arange(len(users))
        while len(left):
            drawn = np.searchsorted(self._cumulative, rng.random(len(left)), side="right")
            out[left] = self.items[drawn]
            left = left[self._met.contain(users[left].astype(np.int64), out[left])]
        return out

    def exhausted(self, users: Any) -> Any:
        """Return those of `users` that have met every item, so that none is left to draw."""
        owners, counts = np.unique(self._met.keys // self._met.width, return_counts=True)
        return np.intersect1d(users, owners[counts >= len(self.items)])


class SeededTrainDataLoader(TrainDataLoader):  # type: ignore[misc]  # RecBole is untyped
    """RecBole's pointwise training batches, positives then their negatives, known by (seed, epoch) alone.

    `grouped` deals the same rows out so that up to eight rows of an item, positive or negative, stand together, and
    which items meet in a batch is random; every batch has as many rows as without.
    """

    def __init__(self, config: Any, dataset: Any, sampler: Any, shuffle: bool = True, grouped: bool = False) -> None:
        super().__init__(config, dataset, sampler, shuffle=shuffle)
        self.epoch, self.first, self.grouped = 0, 0, grouped
        self._negatives: Negatives | None = None

    @classmethod
    def of(cls, loader: Any, grouped: bool = False) -> SeededTrainDataLoader:
        """Return `loader`, RecBole's or already of this kind, as one that groups its rows or does not."""
        if not isinstance(loader, cls):
            return cls(loader.config, loader._dataset, loader._sampler, loader.shuffle, grouped)
        loader.grouped = grouped
        return loader

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Make the next pass that of `epoch`, from its batch `first` on; without it, passes count up from 0."""
        self.epoch, self.first = epoch, first

    def __len__(self) -> int:
        return -(-int(self.sample_size) // int(self.step))

    def rows_in(self, batch: int) -> int:
        """Return how many rows a batch has: all but the last have as many."""
        return int(min(self.step, self.sample_size - batch * self.step) * self.times)

    def __iter__(self) -> Iterator[Interaction]:
        items, order = self._plan(self.epoch)
        starts = np.cumsum([0, *(self.rows_in(batch) for batch in range(len(self)))])
        for batch in range(self.first, len(self)):
            yield self._rows(items, order[starts[batch] : starts[batch + 1]])
        self.set_epoch(self.epoch + 1)

    def _plan(self, epoch: int) -> tuple[Any, Any]:
        """Return the items of the epoch's rows, positives before negatives, and the order in which rows are dealt."""
        rng = np.random.default_rng(hash64("training", self.config["seed"], epoch))
        count = self.sample_size
        users, items = (self._dataset.inter_feat[field].numpy() for field in (self.uid_field, self.iid_field))
        if self.times > 1 and self._negatives is None:
            self._negatives = _negatives(self.neg_sample_args, self._dataset, users)
        drawn = [self._negatives.draw(users, rng) for _ in range(self.times - 1) if self._negatives]
        items = np.concatenate([items, *drawn])
        most = min(_ROWS_TOGETHER, self.step * self.times // 2)  # a batch has room for two items at least
        if self.grouped and self.shuffle and most > 1:
            return items, _by_item(items, most, rng)
        positives = rng.permutation(count) if self.shuffle else np.arange(count)
        blocks = np.split(positives, range(self.step, count, self.step))
        return items, np.concatenate([block + count * n for block in blocks for n in range(self.times)])

    def _rows(self, items: Any, chosen: Any) -> Interaction:
        """Return rows as RecBole makes them (general_dataloader.py:68-72, abstract_dataloader.py:219-227)."""
        count = self.sample_size
        rows = self.transform(self._dataset, self._dataset[chosen % count])
        if self.times == 1:  # without sampling, the labels are the dataset's own
            return rows
        rows.update(Interaction({self.iid_field: torch.from_numpy(items[chosen])}))
        rows = self._dataset.join(rows)
        rows.update(Interaction({self.label_field: torch.from_numpy(chosen < count).float()}))
        return rows


def check_negatives(config: Any, train: Any) -> None:
    """Refuse a training part in which somebody leaves no negative to draw, before anything is generated for it.

    Raises:
        UserError: A user has met every item there is, or negatives are asked for that a model must choose.
    """
    how = config["train_neg_sample_args"]
    if how["distribution"] != "none":
        _negatives(how, train, train.inter_feat[train.uid_field].numpy())


def _negatives(how: Mapping[str, Any], train: Any, users: Any) -> Negatives:
    if how.get("dynamic", False):
        raise UserError("train_neg_sample_args.dynamic asks an MLLM about every candidate; set it to false")
    popular = how["distribution"] == "popularity"
    negatives = Negatives(training_pairs(train), float(how.get("alpha", 1.0)) if popular else 0.0)
    if len(full := negatives.exhausted(users)):
        name = train.field2id_token[train.uid_field][full[0]]
        raise UserError(
            f"user {name} has met all {len(negatives.items)} items that occur in training, so no negative is left; "
            "leave such users out (user_inter_num_interval; before a split)"
        )
    return negatives


def training_pairs(train: Any) -> Any:
    """Return the ``[n, 2]`` distinct (user, item) pairs of the training split: what its rows list, and their targets.

    Whole lists are read, not what RecBole's cut leaves.
    """
    rows, names, ids = train.whole_split, train.history_names, train.field2token_id
    users, targets = rows[train.uid_field].numpy(), rows[train.iid_field].numpy()
    numbers, places = rows[HISTORY_NUMBER].numpy(), rows[POSITION].numpy()
    read = np.zeros(len(names), int)
    np.maximum.at(read, numbers, places)
    present = np.unique(numbers)
    histories = (train.histories[names.name(n)][: read[n]] for n in present.tolist())
    number = ids[train.iid_field]
    items = np.fromiter((number[item] for history in histories for item in history), dtype=np.int64)
    owners = np.repeat(names.owners[present], read[present])
    return np.unique(np.c_[np.r_[owners, users], np.r_[items, targets]], axis=0)


def _by_item(items: Any, most: int, rng: np.random.Generator) -> Any:
    """Return an order of `items` in which at most `most` rows of one stand together, and the rest is random."""
    rows = rng.permutation(len(items))
    rows = rows[np.argsort(items[rows], kind="stable")]
    chunk = np.cumsum(places_in_groups(items[rows]) % most == 0) - 1
    turn = rng.permutation(chunk[-1] + 1)
    return rows[np.argsort(turn[chunk], kind="stable")]
