"""The fine-tuning loss: next-token likelihood of the right answer, the head applied to the rows that count."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from recbole_mllm.mllm.encode import Encoded
from recbole_mllm.mllm.forward import Body


def answer_loss(
    body: Body, prompts: Sequence[Encoded], answers: Sequence[Sequence[int]], *, whole: bool = False
) -> Tensor:
    """Return the mean loss over rows of the mean loss over each row's labelled tokens.

    Args:
        body: The model.
        prompts: One row each; they end where the answer begins.
        answers: Tokens of the right answer of each row.
        whole: Label every token but image placeholders (the paper's eq. 2), not the answer alone. A prefix-LM sees
            its whole prompt at once, which leaves nothing to predict there: its answer alone is labelled.

    Returns:
        A scalar, float32.
    """
    rows = [Encoded((*p.ids, *a), p.images, len(a)) for p, a in zip(prompts, answers, strict=True)]
    states = body.hidden(rows, 0, [len(row.ids) for row in rows], None)
    where, targets, weights = [], [], []
    for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        first = 1 if whole and body.architecture.shares_prefix else len(row.ids) - len(answer)
        places = [t for t in range(first, len(row.ids)) if row.ids[t] != body.image_token_id]
        where += [(i, t - 1) for t in places]
        targets += [row.ids[t] for t in places]
        weights += [1 / len(places)] * len(places)
    index = torch.tensor(where, device=states.device)
    logits = body.logits(states[index[:, 0], index[:, 1]])
    losses = functional.cross_entropy(logits, torch.tensor(targets, device=states.device), reduction="none")
    return (losses * torch.tensor(weights, device=states.device)).sum() / len(rows)
