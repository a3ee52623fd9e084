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

    A layer keeps its norms' inputs in float32, queries, keys, values, attention's output, and the MLP's two branches,
    their product and the gate's activation; LoRA keeps its layers' inputs beside, where they are cast or dropped from
    (measured: `tests/unit/test_plan_parts.py`).
    Under checkpointing each layer keeps its input alone, and one at a time the rest.
    """
    if lora.finetune == "none":
        return 0.0
    a, item = anatomy, precision.item
    layer: float = item * (2 * a.width + 2 * a.queries + 2 * a.keys + 4 * a.inner) + 4 * 4 * a.width
    if lora.finetune != "full":
        beside = (0.0, 3.0) if item == 4 else (0.5, 1.25)
        layer += beside[bool(lora.lora_dropout)] * (5 * a.width + a.queries + a.inner)
    kept = a.layers * (item * a.width) + layer if train.gradient_checkpointing else a.layers * layer
    vocabulary = a.head // max(1, a.width)
    return float(tokens * kept + labelled * vocabulary * 8)


def generation_cache(anatomy: Anatomy, precision: Precision, rows: float, tokens: float) -> float:
    """Return the bytes of keys and values of `rows` answers under way, of `tokens` tokens each."""
    return rows * tokens * anatomy.cache_bytes(precision.item)
