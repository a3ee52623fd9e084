"""Datasets record what candidates are drawn from, and stand by exact time: RecBole's own times are float32."""

from __future__ import annotations

from logging import getLogger
from typing import Any

import numpy as np
import torch

from recbole_mllm.data.facts import Facts, facts_of, wants_exact_order
from recbole_mllm.recbole_patches.hooks import replace


def record_facts(module: Any) -> None:
    """Let RecBole's ``Dataset`` keep its `facts`, and sort by exact time where `wants_exact_order` (dataset.py:1796).

    RecBole's other sorts are stable, and by a time that is rounded but never reversed: they leave that order alone.
    """

    @replace(module.Dataset)
    def _set_label_by_threshold(stock: Any, self: Any) -> None:  # the first step after missing values are filled in
        self.facts = facts_of(self)
        stock(self)

    @replace(module.Dataset)
    def sort(stock: Any, self: Any, by: Any, ascending: Any = True) -> None:
        order = _exact_order(self, by) if ascending is True and wants_exact_order(self) else None
        if order is None:
            stock(self, by, ascending)
        else:
            self.inter_feat._reindex(torch.from_numpy(order.astype(np.int64)))

    @replace(module.Dataset)
    def _remove_duplication(stock: Any, self: Any) -> None:
        keep, frame = self.config["rm_dup_inter"], self.inter_feat
        if keep is None or self.time_field not in frame or not wants_exact_order(self):
            stock(self)
            return
        # RecBole's sort is not stable (dataset.py:853), and leaves equal times in an order of its own
        ordered = frame.sort_values(by=[self.time_field], kind="stable")
        kept = ordered.drop_duplicates(subset=[self.uid_field, self.iid_field], keep=keep)
        self.inter_feat = kept.sort_index()

    module.Dataset.exact_order, module.Dataset.facts = False, None


def _exact_order(dataset: Any, by: Any) -> Any:
    """Return the order in which the rows are to stand that are asked for by time, or by user and time; else None.

    They are the rows of `facts`, or those that augmentation has left of them: all but each user's first. These stand by
    user, and RecBole leaves equal times as they stand: so do we, or training batches would not be RecBole's own.
    """
    facts, rows = dataset.facts, dataset.inter_feat
    by_time, by_user = by in (dataset.time_field, [dataset.time_field]), by == [dataset.uid_field, dataset.time_field]
    if facts is None or facts.order is None or not (by_time or by_user):
        return None
    users, items = (rows[field].numpy() for field in (dataset.uid_field, dataset.iid_field))
    if np.array_equal(users, facts.users) and np.array_equal(items, facts.items):
        return facts.order if by_time else facts.by_user()
    own = facts.by_user()
    own = own[1:][facts.users[own][1:] == facts.users[own][:-1]]
    if by_user or not np.array_equal(users, facts.users[own]) or not np.array_equal(items, facts.items[own]):
        return None
    return np.argsort(facts.moments[own], kind="stable")


def log_order(dataset: Any) -> None:
    """Say in the log how RecBole alone would have ordered a dataset, and which of its times cannot be."""
    facts: Facts | None = dataset.facts
    if facts is None or not wants_exact_order(dataset):
        return
    log = getLogger()
    if facts.reordered and dataset.config["eval_args"]["order"] == "TO":
        users = len(np.unique(facts.users))
        log.info(
            f"order: by exact time, then place in the file; RecBole alone, whose times are float32, would have put the "
            f"items of {facts.reordered} of {users} users in another order"
        )
    early, late = facts.impossible
    if early or late:
        log.info(
            f"times: {early} of {len(facts.users)} interactions lie at or before 1970, {late} after tomorrow; they "
            "stand where their time says, first or last"
        )
