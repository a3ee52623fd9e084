"""Frozen candidates inside RecBole: an evaluation loader whose negatives no model, epoch or process can change.

RecBole's own sampler draws from numpy's global generator, which training consumes, and excludes only the target
(sampler.py:235,396,426). Here candidates are drawn once by raw id and laid into RecBole's loader.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from logging import getLogger
from typing import Any

import numpy as np
import torch
from recbole.data.dataloader import NegSampleEvalDataLoader
from recbole.data.interaction import Interaction
from recbole.utils import InputType

from recbole_mllm.data.sampling import hashes64, sample_users
from recbole_mllm.data.schema import TIE
from recbole_mllm.errors import UserError
from recbole_mllm.evaluation.draw import Pool, candidates_digest, draw_negatives
from recbole_mllm.evaluation.protocol import training_counts
from recbole_mllm.evaluation.ties import tie_keys
from recbole_mllm.fastdata.listcolumn import entries
from recbole_mllm.fastdata.pairs import Pairs
from recbole_mllm.settings import EvaluationSettings

_MODE = re.compile(r"(uni|pop)(\d+)")


@dataclass(frozen=True, slots=True)
class UserRows:
    """Where each user's rows stand among rows sorted by user: ``[U]`` users, first places and how many."""

    users: Any
    starts: Any
    counts: Any

    @classmethod
    def of(cls, users: Any) -> UserRows:
        """Find the users in ``[rows]`` sorted internal ids."""
        return cls(*np.unique(users, return_index=True, return_counts=True))

    def digested(self, raw: Any, targets: Any, negatives: Any) -> tuple[Any, Any, Any]:
        """Return raw ids, lengths and hashes for ``candidates_digest`` from the hashes of all rows' items."""
        each = len(negatives) // max(1, len(targets))
        lengths = self.counts * (1 + each)
        place = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        out = np.empty(len(place), np.uint64)
        positive = place < np.repeat(self.counts, lengths)
        out[positive], out[~positive] = ~targets, negatives
        return raw[self.users], lengths, out


class FrozenEvalDataLoader(NegSampleEvalDataLoader):  # type: ignore[misc]
    """RecBole's loader with given negatives, and a key beside each pair that breaks ties without looking at labels.

    Args:
        rows: Whose evaluation rows stand where in `dataset`, which is sorted by user.
        count: Negatives of each row.
        negatives: ``[rows * count]`` internal item ids, one user after the other.
        keys: ``tie_keys`` of RecBole's users and items.
    """

    def __init__(
        self, config: Any, dataset: Any, sampler: Any, rows: UserRows, count: int, negatives: Any, keys: Any
    ) -> None:
        self.rows, self.count, self.negatives, self.keys = rows, count, negatives, keys
        self.logger = getLogger()
        phase = sampler.phase if sampler is not None else "test"
        self._set_neg_sample_args(config, dataset, InputType.POINTWISE, config[f"{phase}_neg_sample_args"])
        self.uid_list, self.sample_size = rows.users, len(rows.users)
        self.uid2items_num = np.bincount(rows.users, rows.counts, dataset.user_num).astype(np.int64)
        # past RecBole's own, which counts rows in a loop and keeps a slice a user (general_dataloader.py:87-128)
        super(NegSampleEvalDataLoader, self).__init__(config, dataset, sampler, shuffle=False)

    def _init_batch_size_and_step(self) -> None:
        """Take as many users as RecBole does (general_dataloader.py:130-146): the largest ones must fit a batch."""
        sizes = np.sort(self.uid2items_num * self.times)[::-1]
        fitting = 1 + int((np.cumsum(sizes)[1:] <= self.config["eval_batch_size"]).sum())
        self.step = fitting
        self.set_batch_size(int(sizes[:fitting].sum()))

    def collate_fn(self, index: Sequence[int]) -> tuple[Interaction, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the users' pairs, positives first, as RecBole's loader does (general_dataloader.py:150-180)."""
        starts, own = self.rows.starts[np.asarray(index)], self.rows.counts[np.asarray(index)]
        sizes = own * (1 + self.count)
        owner = np.repeat(np.arange(len(sizes)), sizes)
        place = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        start, positive = starts[owner], place < own[owner]
        drawn = np.where(positive, 0, place - own[owner])
        rows = start + np.where(positive, place, drawn // max(1, self.count))
        targets = self._dataset.inter_feat[self.iid_field].numpy()
        items = np.where(positive, targets[rows], self.negatives[start * self.count + drawn])
        pairs = self._pairs(rows, items, positive)
        return (
            pairs,
            torch.from_numpy(owner),
            torch.from_numpy(owner[positive]),
            torch.from_numpy(items[positive]),
        )

    def _pairs(self, rows: Any, items: Any, labels: Any) -> Interaction:
        used, back = np.unique(rows, return_inverse=True)
        # the item is replaced before joining, so that item features are the candidate's
        shown = self.transform(self._dataset, self._dataset.inter_feat[used])
        plain = shown[back]
        plain.update(Interaction({self.iid_field: torch.from_numpy(items)}))
        pairs = self._dataset.join(plain)
        users = plain[self._dataset.uid_field].numpy()
        extra = {self.label_field: torch.from_numpy(labels).float(), TIE: torch.from_numpy(self.keys(users, items))}
        pairs.update(Interaction(extra))
        return pairs


def is_frozen(config: Any) -> bool:
    """Return whether this run asks for frozen candidates."""
    return EvaluationSettings.from_config(config).frozen_candidates is True


def freeze(config: Any, dataset: Any, train: Any, valid: Any, test: Any) -> tuple[Any, Any, Any]:
    """Return RecBole's three loaders, the evaluation ones with frozen candidates, and note their digest on `dataset`.

    Full ranking has no candidates to freeze and passes as it is, but for `limit_users`.

    Raises:
        UserError: The mode is ``labeled``, or a user leaves too few items.
    """
    settings = EvaluationSettings.from_config(config)
    users, items = (np.asarray(dataset.field2id_token[f]).astype(str) for f in (dataset.uid_field, dataset.iid_field))
    chosen = _chosen(test._dataset, users, settings)
    met = _met(dataset, len(items))
    keys, hashes = tie_keys(users, items, settings.candidate_seed), hashes64(items, "item")
    loaders, drawn = {"train": train}, {}
    for phase, loader in (("valid", valid), ("test", test)):
        part = _of_users(loader._dataset, chosen)
        mode = str(config["eval_args"]["mode"][phase])
        if mode == "full":
            loaders[phase] = type(loader)(config, part, loader._sampler, shuffle=False)
            continue
        count = _count(mode)
        part.sort(by=part.uid_field, ascending=True)
        rows = UserRows.of(part.inter_feat[part.uid_field].numpy())
        pool = _pool(mode, met, train, items)
        negatives = draw_negatives(
            pool, met, rows.users, rows.counts * count, users, phase, settings.candidate_seed
        )
        drawn[phase] = rows.digested(users, hashes[part.inter_feat[part.iid_field].numpy()], hashes[negatives])
        loaders[phase] = FrozenEvalDataLoader(config, part, loader._sampler, rows, count, negatives, keys)
    dataset.candidates_digest = candidates_digest(drawn)
    dataset.evaluated_users = int(chosen.sum())
    return loaders["train"], loaders["valid"], loaders["test"]


def _chosen(test: Any, users: Any, settings: EvaluationSettings) -> Any:
    """Return, for each internal user id, whether the user is evaluated."""
    out = np.zeros(len(users), bool)
    out[test.inter_feat[test.uid_field].numpy()] = True
    if settings.limit_users is None:
        return out
    return out & np.isin(users, list(sample_users(users[out].tolist(), settings.limit_users, settings.candidate_seed)))


def _count(mode: str) -> int:
    match = _MODE.fullmatch(mode)
    if match is None:
        raise UserError(f"eval_args.mode {mode!r} has no candidates to freeze; use uniN or popN, e.g. uni20, or full")
    return int(match.group(2))


def _pool(mode: str, met: Pairs, train: Any, items: Any) -> Pool:
    if mode.startswith("pop"):
        return Pool.popular(training_counts(train._dataset, 0, len(items))[0], items)
    return Pool.uniform(met.keys % met.width, items)


def _of_users(part: Any, chosen: Any) -> Any:
    """Return the rows of `part` whose user is `chosen`, in RecBole's order."""
    mask = chosen[part.inter_feat[part.uid_field].numpy()]
    return part.copy(part.inter_feat[mask])


def _met(dataset: Any, width: int) -> Pairs:
    """Return every item each user has met in any split."""
    rows = dataset.inter_feat
    users, items = rows[dataset.uid_field].numpy(), rows[dataset.iid_field].numpy()
    listed = dataset.iid_field + dataset.config["LIST_SUFFIX"]
    if listed in rows:  # a sequential row's target stands alone; the first item of a user only in the lists
        lengths = rows[dataset.item_list_length_field]
        # augmented rows list, but for that first item, the targets of other rows; ready-made rows stand alone
        telling = (lengths == 1 if dataset.config["benchmark_filename"] is None else lengths > 0).nonzero()[:, 0]
        items = np.r_[items, entries(rows[listed][telling], lengths[telling]).numpy()]
        users = np.r_[users, np.repeat(users[telling], lengths[telling])]
    return Pairs(users, items, width)
