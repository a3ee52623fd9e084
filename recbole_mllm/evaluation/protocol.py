"""What a run was evaluated on, in words and in numbers, for its record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.settings import EvaluationSettings
from recbole_mllm.data.dataset import MLLMMSRDataset
from recbole_mllm.data.facts import Split, has_global_times, temporal_split
from recbole_mllm.data.schema import POSITION
from recbole_mllm.data.splits import moment_text
from recbole_mllm.evaluation.metrics import popular_head


def protocol_line(config: Any, users: int | None = None, phase: str | None = None) -> str:
    """Return the protocol in one line for people.

    Args:
        config: RecBole's.
        users: How many were evaluated; None = leave it out.
        phase: ``valid`` or ``test``; None = both, with both modes where they differ.
    """
    arguments, settings = config["eval_args"], EvaluationSettings.from_config(config)
    split = "benchmark files" if config["benchmark_filename"] else _split(arguments["split"])
    if (temporal := temporal_split(config)) is not None:
        first, second = map(moment_text, temporal["moments"])
        split = f"temporal split (trained before {first}, tested from {second})"
    sample = "a seeded sample of " if settings.limit_users else ""
    limit = "" if users is None else f", {sample}{users} users"
    mode = arguments["mode"]
    by_phase = mode if isinstance(mode, dict) else {"valid": mode, "test": mode}
    modes = list(dict.fromkeys(by_phase[name] for name in by_phase if phase in (None, name)))
    drawn = " / ".join(each for each in modes if each not in ("full", "labeled"))
    given = f"given as {Path(settings.candidates_file).name}" if settings.candidates_file else None
    parts = [f"candidates {drawn} ({given or f'seed {settings.candidate_seed}'})"] if drawn else []
    if "labeled" in modes:
        parts.append("the labelled interactions themselves")
    if "full" in modes:
        left_out = " but those the user has met" if settings.exclude_seen else ""
        parts.append(f"all items{left_out} ranked (ties by seed {settings.candidate_seed})")
    return f"{split}, order {arguments['order']}, {' / '.join(parts)}{limit}"


def _split(split: dict[str, Any]) -> str:
    (kind, how), *_ = split.items()
    return f"leave-one-out ({how})" if kind == "LS" else f"{kind} {how}"


def check_one_target(config: Any) -> None:
    """Refuse a split of RecBole's by shares, whose runs no leaderboard can compare.

    Raises:
        UserError: It holds out several targets a user, and other rows for each kind of model.
    """
    split = () if config["benchmark_filename"] else config["eval_args"]["split"] or ()
    if kind := next((kind for kind in ("RS", "TS") if kind in split), None):
        raise UserError(
            f"eval_args.split {kind} holds out several targets a user, and other rows for each kind of model, so that "
            "no leaderboard can compare them; split by time with `recbole-mllm split DATASET --protocol temporal --out "
            "DIR`, or leave one out (split: {LS: valid_and_test})"
        )


def future_share(dataset: Any, train: Any, test: Any) -> float | None:
    """Return the share of test targets with a later interaction in training; None where times do not compare.

    A random split's times are RecBole's float32 ones, in steps of about a minute.

    Args:
        dataset: RecBole's whole dataset.
        train: Its training part.
        test: Its test part.
    """
    config, field = dataset.config, dataset.time_field
    if temporal_split(config) is None and not has_global_times(Path(dataset.dataset_path), config["global_times"]):
        return None
    split: Split | None = dataset.facts.split(config) if dataset.facts is not None else None
    if split is not None:
        return split.future_share()
    if any(field not in part.inter_feat or not len(part) for part in (train, test)):
        return None
    return float((test.inter_feat[field] < train.inter_feat[field].max()).double().mean())


def user_columns(dataset: Any, train: Any, pairs: dict[str, Any], images: Any) -> dict[str, Any]:
    """Return one entry a user, in the order of ``np.unique`` user ids, of what slices are cut by.

    Args:
        dataset: RecBole's whole dataset.
        train: The training part.
        pairs: A `joined` log (internal ids).
        images: Raw ids of items with an image, or None where nothing is known of images.
    """
    users, items = (np.asarray(dataset.field2id_token[f]).astype(str) for f in (dataset.uid_field, dataset.iid_field))
    hit = pairs["label"] > 0
    owners, first = np.unique(pairs["user_id"][hit], return_index=True)
    targets = pairs["item_id"][hit][first]
    counts, lengths = training_counts(train, len(users), len(items))
    return {
        "user": users[owners],
        "item": items[targets],
        "train_count": counts[targets],
        "tail": ~popular_head(counts)[targets],
        "history_length": lengths[owners],
        "has_image": np.isin(items[targets], list(images)) if images is not None else np.zeros(len(targets), bool),
    }


def training_counts(train: Any, users: int, items: int) -> tuple[Any, Any]:
    """Return how often each item, and each user, occurs in training, a sequence's first item included.

    It is the split's, whatever part of it a model trains on, and the same for every model where the data decides it.
    """
    facts = train.facts
    if facts is not None and (split := facts.split(train.config)):
        owner, item, times = split.trained()
        counts = (np.bincount(who, times, n).astype(np.int64) for who, n in ((item, items), (owner, users)))
        return next(counts), next(counts)
    rows = train.whole_split if isinstance(train, MLLMMSRDataset) else train.inter_feat
    owner, item = rows[train.uid_field].numpy(), rows[train.iid_field].numpy()
    listed = train.iid_field + train.config["LIST_SUFFIX"]
    if listed in rows:  # a sequential row's target stands alone; the first item of a user is only in the lists
        first = rows[train.item_list_length_field].numpy() == 1
        if POSITION in rows:
            first &= rows[POSITION].numpy() == 1
        owner = np.r_[owner, owner[first]]
        item = np.r_[item, rows[listed][:, 0][torch.from_numpy(first)].numpy()]
    return np.bincount(item, minlength=items), np.bincount(owner, minlength=users)
