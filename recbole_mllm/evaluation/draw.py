"""Draw evaluation candidates by raw id: pure, seeded, the same for every model and process.

A user's proposals are a stream of numbers that depends on the raw user id, the seed and the phase alone; the
candidates are the first distinct ones the user has not met. Items are numbered by the order of their raw ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from recbole_mllm.data.sampling import hashes64, mix64
from recbole_mllm.errors import UserError
from recbole_mllm.fastdata.pairs import Pairs

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_CHUNK = 1 << 20  # proposals held at a time


@dataclass(frozen=True, slots=True)
class Pool:
    """The items candidates are drawn from.

    Args:
        items: ``[P]`` internal ids in the order of their raw ids.
        weights: ``[P]`` what each item's chance is proportional to.
        cumulative: Their cumulative shares; None where all are alike.
    """

    items: Any
    weights: Any
    cumulative: Any = None

    @classmethod
    def uniform(cls, items: Any, raw: Any) -> Pool:
        """The distinct internal ids `items`, all alike; `raw` holds the raw id of every internal id."""
        kept = np.flatnonzero(np.bincount(items, minlength=1))
        kept = kept[np.argsort(raw[kept], kind="stable")]
        return cls(kept, np.ones(len(kept)))

    @classmethod
    def popular(cls, counts: Any, raw: Any) -> Pool:
        """Items in proportion to their training interactions; one without any is never drawn (RecBole's ``popN``)."""
        even = cls.uniform(np.flatnonzero(counts), raw)
        weights = counts[even.items].astype(float)
        share = np.cumsum(weights)
        return cls(even.items, weights, share / share[-1:])

    def proposals(self, keys: Any, count: int) -> Any:
        """Return the first `count` proposals ``[U, count]``, internal ids, of the users with stream `keys` ``[U]``."""
        steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
        chance = _unit(mix64(keys[:, None] + steps))
        if self.cumulative is None:
            return self.items[(chance * len(self.items)).astype(np.int64)]
        return self.items[np.searchsorted(self.cumulative, chance, side="right")]


def _unit(bits: Any) -> Any:
    """Return 64 random bits as numbers in [0, 1)."""
    return (bits >> np.uint64(11)) * 2.0**-53


def draw_negatives(pool: Pool, met: Pairs, users: Any, wanted: Any, raw: Any, phase: str, seed: int) -> Any:
    """Return ``wanted[i]`` distinct items for each of `users` ``[U]``, one user after the other, none the user has met.

    Args:
        pool: What to draw from.
        met: Every (user, item) of any split.
        users: ``[U]`` distinct internal ids.
        wanted: ``[U]`` how many each user needs.
        raw: The raw id of every internal user id.
        phase: ``valid`` or ``test``.
        seed: Of the candidates.

    Raises:
        UserError: A user has met so many items that fewer are left.
    """
    _enough_left(pool, met, users, wanted, raw, phase)
    keys = hashes64(raw[users], "candidates", seed, phase)
    out = np.empty(int(wanted.sum()), np.int64)
    ends = np.cumsum(wanted)
    for count in np.unique(wanted).tolist():
        for chosen in _chunks(np.flatnonzero(wanted == count), _first_look(count)):
            places = (ends[chosen] - count)[:, None] + np.arange(count)
            out[places] = _draw(pool, met, users[chosen], keys[chosen], count)
    return out


def _enough_left(pool: Pool, met: Pairs, users: Any, wanted: Any, raw: Any, phase: str) -> None:
    inside = np.zeros(met.width, bool)
    inside[pool.items] = True
    owner, item = np.divmod(met.keys, met.width)
    used = np.bincount(owner[inside[item]], minlength=len(raw))[users]
    short = np.flatnonzero(len(pool.items) - used < wanted)
    if len(short):
        user, count = raw[users[short[0]]], int(wanted[short[0]])
        raise UserError(
            f"user {user} leaves fewer than {count} items as {phase} candidates; "
            f"lower the N of eval_args.mode uniN, or filter such users (user_inter_num_interval)"
        )


def _first_look(count: int) -> int:
    """Return how many proposals are looked at first; a matter of speed alone."""
    return count + count // 4 + 4


def _last_look(count: int) -> int:
    """Return after how many proposals a stream ends, and what it lacks is raced for."""
    return 16 * count + 256


def _chunks(places: Any, width: int) -> Iterator[Any]:
    step = max(1, _CHUNK // width)
    return (places[low : low + step] for low in range(0, len(places), step))


def _draw(pool: Pool, met: Pairs, users: Any, keys: Any, count: int) -> Any:
    """Return ``[U, count]``: the first distinct unseen proposals of each user, and what a race adds to too few."""
    out = np.empty((len(users), count), np.int64)
    due = np.arange(len(users))
    for look in (_first_look(count), _last_look(count)):
        short = []
        for chosen in _chunks(due, look):
            proposals = pool.proposals(keys[chosen], look)
            good = _first_of_each(proposals) & ~met.contain(users[chosen][:, None], proposals)
            number = good.cumsum(1)
            done = number[:, -1] >= count
            out[chosen[done]] = proposals[done][(good & (number <= count))[done]].reshape(-1, count)
            short.append(chosen[~done])
        due = np.concatenate(short) if short else due[:0]
    for i in due:
        proposals = pool.proposals(keys[i : i + 1], _last_look(count))
        found = proposals[_first_of_each(proposals) & ~met.contain(users[i], proposals)]
        out[i] = np.r_[found, _race(pool, met, users[i], keys[i], found, count)]
    return out


def _first_of_each(rows: Any) -> Any:
    """Return, for ``[U, T]`` ids, which stand in their row for the first time."""
    ordered = np.sort(rows, axis=1)
    repeated = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(1))
    out = np.ones(rows.shape, bool)
    order = np.argsort(rows[repeated], axis=1, kind="stable")
    again = np.take_along_axis(rows[repeated], order, 1)
    new = np.ones(again.shape, bool)
    new[:, 1:] = again[:, 1:] != again[:, :-1]
    part = np.empty(again.shape, bool)
    np.put_along_axis(part, order, new, 1)
    out[repeated] = part
    return out


def _race(pool: Pool, met: Pairs, user: Any, key: Any, found: Any, count: int) -> Any:
    """Return what a user still lacks: the first to arrive of the items left, each at its own rate.

    Exponential arrivals have the law of drawing on and on and leaving out what was drawn before, in one pass.
    """
    left = ~met.contain(user, pool.items) & ~np.isin(pool.items, found)
    steps = (_last_look(count) + 1 + np.arange(len(pool.items))).astype(np.uint64) * _GOLDEN
    arrival = -np.log1p(-_unit(mix64(key + steps[left]))) / pool.weights[left]
    return pool.items[left][np.argsort(arrival, kind="stable")[: count - len(found)]]


def candidates_digest(drawn: dict[str, tuple[Any, Any, Any]]) -> str:
    """Return the digest (16 hex digits) of what was drawn, whatever the order of users and the numbering of ids.

    Args:
        drawn: For each phase raw user ids ``[U]``, and each user's targets and negatives as one row of item hashes:
            lengths ``[U]`` and the hashes ``[sum]``, one user after the other.
    """
    import hashlib

    digest = hashlib.sha256()
    for phase in sorted(drawn):
        users, lengths, hashes = drawn[phase]
        own = hashes64(users, "digest", phase)
        place = np.arange(len(hashes)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        parts = mix64(hashes ^ mix64(np.repeat(own, lengths) + (place + 1).astype(np.uint64) * _GOLDEN))
        whole = np.add.reduceat(parts, np.cumsum(lengths) - lengths) if len(users) else parts
        digest.update(phase.encode() + np.sort(mix64(whole ^ own)).astype(">u8").tobytes())
    return digest.hexdigest()[:16]
