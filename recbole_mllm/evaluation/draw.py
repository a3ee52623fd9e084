"""Draw evaluation candidates by raw id: pure, seeded, the same for every model and process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from recbole_mllm.data.sampling import hash64
from recbole_mllm.errors import UserError

_BATCH = 64


@dataclass(frozen=True, slots=True)
class Pool:
    """The items candidates are drawn from: sorted raw ids, and their cumulative shares where these differ."""

    items: Sequence[str]
    members: frozenset[str]
    cumulative: np.ndarray[Any, Any] | None = None

    @classmethod
    def uniform(cls, items: Iterable[str]) -> Pool:
        """Every item alike."""
        kept = frozenset(items)
        return cls(sorted(kept), kept)

    @classmethod
    def popular(cls, counts: Mapping[str, int]) -> Pool:
        """Items in proportion to their training interactions; one without any is never drawn (RecBole's ``popN``)."""
        kept = sorted(item for item, count in counts.items() if count > 0)
        share = np.cumsum([counts[item] for item in kept], dtype=float)
        return cls(kept, frozenset(kept), share / share[-1])

    def draw(self, count: int, seen: Set[str], rng: np.random.Generator) -> list[str] | None:
        """Return `count` distinct items not in `seen`; None where there are not so many."""
        if len(self.items) - len(self.members & seen) < count:
            return None
        out: dict[str, None] = {}
        while len(out) < count:
            for index in self._indices(rng):
                item = self.items[index]
                if item not in seen and len(out) < count:
                    out[item] = None
        return list(out)

    def _indices(self, rng: np.random.Generator) -> list[int]:
        if self.cumulative is None:
            return [int(index) for index in rng.integers(0, len(self.items), _BATCH)]
        found: list[int] = np.searchsorted(self.cumulative, rng.random(_BATCH), side="right").tolist()
        return found


def draw_negatives(
    pool: Pool, targets: Mapping[str, Sequence[str]], seen: Mapping[str, Set[str]], count: int, phase: str, seed: int
) -> dict[str, list[str]]:
    """Return ``count * len(targets[user])`` distinct negatives of each user, none of which the user met in any split.

    Raises:
        UserError: A user has met so many items that fewer are left.
    """
    out = {}
    for user, own in targets.items():
        rng = np.random.default_rng(hash64("candidates", seed, phase, user))
        drawn = pool.draw(count * len(own), seen[user], rng)
        if drawn is None:
            raise UserError(
                f"user {user} leaves fewer than {count * len(own)} items as {phase} candidates; "
                f"lower the N of eval_args.mode uniN, or filter such users (user_inter_num_interval)"
            )
        out[user] = drawn
    return out


def candidates_digest(drawn: Mapping[str, Mapping[str, tuple[Sequence[str], Sequence[str]]]]) -> str:
    """Return the digest (16 hex digits) of ``{phase: {user: (targets, negatives)}}``, whatever the order of users."""
    digest = hashlib.sha256()
    for phase in sorted(drawn):
        for user in sorted(drawn[phase]):
            targets, negatives = drawn[phase][user]
            digest.update("\x1f".join([phase, user, *targets, "", *negatives, "\n"]).encode())
    return digest.hexdigest()[:16]
