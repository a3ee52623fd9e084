"""Full ranking for a comparison: every model ranks the same items, ties are settled without labels, the best are saved.

RecBole leaves what a user has met out of a general model's ranking and not of a sequential one's
(general_dataloader.py:232, trainer.py:483-486), ranks items that only an ``.item`` file names, and orders equal scores
by internal id. Here one rule holds for all models where candidates are frozen and ``exclude_seen`` is true.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.settings import EvaluationSettings
from recbole_mllm.data.histories import places_within
from recbole_mllm.data.sampling import Keys, Pairs, mix64, sample_users
from recbole_mllm.data.schema import ITEM, USER
from recbole_mllm.evaluation.metrics import record_scores
from recbole_mllm.recbole_patches.hooks import replace

DEEPEST = 50
"""How many of a row's best items are recorded beside the target; fewer where there are very many rows."""

KEPT_PAIRS = 5_000_000
DENSE = 2**26  # scores a batch of a full ranking holds: a quarter of a gigabyte
MOST_SCORES = 20_000_000  # of a full ranking beside drawn candidates; of more users, a sample is ranked
_COMPARED = 2**24  # scores held against targets at a time


@dataclass(frozen=True, slots=True)
class AllItems:
    """What a full ranking ranks for each user.

    Args:
        pool: ``[items]`` whether the item occurs in an interaction of any split; no other is ranked.
        met: Every (user, item) of any split, which the user's rows leave out but for their own targets; None leaves
            out what RecBole leaves out.
        keys: ``tie_keys`` of RecBole's users and items: of equal scores, the lower key comes first.
        rows: How many rows the split has.
    """

    pool: Any
    met: Pairs | None
    keys: Keys
    rows: int

    def depth(self, topk: int) -> int:
        """Return how many of a row's best items are recorded: a few more than metrics read, `DEEPEST` if memory allows.

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
        owner, item = users, ~hashes[targets]
        if self.met is not None:
            own, met = np.divmod(self.met.keys, self.met.width)
            inside = np.isin(own, asked)
            owner, item = np.r_[owner, own[inside]], np.r_[item, hashes[met[inside]]]
        order = np.lexsort((item, owner))
        return raw[asked], np.unique(owner, return_counts=True)[1], item[order]

    def name(self, hashes: Any, sequential: bool) -> str:
        """Return a phase's name in the digest: which items are ranked, and by whose rule some are left out."""
        rule = "met" if self.met is not None else "sequential" if sequential else "general"
        return f"full {rule} {int(mix64(hashes[self.pool]).sum(dtype=np.uint64)):016x}"


def loader_of_all_items(config: Any, drawn: Any) -> Any:
    """Return a loader that ranks all items for the users of `drawn`, whose candidates are frozen.

    Of very many users a seeded sample is asked, so that ranking them stays a matter of seconds.
    """
    from recbole.data.dataloader import FullSortEvalDataLoader
    from recbole.utils import ModelType

    part, users, items = drawn._dataset, drawn.rows.users, drawn._dataset.item_num
    most, seed = max(1, MOST_SCORES // items), EvaluationSettings.from_config(config).candidate_seed
    if len(users) > most:
        raw = np.asarray(part.field2id_token[part.uid_field]).astype(str)
        chosen = np.isin(raw, list(sample_users(raw[users].tolist(), most, seed)))
        part = part.copy(part.inter_feat[chosen[part.inter_feat[part.uid_field].numpy()]])
    size, sequential = config["eval_batch_size"], config["MODEL_TYPE"] == ModelType.SEQUENTIAL
    # a general model's batch counts scores, a sequential one's rows
    config["eval_batch_size"] = max(1, min(size, DENSE // items)) if sequential else DENSE
    try:
        loader = FullSortEvalDataLoader(config, part, drawn._sampler)
    finally:
        config["eval_batch_size"] = size
    loader.collate_fn = partial(with_ranking, loader.collate_fn, drawn.ranking)
    return loader


def with_ranking(collate: Callable[[Any], Any], ranking: AllItems, index: Any) -> Any:
    """Return the batch of RecBole's full evaluation (rows, history, row of each target, target), and `ranking`."""
    return (*collate(index), ranking)


@dataclass(frozen=True, slots=True)
class Ranked:
    """Some rows' rankings of all items.

    Args:
        scores: ``[B, items]`` as the model gave them, -inf for what is not ranked.
        collected: ``[B, items]`` float32 that RecBole's collector ranks: the head best first, above all others; every
            other item by how many of its row's targets it beats. No target is tied with anything.
        head: ``[B, M]`` the best items, best first; 0 where a row has fewer.
        place: ``[P]`` how many items rank above each target.
        among: ``[B]`` how many items are ranked.
    """

    scores: Tensor
    collected: Tensor
    head: Any
    place: Any
    among: Any


def rank_all_items(trainer_class: Any) -> None:
    """Make RecBole's trainer rank all items by `rank_all`, and record the best of them.

    Wraps ``Trainer._full_sort_batch_eval`` (trainer.py:463-486), between a model's scores and RecBole's collector.
    """

    @replace(trainer_class)
    def _full_sort_batch_eval(stock: Any, self: Any, batched: Any) -> Any:
        collected = stock(self, batched[:4])
        return collected if len(batched) == 4 else ranked_batch(self.config, batched[4], *collected)


def ranked_batch(
    config: Any, ranking: AllItems, rows: Any, scores: Tensor, owner: Any, targets: Any, answers: Any = None
) -> tuple[Any, Tensor, Any, Any]:
    """Return what RecBole's collector takes of a batch's ranking, after recording the best of it.

    Args:
        config: RecBole's.
        ranking: What is ranked.
        rows: The batch.
        scores: ``[B, items]`` of a model, padding and what RecBole leaves out at -inf.
        owner: ``[P]`` the row of each target.
        targets: ``[P]`` internal item ids.
        answers: ``[B, items]`` the log-odds of an MLLM, NaN where it was not asked; None for any other model.
    """
    users = rows[config["USER_ID_FIELD"]].cpu().numpy()
    at, items = (torch.as_tensor(part).cpu().numpy() for part in (owner, targets))
    found = rank_all(scores, users, at, items, ranking, ranking.depth(max(config["topk"])))
    record_scores(_best(found, users, at, items, answers))
    return rows, found.collected.to(scores.device), owner, targets


def _best(found: Ranked, users: Any, owner: Any, targets: Any, answers: Any) -> dict[str, Any]:
    """Return each row's best items and its targets: score, place (0 for the worst of ``among``), an MLLM's answer."""
    labels = torch.zeros(found.scores.shape, dtype=torch.int8)
    labels[owner, targets] = 1
    rows, columns = np.nonzero(found.head)
    items = found.head[rows, columns]
    beyond = ~(found.head[owner] == targets[:, None]).any(1)
    rows, columns = np.r_[rows, owner[beyond]], np.r_[columns, found.place[beyond]]
    items = np.r_[items, targets[beyond]]
    return {
        USER: users[rows],
        ITEM: items,
        "label": labels[rows, items].numpy().astype(np.float32),
        "score": found.scores[rows, items].numpy(),
        "place": found.among[rows] - 1 - columns,
        "among": found.among[rows],
        "answer": np.full(len(rows), np.nan, np.float32) if answers is None else answers[rows, items],
    }


def rank_all(scores: Tensor, users: Any, owner: Any, targets: Any, ranking: AllItems, depth: int) -> Ranked:
    """Rank each row's items without ties; of equal scores the one with the lower key comes first.

    Args:
        scores: ``[B, items]`` of a model, padding and what RecBole leaves out already at -inf.
        users: ``[B]`` internal ids.
        owner: ``[P]`` the row of each target.
        targets: ``[P]`` internal item ids.
        depth: How many of a row's best items are put in order.

    Raises:
        UserError: There are scores that are no numbers.
    """
    table = _left_out(scores.float().cpu().clone(), users, owner, targets, ranking)
    head = best_items(table, users, depth, ranking.keys)
    levels = torch.zeros_like(table)
    place = np.empty(len(targets), np.int64)
    step = max(1, _COMPARED // table.shape[1])
    for low in range(0, len(targets), step):
        part = slice(low, low + step)
        above = _above(table, users, owner[part], targets[part], ranking.keys)
        place[part] = above.sum(1).numpy()
        levels.index_add_(0, torch.from_numpy(owner[part]), above * 2.0)
    levels[owner, targets] += 1.0
    rows, columns = np.nonzero(head)
    lifts = torch.from_numpy(head.shape[1] - columns).to(levels)
    levels[rows, head[rows, columns]] = float(levels.max()) + lifts
    ranked = table > -torch.inf
    return Ranked(table, levels.where(ranked, -torch.inf), head, place, ranked.sum(1).numpy())


def best_items(scores: Tensor, users: Any, depth: int, keys: Keys) -> Any:
    """Return ``[B, M]`` the `depth` best items of each row, best first and without ties; 0 where a row has fewer.

    Args:
        scores: ``[B, items]`` float32 on the CPU; -inf for what is not to be ranked.
        users: ``[B]`` internal ids.
        depth: Down to which place; all items but the padding at most.
        keys: ``tie_keys`` of users and items.
    """
    reach = min(depth, scores.shape[1] - 1)
    bounds = torch.topk(scores, reach, dim=1).values[:, -1].numpy()
    head = np.zeros((len(scores), reach), np.int64)
    for row, (values, bound, user) in enumerate(zip(scores.numpy(), bounds, users, strict=True)):
        best = np.flatnonzero((values >= bound) & (values > -np.inf))
        order = np.lexsort((keys(np.full(len(best), user), best), -values[best]))[:reach]
        head[row, : len(order)] = best[order]
    return head


def _left_out(table: Tensor, users: Any, owner: Any, targets: Any, ranking: AllItems) -> Tensor:
    """Set to -inf, in place, what is not ranked; a score of -inf that a model gives is the worst of what is."""
    lost = int(torch.isnan(table).sum())
    if lost:
        raise UserError(f"the model scored {lost} items with NaN; it cannot be ranked")
    own = table[owner, targets]
    if ranking.met is not None:
        table.clamp_(min=torch.finfo(table.dtype).min)
        rows, items = _met(ranking.met, users)
        table[rows, items] = -torch.inf
    table[:, ~ranking.pool] = -torch.inf
    table[owner, targets] = own.clamp(min=torch.finfo(table.dtype).min)  # a target may have been met before
    return table


def _met(met: Pairs, users: Any) -> tuple[Any, Any]:
    """Return (row, item) of everything the rows' `users` have met."""
    start, end = (np.searchsorted(met.keys, (users + more) * np.int64(met.width)) for more in (0, 1))
    rows = np.repeat(np.arange(len(users)), end - start)
    return rows, met.keys[start[rows] + places_within(end - start)] % met.width


def _above(table: Tensor, users: Any, owner: Any, targets: Any, keys: Keys) -> Tensor:
    """Return ``[P, items]``: which items of its row rank above each target."""
    rows = table[owner]
    bound = rows[torch.arange(len(owner)), targets][:, None]
    above = rows > bound
    tied, equal = (rows == bound).nonzero(as_tuple=True)
    place, item = tied.numpy(), equal.numpy()
    user = users[owner[place]]
    above[tied, equal] = torch.from_numpy(keys(user, item) < keys(user, targets[place]))
    return above
