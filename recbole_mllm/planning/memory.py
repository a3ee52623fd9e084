"""Bytes of device memory, part by part."""

from __future__ import annotations

from dataclasses import dataclass

from recbole_mllm.mllm.anatomy import Anatomy
from recbole_mllm.settings import LoraSettings, TrainSettings


@dataclass(frozen=True, slots=True)
class Precision:
    """`item` bytes a number; `four_bit` where QLoRA keeps the decoder's layers so."""

    item: int
    four_bit: bool = False


def weights(anatomy: Anatomy, precision: Precision) -> float:
    """Return the bytes of the model's weights."""
    return anatomy.weight_bytes(precision.item, four_bit=precision.four_bit)


def training_state(anatomy: Anatomy, precision: Precision, lora: LoraSettings, trained: int) -> float:
    """Return the bytes of what training adds: parameters, gradients and AdamW's two moments, in float32.

    A fully trained model's parameters take the place of those it was loaded with.
    """
    if lora.finetune == "none":
        return 0.0
    return trained * (16 - (precision.item if lora.finetune == "full" else 0))


def activations(
    anatomy: Anatomy, precision: Precision, lora: LoraSettings, train: TrainSettings, tokens: int, labelled: int
) -> float:
    """Return about how many bytes the largest backward pass keeps, of `tokens` tokens, `labelled` with logits.

    A layer keeps its norms' inputs in float32 (and outputs, where their weights are trained); queries, keys and values,
    the latter for every head of queries, and attention's output; the MLP's two branches, the gate's activation and
    their product; and what its trained linear layers read, each a copy of its own where that is cast or dropped from,
    beside a byte of mask (measured: `tests/unit/test_plan_parts.py`).
    Under checkpointing each layer keeps its input alone, and one at a time the rest.
    """
    if lora.finetune == "none":
        return 0.0
    a, item = anatomy, precision.item
    full = lora.finetune == "full"
    dropped = not full and bool(lora.lora_dropout)
    read = 5 * a.width + a.queries if item < 4 or dropped else 2 * a.width
    layer = 4 * a.norms * (1 + full) + item * (read + 4 * a.queries + 4 * a.inner)
    if dropped:
        layer += 5 * a.width + a.queries + a.inner
    if not full:
        layer += 7 * item * lora.lora_r  # what leaves the adapters' first halves
    kept = a.layers * (item * a.width) + layer if train.gradient_checkpointing else a.layers * layer
    # for a moment: an MLP's way back, or its product cast to LoRA's float32, dropped from and cast again
    kept += 8 * a.inner + 4 * a.width if item == 4 else (10 if dropped else 6) * a.inner
    vocabulary = a.head // max(1, a.width)
    return float(tokens * kept + labelled * vocabulary * 8)


def in_passing(anatomy: Anatomy, precision: Precision, tokens: float, written: float = 0) -> float:
    """Return about how many bytes a pass of `tokens` tokens holds for a moment, beside keys and values.

    One layer's MLP or the float32 of its norms, whichever is more, and logits of the `written` rows' next tokens.
    """
    a, item = anatomy, precision.item
    layer = 4 * item * a.width + max(3 * item * a.inner, 12 * a.width)
    return tokens * layer + written * (a.head // max(1, a.width)) * (4 + item)


def generation_cache(anatomy: Anatomy, precision: Precision, rows: float, tokens: float) -> float:
    """Return the bytes of keys and values of `rows` answers under way, of `tokens` tokens each."""
    return rows * tokens * anatomy.cache_bytes(precision.item)
