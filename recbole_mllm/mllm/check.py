"""Check, once a model, that the fast ways of scoring agree with its own plain forward pass.

Families with a row in ``architectures`` are tested; any other may read its prompt in a way nobody here has thought of.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from recbole_mllm.mllm.encode import Encoded
from recbole_mllm.mllm.forward import Body
from recbole_mllm.mllm.plain import plain_logits

# fastest first. shared: common prefixes once; flat: batches of whole prompts; plain: its own call, one at a time
Way = Literal["shared", "flat", "plain"]
_TOLERANCE = {torch.float32: 1e-4}  # of the largest logit; half precision moves more by batching alone
_HALF = 5e-2
# What a model that knows nothing of our caches, features or positions may raise
UNSUITED = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


def told(error: Exception) -> str:
    """Return an error's name and first line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def way_to_score(
    body: Body, prompts: Sequence[Encoded], tokens: Sequence[int], score: Callable[[Sequence[Encoded], Way], Tensor]
) -> Way:
    """Return the fastest way whose scores of two short prompts are those of the plain forward pass."""
    if body.architecture.known:
        return "shared" if body.architecture.shares_prefix else "flat"
    # the shortest that shows an image, if any does; its twin says its last words again and again
    first = min(prompts, key=lambda p: (not p.images, len(p.ids)))
    pair = [first, Encoded((*first.ids, *first.ids[-3:] * 8), first.images)]
    own = torch.stack([plain_logits(body, prompt, tokens) for prompt in pair])
    allowed = _TOLERANCE.get(body.head_model.dtype, _HALF) * max(1.0, own.abs().max().item())
    ways: tuple[Way, ...] = ("shared", "flat")
    for way in ways:
        try:
            off = (score(pair, way) - own).abs().max().item()
        except UNSUITED as error:
            reason = told(error)
        else:
            if off <= allowed:
                return way
            reason = f"logits differ by {off:.2g}"
        family = body.config.model_type
        logging.getLogger().warning(
            f"{family}: {way} scoring disagrees with a plain forward pass ({reason}); going on without it"
        )
    return "plain"
