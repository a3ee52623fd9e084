"""RecBole's evaluation over candidates that stay as they were drawn: the loader, and a ranking without ties.

RecBole lays positives first (general_dataloader.py:160) and topk keeps an order of its own among equal scores, so ties
would be settled by where the answer happens to stand. Here the loader gives each pair a key that knows the pair and the
seed but not the label, and equal scores are ordered by it: a constant scorer is at chance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from logging import getLogger
from typing import Any

import numpy as np
import torch
from recbole.data.dataloader import NegSampleEvalDataLoader
from recbole.data.interaction import Interaction
from recbole.utils import InputType

from recbole_mllm.common.errors import UserError
from recbole_mllm.data.dataset import MLLMMSRDataset
from recbole_mllm.data.histories import places_within
from recbole_mllm.data.schema import HISTORY_NUMBER, ITEM, POSITION, TIE, USER
from recbole_mllm.evaluation.full_ranking import AllItems
from recbole_mllm.evaluation.metrics import record_scores
from recbole_mllm.recbole_patches.hooks import replace, wrap


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
        place = places_within(lengths)
        out = np.empty(len(place), np.uint64)
        positive = place < np.repeat(self.counts, lengths)
        out[positive], out[~positive] = ~targets, negatives
        return raw[self.users], lengths, out


def refuse_users_without_rows(case_study: Any) -> None:
    """Let ``full_sort_topk`` and ``full_sort_scores`` name users of whom MLLMMSR has no row or several.

    RecBole returns as many lists as there are rows, so that users and lists would not match (case_study.py:57-61).
    """

    def make(stock: Callable[..., Any]) -> Callable[..., Any]:
        def full_sort_scores(uid_series: Any, model: Any, test_data: Any, device: Any = None) -> Any:
            rows = test_data.dataset
            if isinstance(rows, MLLMMSRDataset):
                own = rows.inter_feat[rows.uid_field].tolist()
                for user in np.asarray(uid_series).tolist():
                    if not 0 <= user < rows.user_num:
                        raise UserError(f"there is no user of internal id {user}; dataset.token2id gives ids")
                    if (found := own.count(user)) != 1:
                        raise UserError(
                            f"user {rows.id2token(rows.uid_field, user)} has {found or 'no'} row{'s' * (found > 1)} in "
                            "the split that was given, and a ranking needs one; leave such users out (too short a "
                            "history has no test row, and limit_users leaves users out)"
                        )
            return stock(uid_series, model, test_data, device)

        return full_sort_scores

    wrap(case_study, "full_sort_scores", make)


class FrozenEvalDataLoader(NegSampleEvalDataLoader):  # type: ignore[misc]
    """RecBole's loader with given negatives, and a key beside each pair that breaks ties without looking at labels.

    Args:
        rows: Whose evaluation rows stand where in `dataset`, which is sorted by user.
        count: Negatives of each row.
        negatives: ``[rows * count]`` internal item ids, one user after the other.
        ranking: What a full ranking of the same rows ranks (`loader_of_all_items`), with the keys that break ties.
    """

    def __init__(
        self, config: Any, dataset: Any, sampler: Any, rows: UserRows, count: int, negatives: Any, ranking: AllItems
    ) -> None:
        self.rows, self.count, self.negatives, self.ranking = rows, count, negatives, ranking
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

    def every_pair(self) -> Interaction:
        """Return who is asked about what in the whole split: item, and the row's history and position, unjoined."""
        rows = self._dataset.inter_feat
        own = torch.arange(len(rows))
        place = torch.cat([own, own.repeat_interleave(self.count)])
        items = torch.cat([rows[self.iid_field], torch.from_numpy(self.negatives)])
        return Interaction({name: rows[name][place] for name in (HISTORY_NUMBER, POSITION)} | {self.iid_field: items})

    def collate_fn(self, index: Sequence[int]) -> tuple[Interaction, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the users' pairs, positives first, as RecBole's loader does (general_dataloader.py:150-180)."""
        starts, own = self.rows.starts[np.asarray(index)], self.rows.counts[np.asarray(index)]
        sizes = own * (1 + self.count)
        owner = np.repeat(np.arange(len(sizes)), sizes)
        place = places_within(sizes)
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
        keys = self.ranking.keys(users, items)
        extra = {self.label_field: torch.from_numpy(labels).float(), TIE: torch.from_numpy(keys)}
        pairs.update(Interaction(extra))
        return pairs


def ranks(owner: Any, scores: Any, keys: Any) -> Any:
    """Return the place of each pair among its owner's pairs, 0 for the worst; equal scores are ordered by key.

    Args:
        owner: ``[B]`` whose pair it is, non-decreasing.
        scores: ``[B]`` float.
        keys: ``[B]`` int.
    """
    order = np.lexsort((keys, scores, owner))
    starts = np.searchsorted(owner, owner[order], side="left")
    out = np.empty(len(owner), dtype=np.int64)
    out[order] = np.arange(len(owner)) - starts
    return out


def rank_without_ties(trainer_class: Any) -> None:
    """Make RecBole's trainer rank frozen candidates by score, then by the loader's keys, and record raw scores.

    Wraps ``Trainer._neg_sample_batch_eval`` (trainer.py:505-524), between a model's scores and RecBole's collector.
    """

    @replace(trainer_class)
    def _neg_sample_batch_eval(stock: Any, self: Any, batched: Any) -> Any:
        interaction, scores, positive_u, positive_i = stock(self, batched)
        pairs, owner = batched[0], batched[1]
        if TIE not in pairs or scores.dim() != 2:
            return interaction, scores, positive_u, positive_i
        config = self.config
        fields = {USER: config["USER_ID_FIELD"], ITEM: config["ITEM_ID_FIELD"], "label": config["LABEL_FIELD"]}
        items = pairs[fields[ITEM]]
        raw = scores[owner, items].float().cpu()
        if lost := int(torch.isnan(raw).sum()):
            raise UserError(f"{config['model']} scored {lost} pairs with NaN; it cannot be ranked")
        place = ranks(owner.numpy(), raw.numpy(), pairs[TIE].cpu().numpy())
        scores[owner, items] = torch.from_numpy(place).to(scores)
        columns = {name: pairs[field].cpu().numpy() for name, field in fields.items()}
        record_scores(columns | {"score": raw.numpy(), "place": place})
        return interaction, scores, positive_u, positive_i
