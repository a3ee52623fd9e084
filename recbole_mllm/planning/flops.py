"""Floating-point operations of passes, from a model's anatomy: two a weight and token, and those of attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from recbole_mllm.mllm.anatomy import Anatomy
from recbole_mllm.mllm.passes import Pass


def read_flops(anatomy: Anatomy, passes: Iterable[Pass]) -> float:
    """Return the operations of the decoder's layers over `passes`, padding included."""
    return sum(linear_flops(anatomy, p) + attention_flops(anatomy, p) for p in passes)


def linear_flops(anatomy: Anatomy, one: Pass) -> float:
    """Return the operations of the decoder's linear layers."""
    return 2.0 * anatomy.language.linear * one.rows * one.width


def attention_flops(anatomy: Anatomy, one: Pass) -> float:
    """Return the operations of attention: two products of each query with all keys and values, masked ones included."""
    return 4.0 * anatomy.layers * anatomy.queries * one.rows * one.width * (one.before + one.width)


def decode_flops(anatomy: Anatomy, prompt: int, new: float) -> float:
    """Return the operations of writing `new` tokens behind `prompt`, the first of which reading has made."""
    steps = max(0.0, new - 1)
    attended = steps * (prompt + (steps + 1) / 2)
    return 2.0 * anatomy.language.linear * steps + 4.0 * anatomy.layers * anatomy.queries * attended


def head_flops(anatomy: Anatomy, tokens: float) -> float:
    """Return the operations of the logits of `tokens` positions, over the whole vocabulary."""
    return 2.0 * anatomy.head * tokens


def image_flops(anatomy: Anatomy, tensors: Mapping[str, Any], tokens: int) -> float:
    """Return the operations of one image in tower and projector; it becomes `tokens` tokens.

    A tower's attention is taken to reach over a whole tile, which is an upper bound where it has windows.
    """
    patches, tiles = anatomy.patches(tensors)
    if not patches:
        return 0.0
    tower = 2.0 * anatomy.vision.linear * patches
    attended = 4.0 * anatomy.vision_layers * anatomy.vision_width * patches * (patches / tiles)
    return tower + attended + 2.0 * anatomy.projector.linear * tokens


def backward_flops(anatomy: Anatomy, passes: Iterable[Pass], trained: int, *, whole: bool, again: bool) -> float:
    """Return the operations on the way back through the decoder's layers.

    Args:
        anatomy: The model's.
        passes: The forward passes.
        trained: Trained parameters, whose own gradients are computed.
        whole: Whether they are the model's own weights rather than an adapter's beside them.
        again: Whether layers are computed again (gradient checkpointing).
    """
    total = 0.0
    for one in passes:
        forward, attended = linear_flops(anatomy, one), attention_flops(anatomy, one)
        extra = 0.0 if whole else 6.0 * trained * one.rows * one.width
        total += forward * (2 if whole else 1) + 2 * attended + extra + (forward + attended if again else 0)
    return total
