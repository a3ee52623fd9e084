"""Which rows of a batch share a prefix that is worth computing once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from recbole_mllm.mllm.encode import Encoded
from recbole_mllm.mllm.forward import Body
from recbole_mllm.mllm.scoring import common_prefix, input_key

_LEAST_GAIN = 256  # tokens a shared prefix must save to be worth a forward pass of its own


@dataclass(frozen=True, slots=True)
class Group:
    """Rows, by their places in the batch, whose first `shared` tokens are the same input; 0: nothing is shared."""

    rows: tuple[int, ...]
    shared: int


def can_share(body: Body) -> bool:
    """Return whether the model's forward pass can go on behind keys and values it has made, with gradients.

    Gradient checkpointing computes layers again, without a cache; a prefix-LM reads its prompt in both directions; of a
    family without a row in the table nothing is known.
    """
    own = body.architecture
    return own.known and own.shares_prefix and not getattr(body.head_model, "is_activation_checkpointing", False)


def groups(body: Body, rows: Sequence[Encoded]) -> list[Group]:
    """Partition `rows` such that shared prefixes save most; what shares nothing is one last group."""
    if not can_share(body):
        return [Group(tuple(range(len(rows))), 0)]
    keys = [input_key(body, row) for row in rows]
    _, found = _best(keys, sorted(range(len(rows)), key=keys.__getitem__), 0)
    together = {i for group in found for i in group.rows}
    alone = tuple(i for i in range(len(rows)) if i not in together)
    return [*found, *([Group(alone, 0)] if alone else [])]


def _best(keys: Sequence[tuple[int, ...]], rows: Sequence[int], start: int) -> tuple[int, list[Group]]:
    """Return the tokens saved, and how, among `rows` (sorted by key) that have their first `start` in common.

    Either all of them share what all have in common, or those that go on alike share more among themselves.
    """
    if len(rows) < 2:
        return 0, []
    common = common_prefix(keys[rows[0]], keys[rows[-1]], start)
    # each row keeps a token of its own, as something must be computed for it
    shared = min(common, min(len(keys[i]) for i in rows) - 1)
    gain = shared * (len(rows) - 1)
    below, found = 0, list[Group]()
    parts = [list(part) for _, part in groupby(rows, key=lambda i: keys[i][common : common + 1])]
    for part in parts if len(parts) > 1 else ():
        saved, deeper = _best(keys, part, common)
        below, found = below + saved, found + deeper
    if gain > below and gain >= _LEAST_GAIN:
        return gain, [Group(tuple(rows), shared)]
    return below, found
