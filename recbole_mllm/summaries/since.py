"""``--since``: which users have an interaction at or after a moment."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from math import isfinite
from typing import Any

import numpy as np

from recbole_mllm.common.errors import UserError
from recbole_mllm.data.splits import unit_of


def users_since(dataset: Any, since: str) -> set[str]:
    """Return the raw ids of the users with an interaction at or after `since`.

    RecBole holds times as float32, in steps of about a minute: so does the comparison, and nobody at that moment is
    missed, while some who were active up to a minute before are taken too.

    Args:
        dataset: RecBole's dataset, built.
        since: A number in the unit of the time column, or a date such as 2026-11-03 or 2026-11-03T18:00 (UTC where it
            names no zone).

    Raises:
        UserError: It is neither, the dataset has no times or none so late, or the column holds no moments.
    """
    field = dataset.time_field
    if field is None or field not in dataset.inter_feat:
        raise UserError("--since needs the times of interactions, which this dataset has not; leave it out")
    times = dataset.inter_feat[field].numpy().astype(np.float32)
    latest = float(times.max()) if len(times) else 0.0
    late = times >= np.float32(_moment(since, latest))
    if not late.any():
        raise UserError(f"no interaction is at or after --since {since}; the latest is at {latest:.0f}")
    owners = np.unique(dataset.inter_feat[dataset.uid_field].numpy()[late])
    return set(np.asarray(dataset.field2id_token[dataset.uid_field]).astype(str)[owners].tolist())


def _moment(since: str, latest: float) -> float:
    """Return `since` in the unit of a time column whose latest value is `latest`."""
    with suppress(ValueError):
        if isfinite(number := float(since)):
            return number
    try:
        date = datetime.fromisoformat(since)
    except ValueError:
        raise UserError(
            f"--since {since!r} is neither a number nor a date; write 2026-11-03, 2026-11-03T18:00 or a timestamp"
        ) from None
    unit = unit_of(latest)
    if unit is None:
        raise UserError(
            f"--since {since}: the time column holds no moments but ranks, up to {latest:.0f}; give a number of those"
        )
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() * unit
