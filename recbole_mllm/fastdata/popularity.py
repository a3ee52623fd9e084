"""RecBole's table for drawing by popularity, in time linear in the number of items."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np


def build_alias_table(self: Any) -> None:
    """Set ``prob`` and ``alias`` (sampler/sampler.py:71-98), whose queues are lists that shift on each ``pop(0)``."""
    candidates = _candidates(self)
    shares = _counts(candidates)
    total = len(candidates)
    self.alias = dict.fromkeys(shares, -1)
    self.prob = {item: pow(count / total, self.alpha) for item, count in shares.items()}
    normal = sum(self.prob.values())
    self.prob = {item: share / normal * len(self.prob) for item, share in self.prob.items()}
    large = deque(item for item, share in self.prob.items() if share > 1)
    small = deque(item for item, share in self.prob.items() if share < 1)
    while large and small:
        rich, poor = large.popleft(), small.popleft()
        self.alias[poor] = rich
        self.prob[rich] = self.prob[rich] - (1 - self.prob[poor])
        if self.prob[rich] < 1:
            small.append(rich)
        elif self.prob[rich] > 1:
            large.append(rich)


def _candidates(sampler: Any) -> Any:
    """Return the sampler's ``_get_candidates_list``; where it only strings columns together, as one array."""
    from recbole.sampler.sampler import RepeatableSampler, Sampler

    lists = type(sampler)._get_candidates_list
    if lists is Sampler._get_candidates_list:
        parts = sampler.datasets
    elif lists is RepeatableSampler._get_candidates_list:
        parts = [sampler.dataset]
    else:
        return np.asarray(sampler._get_candidates_list())
    return np.concatenate([part.inter_feat[sampler.iid_field].numpy() for part in parts])


def _counts(candidates: Any) -> dict[Any, int]:
    """Return how often each candidate occurs, in the order in which they first appear, as ``Counter`` does."""
    found, first, count = np.unique(candidates, return_index=True, return_counts=True)
    order = np.argsort(first)
    return dict(zip(found[order].tolist(), count[order].tolist(), strict=True))
