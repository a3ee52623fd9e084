"""Full ranking for a comparison: every model ranks the same items, ties are settled without labels, the best are kept.

RecBole leaves what a user has met out of a general model's ranking and not of a sequential one's
(general_dataloader.py:232, trainer.py:483-486), ranks items that only an ``.item`` file names, and orders equal scores
by internal id. Here one rule holds for all models where candidates are frozen and ``exclude_seen`` is true.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from recbole_mllm.data.sampling import mix64
from recbole_mllm.data.schema import ITEM, USER
from recbole_mllm.evaluation.wholerank import Ranked, rank_all
from recbole_mllm.fastdata.pairs import Pairs

DEEPEST = 50
"""How many of a row's best items are kept beside the target; fewer where there are very many rows."""

KEPT_PAIRS = 5_000_000


@dataclass(frozen=True, slots=True)
class AllItems:
    """What a full ranking ranks for each user.

    Args:
        pool: ``[items]`` whether the item occurs in an interaction of any split; no other is ranked.
        met: Every (user, item) of any split, which the user's rows leave out but for their own targets; None leaves
            out what RecBole leaves out.
        keys: ``tie_keys`` of RecBole's users and items.
        rows: How many rows the split has.
    """

    pool: Any
    met: Pairs | None
    keys: Callable[[Any, Any], Any]
    rows: int

    def depth(self, topk: int) -> int:
        """Return how many of a row's best items are kept: a few more than metrics read, `DEEPEST` where memory allows.

        All of them, for all users, would be the size of users times items.
        """
        return max(topk + 1, min(DEEPEST, KEPT_PAIRS // max(1, self.rows)))

    def digested(self, raw: Any, users: Any, targets: Any, hashes: Any) -> tuple[Any, Any, Any]:
        """Return what ``candidates_digest`` reads: each user's targets and, where they are left out, items met.

        Args:
            raw: The raw id of every internal user id.
            users: ``[rows]`` internal ids of the split's rows.
            targets: ``[rows]`` internal item ids.
            hashes: The hash of every internal item id.
        """
        asked = np.unique(users)
        owners, items = [users], [~hashes[targets]]
        if self.met is not None:
            owner, item = np.divmod(self.met.keys, self.met.width)
            kept = np.isin(owner, asked)
            owners.append(owner[kept])
            items.append(hashes[item[kept]])
        owner, item = np.concatenate(owners), np.concatenate(items)
        order = np.lexsort((item, owner))
        return raw[asked], np.unique(owner, return_counts=True)[1], item[order]

    def name(self, hashes: Any, sequential: bool) -> str:
        """Return a phase's name in the digest: which items are ranked, and by whose rule some are left out."""
        rule = "met" if self.met is not None else "sequential" if sequential else "general"
        return f"full {rule} {int(mix64(hashes[self.pool]).sum(dtype=np.uint64)):016x}"


class RankedBatch(tuple[Any, ...]):
    """A batch of RecBole's full evaluation that says what is ranked."""

    ranking: AllItems


class RankedBatches:
    """RecBole's collating function of a full evaluation, with `ranking` beside each batch."""

    def __init__(self, collate: Callable[[Any], Any], ranking: AllItems) -> None:
        self.collate, self.ranking = collate, ranking

    def __call__(self, index: Any) -> RankedBatch:
        """Return RecBole's (rows, history, row of each target, target)."""
        batch = RankedBatch(self.collate(index))
        batch.ranking = self.ranking
        return batch


def install(trainer_class: Any) -> None:
    """Make RecBole's trainer rank all items by `rank_all`, and keep the best of them where `score_log` is a list.

    Wraps ``Trainer._full_sort_batch_eval`` (trainer.py:463-486), between a model's scores and RecBole's collector.
    """
    stock = trainer_class._full_sort_batch_eval
    if hasattr(stock, "ranks_all"):
        return

    def batch_eval(self: Any, batched: Any) -> Any:
        interaction, scores, owner, targets = stock(self, batched)
        ranking = getattr(batched, "ranking", None)
        if ranking is None:
            return interaction, scores, owner, targets
        users = interaction[self.config["USER_ID_FIELD"]].cpu().numpy()
        rows, items = (torch.as_tensor(part).cpu().numpy() for part in (owner, targets))
        found = rank_all(scores, users, rows, items, ranking, ranking.depth(max(self.config["topk"])))
        _log(self, found, users, rows, items)
        return interaction, found.collected.to(scores.device), owner, targets

    # a mark on the function itself, which has no such attribute by its type
    batch_eval.ranks_all = True  # type: ignore[attr-defined]
    trainer_class._full_sort_batch_eval = batch_eval


def _log(trainer: Any, found: Ranked, users: Any, owner: Any, targets: Any) -> None:
    """Keep each row's best items and its targets: score, place (0 for the worst of ``among``) and an MLLM's answer."""
    log = getattr(trainer, "score_log", None)
    if log is None:
        return
    labels = torch.zeros(found.scores.shape, dtype=torch.int8)
    labels[owner, targets] = 1
    rows, columns = np.nonzero(found.head)
    items = found.head[rows, columns]
    beyond = ~(found.head[owner] == targets[:, None]).any(1)
    rows, columns = np.r_[rows, owner[beyond]], np.r_[columns, found.place[beyond]]
    items = np.r_[items, targets[beyond]]
    log.append(
        {
            USER: users[rows],
            ITEM: items,
            "label": labels[rows, items].numpy().astype(np.float32),
            "score": found.scores[rows, items].numpy(),
            "place": found.among[rows] - 1 - columns,
            "among": found.among[rows],
            "answer": _answers(trainer.model, found.scores.shape)[rows, items],
        }
    )


def _answers(model: Any, shape: Any) -> Any:
    """Return ``[B, items]`` the log-odds an MLLM has just answered with, NaN where it was not asked."""
    out = np.full(shape, np.nan, np.float32)
    if (answered := getattr(model, "answered", None)) is not None:
        items, values = answered
        rows, columns = np.nonzero(items)
        out[rows, items[rows, columns]] = values[rows, columns]
    return out
