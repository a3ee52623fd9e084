"""Frozen candidates inside RecBole: an evaluation loader whose negatives no model, epoch or process can change.

RecBole's own sampler draws from numpy's global generator, which training consumes, and excludes only the target
(sampler.py:235,396,426). Here candidates are drawn once by raw id and laid into RecBole's loader.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from recbole.data.dataloader import NegSampleEvalDataLoader
from recbole.data.interaction import Interaction

from recbole_mllm.data.sampling import sample_users
from recbole_mllm.data.schema import TIE
from recbole_mllm.errors import UserError
from recbole_mllm.evaluation.draw import Pool, candidates_digest, draw_negatives
from recbole_mllm.evaluation.protocol import training_counts
from recbole_mllm.evaluation.ties import tie_keys
from recbole_mllm.settings import EvaluationSettings

_MODE = re.compile(r"(uni|pop)(\d+)")


class FrozenEvalDataLoader(NegSampleEvalDataLoader):  # type: ignore[misc]
    """RecBole's loader with given negatives, and a key beside each pair that breaks ties without looking at labels.

    Args:
        negatives: Internal item ids for each internal user id, as many for each of the user's rows.
        keys: ``tie_keys`` of RecBole's users and items.
    """

    def __init__(self, config: Any, dataset: Any, sampler: Any, negatives: dict[int, Any], keys: Any) -> None:
        self.negatives, self.keys = negatives, keys
        super().__init__(config, dataset, sampler, shuffle=False)

    def collate_fn(self, index: Sequence[int]) -> tuple[Interaction, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the users' pairs, positives first, as RecBole's loader does (general_dataloader.py:150-180)."""
        rows, items, owner, labels = [], [], [], []
        positive_u, positive_i = [], []
        targets = self._dataset.inter_feat[self.iid_field].numpy()
        for place, user in enumerate(self.uid_list[np.asarray(index)]):
            own = np.arange(self.uid2index[user].start, self.uid2index[user].stop)
            negatives = self.negatives[int(user)]
            rows.append(np.r_[own, np.repeat(own, len(negatives) // len(own))])
            items.append(np.r_[targets[own], negatives])
            labels.append(np.r_[np.ones(len(own)), np.zeros(len(negatives))])
            owner.append(np.full(len(own) + len(negatives), place))
            positive_u.append(np.full(len(own), place))
            positive_i.append(targets[own])
        pairs = self._pairs(np.concatenate(rows), np.concatenate(items), np.concatenate(labels))
        return (
            pairs,
            torch.from_numpy(np.concatenate(owner)),
            torch.from_numpy(np.concatenate(positive_u)),
            torch.from_numpy(np.concatenate(positive_i)),
        )

    def _pairs(self, rows: Any, items: Any, labels: Any) -> Interaction:
        used, back = np.unique(rows, return_inverse=True)
        # the item is replaced before joining, so that item features are the candidate's
        shown = self.transform(self._dataset, self._dataset.inter_feat[used])
        # RecBole's own indexing goes through Python lists (data/interaction.py:136-137)
        plain = Interaction({name: column[torch.from_numpy(back)] for name, column in shown.interaction.items()})
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
    seen = _seen(dataset, users, items)
    chosen = sample_users(
        users[np.unique(test._dataset.inter_feat[dataset.uid_field].numpy())],
        settings.limit_users,
        settings.candidate_seed,
    )
    ids = {token: i for i, token in enumerate(items)}
    loaders, drawn = {"train": train}, {}
    for phase, loader in (("valid", valid), ("test", test)):
        part = _of_users(loader._dataset, users, chosen)
        mode = str(config["eval_args"]["mode"][phase])
        if mode == "full":
            loaders[phase] = type(loader)(config, part, loader._sampler, shuffle=False)
            continue
        targets = _targets(part, users, items)
        negatives = draw_negatives(
            _pool(mode, seen, train, items), targets, seen, _count(mode), phase, settings.candidate_seed
        )
        drawn[phase] = {user: (targets[user], negatives[user]) for user in targets}
        where = {token: i for i, token in enumerate(users)}
        inner = {where[user]: np.array([ids[item] for item in found]) for user, found in negatives.items()}
        keys = tie_keys(users, items, settings.candidate_seed)
        loaders[phase] = FrozenEvalDataLoader(config, part, loader._sampler, inner, keys)
    dataset.candidates_digest = candidates_digest(drawn)
    dataset.evaluated_users = len(chosen)
    return loaders["train"], loaders["valid"], loaders["test"]


def _count(mode: str) -> int:
    match = _MODE.fullmatch(mode)
    if match is None:
        raise UserError(f"eval_args.mode {mode!r} has no candidates to freeze; use uniN or popN, e.g. uni20, or full")
    return int(match.group(2))


def _pool(mode: str, seen: dict[str, set[str]], train: Any, items: Any) -> Pool:
    if mode.startswith("pop"):
        counts, _ = training_counts(train._dataset, 0, len(items))
        return Pool.popular(dict(zip(items.tolist(), counts.tolist(), strict=True)))
    return Pool.uniform(item for own in seen.values() for item in own)


def _of_users(part: Any, users: Any, chosen: set[str]) -> Any:
    """Return the rows of `part` whose user is `chosen`, in RecBole's order."""
    mask = np.isin(users[part.inter_feat[part.uid_field].numpy()], list(chosen))
    return part.copy(part.inter_feat[torch.from_numpy(mask)])


def _targets(part: Any, users: Any, items: Any) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    part.sort(by=part.uid_field, ascending=True)
    pairs = zip(part.inter_feat[part.uid_field].tolist(), part.inter_feat[part.iid_field].tolist(), strict=True)
    for user, item in pairs:
        out.setdefault(str(users[user]), []).append(str(items[item]))
    return out


def _seen(dataset: Any, users: Any, items: Any) -> dict[str, set[str]]:
    """Return every raw item each raw user has met in any split."""
    rows = dataset.inter_feat
    pairs = [(rows[dataset.uid_field].numpy(), rows[dataset.iid_field].numpy())]
    listed = dataset.iid_field + dataset.config["LIST_SUFFIX"]
    if listed in rows:  # a sequential row's target stands alone; the first item of a user only in the lists
        lists = rows[listed].numpy()
        filled = lists > 0
        pairs.append((np.repeat(pairs[0][0], filled.sum(1)), lists[filled]))
    owner, met = (np.concatenate([pair[i] for pair in pairs]) for i in (0, 1))
    width = len(items)
    unique = np.unique(owner.astype(np.int64) * width + met)
    out: dict[str, set[str]] = {}
    for user, item in zip(users[unique // width].tolist(), items[unique % width].tolist(), strict=True):
        out.setdefault(user, set()).add(item)
    return out
