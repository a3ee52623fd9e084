"""Frozen candidates inside RecBole: an evaluation loader whose negatives no model, epoch or process can change.

RecBole's own sampler draws from numpy's global generator, which training consumes, and excludes only the target
(sampler.py:235,396,426). Here candidates are drawn once by raw id and laid into RecBole's loader.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch

from recbole_mllm.data.sampling import hashes64, limited_users, tie_keys
from recbole_mllm.errors import UserError
from recbole_mllm.evaluation.draw import Pool, candidates_digest, draw_negatives
from recbole_mllm.evaluation.loader import FrozenEvalDataLoader, UserRows
from recbole_mllm.evaluation.protocol import training_counts
from recbole_mllm.fastdata.listcolumn import entries
from recbole_mllm.fastdata.pairs import Pairs
from recbole_mllm.settings import EvaluationSettings

_DENSE = 2**26  # scores a batch of a full ranking holds: a quarter of a gigabyte
_MODE = re.compile(r"(uni|pop)(\d+)")


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
    owners = [loader._dataset.inter_feat[dataset.uid_field].numpy() for loader in (valid, test)]
    kept = limited_users(users, owners, settings.limit_users, settings.candidate_seed)
    met = _met(dataset, len(items))
    keys, hashes = tie_keys(users, items, settings.candidate_seed), hashes64(items, "item")
    loaders, drawn = [train], {}
    for phase, loader, chosen in (("valid", valid, kept[0]), ("test", test, kept[1])):
        mode = str(config["eval_args"]["mode"][phase])
        if mode == "full":
            loaders.append(_limited(config, loader, chosen))
            continue
        part, count = _of_users(loader._dataset, chosen), _count(mode)
        part.sort(by=part.uid_field, ascending=True)
        rows = UserRows.of(part.inter_feat[part.uid_field].numpy())
        pool = _pool(mode, met, train, items)
        negatives = draw_negatives(pool, met, rows.users, rows.counts * count, users, phase, settings.candidate_seed)
        drawn[phase] = rows.digested(users, hashes[part.inter_feat[part.iid_field].numpy()], hashes[negatives])
        loaders.append(FrozenEvalDataLoader(config, part, loader._sampler, rows, count, negatives, keys))
    dataset.candidates_digest = candidates_digest(drawn)
    dataset.evaluated_users = int(kept[1].sum())
    return loaders[0], loaders[1], loaders[2]


def _count(mode: str) -> int:
    match = _MODE.fullmatch(mode)
    if match is None:
        raise UserError(f"eval_args.mode {mode!r} has no candidates to freeze; use uniN or popN, e.g. uni20, or full")
    return int(match.group(2))


def _pool(mode: str, met: Pairs, train: Any, items: Any) -> Pool:
    if mode.startswith("pop"):
        return Pool.popular(training_counts(train._dataset, 0, len(items))[0], items)
    return Pool.uniform(met.keys % met.width, items)


def _limited(config: Any, loader: Any, chosen: Any) -> Any:
    """Return a loader of the `chosen` users' rows, which is `loader` where those are all of its rows.

    A sequential model's batch counts rows (general_dataloader.py:246-249), and each becomes as many scores as there are
    items; it is lowered to what a memory holds.
    """
    part, size = _of_users(loader._dataset, chosen), config["eval_batch_size"]
    fitting = max(1, _DENSE // part.item_num) if loader.is_sequential else size
    if len(part) == len(loader._dataset) and size <= fitting:
        return loader
    config["eval_batch_size"] = min(size, fitting)
    try:
        return type(loader)(config, part, loader._sampler, shuffle=False)
    finally:
        config["eval_batch_size"] = size


def _of_users(part: Any, chosen: Any) -> Any:
    """Return the rows of `part` whose user is `chosen`, in RecBole's order."""
    mask = chosen[part.inter_feat[part.uid_field].numpy()]
    return part.copy(part.inter_feat[mask])


def _met(dataset: Any, width: int) -> Pairs:
    """Return every item each user has met in any split."""
    rows = dataset.inter_feat
    users, items = rows[dataset.uid_field].numpy(), rows[dataset.iid_field].numpy()
    listed = dataset.iid_field + dataset.config["LIST_SUFFIX"]
    if listed in rows:
        augmented = hasattr(dataset, "item_list_length_field") and dataset.config["benchmark_filename"] is None
        if augmented:  # a row's target stands alone, and only a user's first item is in no row but the lists
            lengths = rows[dataset.item_list_length_field]
            telling = (lengths == 1).nonzero()[:, 0]
            lengths = lengths[telling]
        else:  # ready-made rows list what no other row holds
            lengths = (rows[listed] != 0).sum(1)
            telling = torch.arange(len(lengths))
        items = np.r_[items, entries(rows[listed][telling], lengths).numpy()]
        users = np.r_[users, np.repeat(users[telling], lengths)]
    return Pairs(users, items, width)
