"""The fine-tuning loss: next-token likelihood of the right answer, the head applied to the rows that count.

Rows of a batch whose prompts begin alike (the same item's image and title) compute that beginning once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from recbole_mllm.mllm.backbone import Backbone
from recbole_mllm.mllm.encoder import Encoded
from recbole_mllm.mllm.scoring import common_prefix, fork, input_key, scoring_mode, split_by_next

LEAST_GAIN = 256  # tokens a shared prefix must save to be worth a forward pass of its own


def make_examples(prompts: Sequence[Encoded], answers: Sequence[Sequence[int]]) -> list[Encoded]:
    """Return each prompt, which ends where the answer begins, with the tokens of its right answer behind it."""
    return [Encoded((*p.ids, *a), p.images, len(a)) for p, a in zip(prompts, answers, strict=True)]


def example_loss(body: Backbone, examples: Sequence[Encoded], *, whole: bool = False, share: bool = False) -> Tensor:
    """Return the mean loss over rows of the mean loss over each row's labelled tokens.

    Args:
        body: The model.
        examples: One row each, its right answer being its last tokens.
        whole: Label every token but image placeholders (the paper's eq. 2), not the answer alone. A prefix-LM sees
            its whole prompt at once, which leaves nothing to predict there: its answer alone is labelled.
        share: Compute what rows have in common once; the gradients are the same up to rounding.

    Returns:
        A scalar, float32.
    """
    prompts = [Encoded(example.ids[: -example.answer], example.images) for example in examples]
    answers = sorted({token for example in examples for token in example.ids[-example.answer :]})
    if scoring_mode(body, prompts, answers) == "plain":  # a family without a row is checked as it is to be scored
        return torch.stack([_plain_loss(body, example, whole) for example in examples]).mean()
    parts = groups(body, examples, share=share)
    losses = [_summed_loss(body, [examples[i] for i in part.rows], part.shared, whole) for part in parts]
    return torch.stack(losses).sum() / len(examples)


def _summed_loss(body: Backbone, examples: Sequence[Encoded], shared: int, whole: bool) -> Tensor:
    """Return the sum of the rows' losses, their first `shared` tokens being computed once.

    Keys and values of the shared tokens are part of the graph: each row's loss reaches them through its own view.
    """
    stops, parts, cache = [len(example.ids) for example in examples], list[Tensor](), None
    if shared:
        cache = body.new_cache()
        parts.append(body.hidden(examples[:1], 0, [shared], cache)[0])
        cache = fork(cache, len(examples))
    behind = body.hidden(examples, shared, stops, cache)
    states = torch.cat([*parts, behind.flatten(0, 1)])  # [shared + B * width, D]
    # what is predicted, at which state, with what weight; the shared part's own tokens are labelled by every row
    labels: dict[tuple[int, int], float] = defaultdict(float)
    for i, example in enumerate(examples):
        places = _labelled(body, example, whole)
        for t in places:
            state = t - 1 if t <= shared else t - 1 + i * behind.size(1)
            labels[state, example.ids[t]] += 1 / len(places)
    index, targets = torch.tensor(list(labels)).T
    logits = body.logits(states[index.to(states.device)])
    losses = functional.cross_entropy(logits, targets.to(logits.device), reduction="none")
    return (losses * torch.tensor(list(labels.values()), device=losses.device)).sum().to(body.device)


def _labelled(body: Backbone, example: Encoded, whole: bool) -> list[int]:
    ids = example.ids
    first = 1 if whole and body.architecture.shares_prefix else len(ids) - example.answer
    return [t for t in range(first, len(ids)) if ids[t] != body.image_token_id]


def _plain_loss(body: Backbone, example: Encoded, whole: bool) -> Tensor:
    """Return one row's mean loss by the model's own forward pass, for a family that no faster way is right for."""
    places = torch.tensor(_labelled(body, example, whole), device=body.device)
    targets = torch.tensor(example.ids, device=body.device)[places]
    return functional.cross_entropy(body.plain_logits(example)[places - 1], targets)


def micro_batches(
    body: Backbone, examples: Sequence[Encoded], size: int | None, *, share: bool = False
) -> list[list[int]]:
    """Cut a batch into parts that one backward pass each holds; every row is in exactly one.

    Rows of like length stand together, at most `size` of them (None: all). Rows that share a prefix stay together as
    long as they have no more tokens to compute than `size` rows of the batch's longest would have.
    """
    if size is None:
        return [list(range(len(examples)))]
    lengths = [len(example.ids) for example in examples]
    most, out = size * max(lengths), list[list[int]]()
    for group in groups(body, examples, share=share):
        part: list[int] = []
        tokens = group.shared
        for i in sorted(group.rows, key=lengths.__getitem__):
            own = lengths[i] - group.shared
            if part and (tokens + own > most if group.shared else len(part) == size):
                out.append(part)
                part, tokens = [], group.shared
            part.append(i)
            tokens += own
        out.append(part)
    return out


class SharedPrefix(NamedTuple):
    """Rows, by their places in the batch, whose first `shared` tokens are the same input; 0: nothing is shared."""

    rows: tuple[int, ...]
    shared: int


def can_share(body: Backbone) -> bool:
    """Return whether the model's forward pass can continue behind keys and values it has computed, with gradients.

    Gradient checkpointing computes layers again, without a cache; a prefix-LM reads its prompt in both directions; of a
    family without a row in the table nothing is known.
    """
    own = body.architecture
    return own.known and own.shares_prefix and not getattr(body.head_model, "is_activation_checkpointing", False)


def groups(body: Backbone, rows: Sequence[Encoded], *, share: bool = True) -> list[SharedPrefix]:
    """Partition `rows` such that shared prefixes save most; what shares nothing is one last group."""
    found: list[SharedPrefix] = []
    if share and can_share(body):
        keys = [input_key(body, row) for row in rows]
        _, found = _best(keys, sorted(range(len(rows)), key=keys.__getitem__), 0)
    together = {i for group in found for i in group.rows}
    alone = tuple(i for i in range(len(rows)) if i not in together)
    return [*found, *([SharedPrefix(alone, 0)] if alone else [])]


def _best(keys: Sequence[tuple[int, ...]], rows: Sequence[int], start: int) -> tuple[int, list[SharedPrefix]]:
    """Return the tokens saved, and how, among `rows` (sorted by key) that have their first `start` in common.

    Either all of them share what all have in common, or those that continue alike share more among themselves.
    """
    if len(rows) < 2:
        return 0, []
    common = common_prefix(keys, rows, start)
    # each row keeps a token of its own, as something must be computed for it
    shared = min(common, min(len(keys[i]) for i in rows) - 1)
    gain = shared * (len(rows) - 1)
    below, found = 0, list[SharedPrefix]()
    parts = split_by_next(keys, rows, common)
    for part in parts if len(parts) > 1 else ():
        saved, deeper = _best(keys, part, common)
        below, found = below + saved, found + deeper
    if gain > below and gain >= LEAST_GAIN:
        return gain, [SharedPrefix(tuple(rows), shared)]
    return below, found
