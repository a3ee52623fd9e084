"""Which interactions a protocol trains on and holds out, and what each row's history is: index arithmetic, no files.

Leaving one out is RecBole's own split of ``X.inter`` and needs no rows here. `temporal` and `paper` give rows, each a
target and its place in the user's history: what stands before that place is all that the row may know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

import numpy as np

from recbole_mllm.common.errors import UserError
from recbole_mllm.data.sampling import hash64, hashes64

PARTS = ("train", "valid", "test")


@dataclass(frozen=True, slots=True)
class SplitSettings:
    """How interactions are split.

    Args:
        protocol: ``loo``, ``paper`` (users 8:1:1) or ``temporal`` (two moments).
        boundaries: The two moments, as times or as dates; None: such that `valid_share` and `test_share` of all
            interactions lie behind.
        target: Which of a user's interactions in a period, those with a history, is the target.
        max_list: How many items of its history a row of the temporal protocol lists, the latest ones.
        seed: Of the draw of users, and of random targets.
    """

    protocol: Literal["loo", "paper", "temporal"] = "loo"
    boundaries: tuple[float, float] | tuple[datetime, datetime] | None = None
    valid_share: float = 0.1
    test_share: float = 0.1
    target: Literal["last", "first", "random"] = "last"
    max_list: int = 100
    seed: int = 2024


class PartRows(NamedTuple):
    """The rows of one part: each target's row number among the interactions, and how many of its user precede it."""

    targets: Any
    positions: Any


@dataclass(frozen=True, slots=True)
class Splitting:
    """What `split` returns.

    Args:
        by_user: ``[N]`` row numbers of the interactions, each user's together and in order.
        starts: ``[users]`` where each user's begin in `by_user`.
        parts: The rows of each of `PARTS`.
        left_out: Rows of each part that have no earlier interaction, and are not there for that.
        moments: The two moments of the temporal protocol.
        training: How many interactions lie before the first moment: the first ones.
    """

    by_user: Any
    starts: Any
    parts: Mapping[str, PartRows]
    left_out: Mapping[str, int]
    moments: tuple[float, float] | None = None
    training: int = 0


def split(users: Any, times: Any, names: list[str], settings: SplitSettings) -> Splitting:
    """Split interactions that stand in exact order of time.

    Args:
        users: ``[N]`` indices into `names`.
        times: ``[N]`` exact times, non-decreasing; None where there are none: each user's order is known alone.
        names: Raw user ids.
        settings: The protocol and its numbers.

    Raises:
        UserError: There are too few users, no times, or nothing in one of the periods.
    """
    by_user = np.argsort(users, kind="stable")
    counts = np.bincount(users, minlength=len(names))
    starts = np.cumsum(counts) - counts
    if settings.protocol == "paper":
        return _by_users(by_user, starts, counts, names, settings.seed)
    positions = np.empty(len(users), np.int64)
    positions[by_user] = np.arange(len(users)) - starts[users[by_user]]
    moments = _moments(times, settings)
    first, second = (int(np.searchsorted(times, moment)) for moment in moments)
    bounds = {"train": (0, first), "valid": (first, second), "test": (second, len(users))}
    for part, (low, high) in bounds.items():
        if low == high:
            raise UserError(
                f"no interaction lies in the {part} period (moments {' and '.join(map(moment_text, moments))}, times "
                f"from {moment_text(times[0])} to {moment_text(times[-1])}); give other --boundaries or shares"
            )
    chosen = {part: np.arange(*bound) for part, bound in bounds.items()}
    for part in PARTS[1:]:
        chosen[part] = _targets(users, positions, *bounds[part], names, settings, part)
    rows = {part: PartRows(own[positions[own] > 0], positions[own][positions[own] > 0]) for part, own in chosen.items()}
    left_out = {part: int((positions[own] == 0).sum()) for part, own in chosen.items()}
    if empty := [part for part in PARTS if not len(rows[part].targets)]:
        raise UserError(
            f"no row is left for {' and '.join(empty)}, as nobody has an earlier interaction there (moments "
            f"{' and '.join(map(moment_text, moments))}); give other --boundaries or shares"
        )
    return Splitting(by_user, starts, rows, left_out, moments, first)


def unit_of(time: float) -> float | None:
    """Return how many units of its column a second has, if `time` can be a date of 1973 to 2128 in s, ms, µs or ns."""
    return next((unit for unit in (1.0, 1e3, 1e6, 1e9) if 1e8 <= time / unit < 5e9), None)


def utc(time: float) -> datetime | None:
    """Return a time as a date if it can be one; else None."""
    unit = unit_of(time)
    return datetime.fromtimestamp(time / unit, UTC) if unit else None


def moment_text(time: float) -> str:
    """Return a time as a number, behind its date if it can be one."""
    date = utc(time)
    return f"{date:%Y-%m-%d %H:%M:%S} UTC ({time:.15g})" if date else f"{time:.15g}"


def _moments(times: Any, settings: SplitSettings) -> tuple[float, float]:
    """Return the two moments: those given, else the times of the interactions behind which the shares lie."""
    if times is None:
        raise UserError(
            "a temporal split needs times that compare across users, and these interactions have none: their order is "
            "each user's own; use --protocol loo or paper"
        )
    if settings.boundaries is not None:
        unit = unit_of(times[-1])
        if unit is None and isinstance(settings.boundaries[0], datetime):
            raise UserError(
                f"--boundaries are dates, and the times hold none, up to {times[-1]:.15g}; give two of these numbers"
            )
        one, two = (at.timestamp() * (unit or 1) if isinstance(at, datetime) else at for at in settings.boundaries)
        return one, two
    count = len(times)
    shares = (settings.valid_share + settings.test_share, settings.test_share)
    places = [min(count - 1, max(0, round(count * (1 - share)))) for share in shares]
    first, second = (times[place].item() for place in places)
    return first, second


def _targets(
    users: Any, positions: Any, low: int, high: int, names: list[str], settings: SplitSettings, part: str
) -> Any:
    """Return the row number of one interaction in ``[low, high)`` of each user who has some, in order of time.

    A new user's very first interaction, which has no history, is chosen only where there is no other.
    """
    rows = low + np.argsort(users[low:high], kind="stable")
    rows = rows[(positions[rows] > 0) | (np.bincount(users[rows], minlength=len(names))[users[rows]] == 1)]
    owners, starts, counts = np.unique(users[rows], return_index=True, return_counts=True)
    place = {"first": np.zeros_like(counts), "last": counts - 1}.get(settings.target)
    if place is None:
        draws = hashes64([names[user] for user in owners.tolist()], "temporal", settings.seed, part)
        place = (draws % counts.astype(np.uint64)).astype(np.int64)
    return np.sort(rows[starts + place])


def _by_users(by_user: Any, starts: Any, counts: Any, names: list[str], seed: int) -> Splitting:
    """Split the users 8:1:1 by a seeded draw that knows the raw id alone; each has a row, whose target is the last."""
    known = np.flatnonzero(counts > 1)
    if len(known) < 10:
        raise UserError(f"{len(known)} users with a history cannot be split 8:1:1; use --protocol loo")
    ranked = np.array(sorted(known, key=lambda user: (hash64("split", seed, names[user]), names[user])))
    tenth = round(len(ranked) / 10)
    cut = len(ranked) - 2 * tenth
    parts = {}
    for part, own in zip(PARTS, np.split(ranked, [cut, cut + tenth]), strict=True):
        users = np.sort(own)
        parts[part] = PartRows(by_user[starts[users] + counts[users] - 1], counts[users] - 1)
    return Splitting(by_user, starts, parts, {"all": int((counts == 1).sum())})
