"""The items RecBole's samplers must not draw: looked up in one column, sets only where somebody asks for one."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch

from recbole_mllm.data.sampling import Pairs
from recbole_mllm.recbole_patches.hooks import replace, wrap

_ALL_MET = (
    "Some users have interacted with all items, which we can not sample negative items for them. "
    "Please set `user_inter_num_interval` to filter those users."
)


class UsedIds:
    """One phase's ``used_ids``: indexed by users it gives sets, as RecBole's array of sets does.

    Args:
        pairs: The pairs of all phases, to look up in.
        phase: The number of this one.
        user_num: How many users there are.
    """

    def __init__(self, pairs: Pairs, phase: int, user_num: int) -> None:
        self._pairs, self._phase, self._user_num = pairs, phase, user_num

    def __len__(self) -> int:
        return self._user_num

    def __getitem__(self, users: Any) -> Any:
        """Return the set of one user, or an array of the sets of many."""
        if users is None:  # FullSortEvalDataLoader's user before the first (general_dataloader.py:220), not looked at
            return self
        chosen = np.asarray(np.arange(self._user_num)[users])
        if chosen.ndim == 0:
            return self._pairs.items_of(int(chosen), self._phase)
        out = np.empty(chosen.size, dtype=object)
        out[:] = [self._pairs.items_of(user, self._phase) for user in chosen.flat]
        return out.reshape(chosen.shape)

    def contain(self, users: Any, items: Any) -> Any:
        """Return which of `items` their user has used."""
        return self._pairs.contain(users, items, self._phase)


def look_up_pairs(module: ModuleType) -> None:
    """Replace what makes and reads sets of used items in RecBole's samplers (sampler/sampler.py:142-262, :387-396)."""
    nothing = Pairs(np.empty(0, np.int64), np.empty(0, np.int64), 1)
    wrap(module.RepeatableSampler, "get_used_ids", lambda stock: lambda self: UsedIds(nothing, 0, self.user_num))

    @replace(module.Sampler)
    def get_used_ids(stock: Any, self: Any) -> dict[str, Any]:
        """Return ``{phase: UsedIds}``, or raise RecBole's ValueError where a user has met every item (:233-262)."""
        fields = self.uid_field, self.iid_field
        rows = [tuple(part.inter_feat[field].numpy() for field in fields) for part in self.datasets]
        phases = np.repeat(np.arange(len(rows), dtype=np.int8), [len(users) for users, _ in rows])
        users, items = (np.concatenate(column) for column in zip(*rows, strict=True))
        pairs = Pairs(users, items, self.item_num, phases)
        if pairs.most(self.user_num, len(rows)) + 1 == self.item_num:  # [PAD] is an item
            raise ValueError(_ALL_MET)
        return {phase: UsedIds(pairs, n, self.user_num) for n, phase in enumerate(self.phases)}

    @replace(module.AbstractSampler)
    def sample_by_key_ids(stock: Any, self: Any, key_ids: Any, num: int) -> Any:
        """Draw as sampler/sampler.py:128-175 does, number for number, and look all values up at once."""
        used = self.used_ids
        if not isinstance(used, UsedIds):
            return stock(self, key_ids, num)
        keys = np.tile(np.array(key_ids), num)
        if not len(keys) or keys.min() < -len(used) or keys.max() >= len(used):
            raise IndexError("no keys, or one beyond the used ids")
        keys = keys % len(used)
        values = np.zeros(len(keys), dtype=np.int64)
        check = np.arange(len(keys))
        while len(check):
            values[check] = self.sampling(len(check))
            check = check[used.contain(keys[check], values[check])]
        return torch.tensor(values, dtype=torch.long)
