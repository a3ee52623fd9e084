"""Frozen candidates inside RecBole: an evaluation loader whose negatives no model, epoch or process can change.

RecBole's own sampler draws from numpy's global generator, which training consumes, and excludes only the target
(sampler.py:235,396,426). Here candidates are drawn once by raw id and laid into RecBole's loader.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recbole_mllm.data.sampling import hashes64, limited_users, tie_keys
from recbole_mllm.errors import UserError
from recbole_mllm.evaluation.allitems import AllItems, RankedBatches
from recbole_mllm.evaluation.draw import Pool, candidates_digest, draw_negatives
from recbole_mllm.evaluation.exchange import read
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

    Full ranking has no candidates to draw: its loader stays RecBole's, and says what is ranked (`allitems`); its digest
    stands for the rows, the items, and what each user's ranking leaves out.

    Raises:
        UserError: The mode is ``labeled``, a user leaves too few items, or ``candidates_file`` does not fit the split.
    """
    settings = EvaluationSettings.from_config(config)
    users, items = (np.asarray(dataset.field2id_token[f]).astype(str) for f in (dataset.uid_field, dataset.iid_field))
    lengths, parts = _lengths(config, dataset), [loader._dataset for loader in (train, valid, test)]
    owners = _owners(config, dataset, lengths, parts[1:])
    kept = limited_users(users, owners, settings.limit_users, settings.candidate_seed)
    met = _met(dataset, len(items), lengths)
    keys, hashes = tie_keys(users, items, settings.candidate_seed), hashes64(items, "item")
    given = read(Path(settings.candidates_file)) if settings.candidates_file else None

    def negatives_of(phase: str, mode: str, rows: UserRows, targets: Any, known: Any) -> Any:
        count = _count(mode)
        if given:
            given.refuse_others(phase, known, users)
            return given.negatives(phase, rows, targets, count, users, items)
        popular = _popularity(config, lengths, parts, len(items)) if mode.startswith("pop") else None
        pool = Pool.uniform(met.keys % met.width, items) if popular is None else Pool.popular(popular, items)
        return draw_negatives(pool, met, rows.users, rows.counts * count, users, phase, settings.candidate_seed)

    loaders, drawn = [train], {}
    for phase, loader, chosen, known in zip(("valid", "test"), (valid, test), kept, owners, strict=True):
        mode = str(config["eval_args"]["mode"][phase])
        if mode == "full":
            whole = _limited(config, loader, chosen, given and given.phases[phase])
            rows = whole._dataset.inter_feat
            every = AllItems(_occurring(met), met if settings.exclude_seen else None, keys, len(rows))
            whole.collate_fn = RankedBatches(whole.collate_fn, every)
            loaders.append(whole)
            owner, target = (rows[field].numpy() for field in (dataset.uid_field, dataset.iid_field))
            drawn[f"{phase} {every.name(hashes, loader.is_sequential)}"] = every.digested(users, owner, target, hashes)
            continue
        part = _of_users(loader._dataset, chosen)
        part.sort(by=part.uid_field, ascending=True)
        rows, targets = UserRows.of(part.inter_feat[part.uid_field].numpy()), part.inter_feat[part.iid_field].numpy()
        negatives = negatives_of(phase, mode, rows, targets, known)
        drawn[phase] = rows.digested(users, hashes[targets], hashes[negatives])
        loaders.append(FrozenEvalDataLoader(config, part, loader._sampler, rows, _count(mode), negatives, keys))
    dataset.candidates_digest = candidates_digest(drawn)
    if given and settings.limit_users is None:
        given.confirm(dataset.candidates_digest)
    dataset.evaluated_users = int(kept[1].sum())
    return loaders[0], loaders[1], loaders[2]


def _occurring(met: Pairs) -> Any:
    """Return ``[items]`` whether an item occurs in any interaction."""
    return np.bincount(met.keys % met.width, minlength=met.width) > 0


def _lengths(config: Any, dataset: Any) -> Any:
    """Return how many interactions each user has where a sequential model would be given fewer rows, else None.

    Leaving one out, RecBole gives a sequential model a row less for each user, as nothing precedes the first item
    (sequential_dataset.py:77-152): a user of one interaction is unknown there, one of two never tested, one of three
    never validated. The same users, and the same candidates, for every model is what they are frozen for, so general
    models are asked about no others.
    """
    listed = dataset.iid_field + config["LIST_SUFFIX"] in dataset.inter_feat
    if listed or "LS" not in (config["eval_args"]["split"] or {}) or config["benchmark_filename"]:
        return None
    return np.bincount(dataset.inter_feat[dataset.uid_field].numpy(), minlength=dataset.user_num)


def _owners(config: Any, dataset: Any, lengths: Any, parts: list[Any]) -> list[Any]:
    """Return the users of the rows of each of `parts` (validation, test) that every model has."""
    owners = [part.inter_feat[dataset.uid_field].numpy() for part in parts]
    if lengths is None:
        return owners
    least = (4 if config["eval_args"]["split"]["LS"] == "valid_and_test" else 3, 3)
    return [users[lengths[users] >= length] for users, length in zip(owners, least, strict=True)]


def _popularity(config: Any, lengths: Any, parts: list[Any], width: int) -> Any:
    """Return how often each item is trained on, as a sequential model counts it (parts: training, validation, test)."""
    if lengths is None:
        return training_counts(parts[0], 0, width)[0]
    both = config["eval_args"]["split"]["LS"] == "valid_and_test"
    trained = ((lengths >= 2), (lengths == 2) | ((lengths == 3) & both), (lengths == 2))
    counts = np.zeros(width, np.int64)
    for part, whose in zip(parts, trained, strict=True):
        kept = whose[part.inter_feat[part.uid_field].numpy()]
        counts += np.bincount(part.inter_feat[part.iid_field].numpy()[kept], minlength=width)
    return counts


def _count(mode: str) -> int:
    match = _MODE.fullmatch(mode)
    if match is None:
        raise UserError(
            f"eval_args.mode {mode!r} has no candidates to freeze; use uniN or popN, e.g. uni20, or full (a model by "
            "itself is also evaluated on labels, with frozen_candidates: false)"
        )
    return int(match.group(2))


def _limited(config: Any, loader: Any, chosen: Any, given: Any) -> Any:
    """Return a loader of the `chosen` users' rows, which is `loader` where those are all of its rows.

    A sequential model's batch counts rows (general_dataloader.py:246-249), and each becomes as many scores as there are
    items; it is lowered to what a memory holds.
    """
    if given:
        raise UserError("candidates_file has candidates for a phase whose eval_args.mode is full; use uniN")
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


def _met(dataset: Any, width: int, lengths: Any = None) -> Pairs:
    """Return every item each user has met in any split; users of one interaction are nobody's where `lengths` tell."""
    rows = dataset.inter_feat
    users, items = rows[dataset.uid_field].numpy(), rows[dataset.iid_field].numpy()
    if lengths is not None:
        users, items = users[lengths[users] >= 2], items[lengths[users] >= 2]
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
