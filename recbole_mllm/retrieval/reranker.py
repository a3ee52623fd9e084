"""The best items of a retriever's ranking, which the MLLM puts in another order, and the MLLM's share of the score."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_mllm.common import distributed
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.settings import EvaluationSettings, RankingSettings
from recbole_mllm.data.sampling import tie_keys
from recbole_mllm.evaluation.full_ranking import best_items
from recbole_mllm.retrieval.retriever import obtain

_STEP = 2.0**-20  # relative distance between placed scores: eight units of float32's last place


@dataclass(frozen=True, slots=True)
class Shortlist:
    """The heads of some rows' rankings.

    Args:
        scores: ``[B, items]`` float32 of the retriever, -inf for items that are not to be ranked.
        head: ``[B, M]`` the best items, best first and without ties; 0, the padding, where a row has fewer.
        count: How many of a row's first items are re-ranked, at most M.
    """

    scores: Tensor
    head: Any
    count: int

    @property
    def asked(self) -> Any:
        """``[B, K]`` the items to be re-ranked, 0 where a row has fewer."""
        return self.head[:, : self.count]

    def ranked(self, logodds: Any, share: float) -> Tensor:
        """Return ``[B, items]`` float32: re-ranked items first, then the retriever's order.

        Args:
            logodds: ``[B, K]`` of the items `asked` about; what stands at padding is not read.
            share: The MLLM's part of a re-ranked item's score, between 0 and 1.
        """
        asked = self.asked
        before = np.take_along_axis(self.scores.numpy(), asked, 1).astype(float)
        mixed = np.where(asked > 0, mixed_scores(logodds, before, asked > 0, share), -np.inf)
        order = np.argsort(-mixed, axis=1, kind="stable")  # what is equal keeps the retriever's order
        head = self.head.copy()
        head[:, : self.count] = np.take_along_axis(asked, order, 1)
        return _lifted(self.scores, torch.from_numpy(head))


def mixed_scores(logodds: Any, before: Any, real: Any, share: float) -> Any:
    """Return ``share * P(Yes) + (1 - share) * r``, r being a row's retriever scores brought to [0, 1]; all ``[B, K]``.

    A share of 1 gives the log-odds themselves, which do not tie where P(Yes) rounds to 0 or 1.
    """
    if share == 1:
        return logodds
    low = np.where(real, before, np.inf).min(1, keepdims=True, initial=np.inf)
    high = np.where(real, before, -np.inf).max(1, keepdims=True, initial=-np.inf)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        wide = np.where(real & (high > low), (before - low) / (high - low), 0.0)
        return share / (1 + np.exp(-logodds)) + (1 - share) * wide


class Reranker:
    """Says which items of a row the MLLM is asked about, and keeps the MLLM's share of their scores.

    Args:
        config: RecBole's, of this run.
        settings: The retriever and how much of its order is asked about.
        dataset: The run's training part.

    Attributes:
        is_brute: Whether every item is asked about.
        count: How many items of a row are asked about, at most.
        identity: The retriever's name and digest, None without one.
        train_s: What training the retriever took, in this run or in the one that left it; 0 for a given checkpoint.
    """

    def __init__(self, config: Any, settings: RankingSettings, dataset: Any) -> None:
        self.settings = settings
        self.is_brute = settings.full_sort == "brute"
        self.retriever = obtain(config, settings, dataset) if settings.retrieves else None
        self.identity = self.retriever.identity if self.retriever else None
        self.train_s = self.retriever.train_s if self.retriever else 0.0
        self._user, self._item, self._items = dataset.uid_field, dataset.iid_field, int(dataset.item_num)
        self._users, items = (np.asarray(dataset.field2id_token[f]).astype(str) for f in (self._user, self._item))
        self._numbers = dataset.field2token_id[self._item]
        evaluation = EvaluationSettings.from_config(config)
        self._keys = tie_keys(self._users, items, evaluation.candidate_seed)
        self._depth = max(config["topk"])
        self.count = self._items - 1 if self.is_brute else settings.top_k
        self._met = dataset.met if evaluation.exclude_seen else None
        self._share = None if settings.mllm_share == "auto" else float(settings.mllm_share)

    @property
    def share(self) -> float:
        """The MLLM's part of a re-ranked item's score, 0 to 1.

        Raises:
            UserError: It is to be chosen on validation, and has not been.
        """
        if self._share is None:
            raise UserError("fusion: auto is not chosen yet, as no validation has run; train first, or set a number")
        return self._share

    @share.setter
    def share(self, value: float) -> None:
        self._share = value

    def shortlist(self, rows: Any) -> Shortlist:
        """Return which items of each evaluation row the MLLM is asked about; the same rows give the same items."""
        if self.retriever is not None:
            scores = self.retriever.scores(rows)
        else:
            scores = torch.zeros(len(rows), self._items)
            scores[:, 0] = -torch.inf
        users = rows[self._user].cpu().numpy()
        if self._met is not None:  # the target may have been met before
            for row, (user, target) in enumerate(zip(users.tolist(), rows[self._item].tolist(), strict=True)):
                met = {self._numbers[item] for item in self._met[str(self._users[user])]} - {target}
                scores[row, list(met)] = -torch.inf
        count = min(self.count, self._items - 1)
        return Shortlist(scores, best_items(scores, users, max(count, self._depth), self._keys), count)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must say for its evaluation to be repeated."""
        return {"retriever": self.identity, "share": self._share}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a share that was chosen on validation, unless it was chosen for another retriever."""
        if self.settings.mllm_share != "auto" or state.get("share") is None:
            return
        if state.get("retriever") != self.identity:
            logging.getLogger().warning(
                f"fusion was chosen for the retriever {state.get('retriever')}, not for {self.identity}; choose again"
            )
            return
        self._share = float(state["share"])


def obtain_reranker(config: Any, dataset: Any) -> Reranker | None:
    """Return what re-ranks a retriever's best items, None where no phase ranks all items and no retriever is named.

    A retriever that is named beside drawn candidates says what MLLMMSR would do among all items; what `fusion` would
    choose on a full validation is then the MLLM alone.

    The retriever is trained, and written, by the main process alone; the others then find what it has left.
    """
    settings = RankingSettings.from_config(config)
    if "full" not in config["eval_args"]["mode"].values():
        if not settings.retrieves:
            return None
        settings = replace(settings, fusion=None) if settings.mllm_share == "auto" else settings
    return distributed.main_first(lambda: Reranker(config, settings, dataset))


def _lifted(scores: Tensor, head: Tensor) -> Tensor:
    """Return `scores` with the items of `head` lifted above all others, each above the next."""
    most = scores.max(1, keepdim=True).values.double()
    most = most.where(most > -torch.inf, 0.0)
    steps = torch.arange(head.shape[1], 0, -1) * _STEP
    lifted = torch.where(most != 0, most + steps * most.abs().clamp(min=1e-30), steps)
    out = scores.clone()
    rows, places = (head > 0).nonzero(as_tuple=True)
    out[rows, head[rows, places]] = lifted[rows, places].float()
    return out
