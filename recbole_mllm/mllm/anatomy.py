"""A model's sizes from its config alone: parameters by part, widths, what LoRA would add. No weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn

from recbole_mllm.mllm.architectures import language_part
from recbole_mllm.mllm.lora import target_modules
from recbole_mllm.settings import LoraSettings

_BETWEEN = (
    "projector",
    "connector",
    "merger",
)  # what stands between vision tower and language model, and reads its output
_NF4_BYTES = 0.5 + 4.127 / 32 / 8  # a 4-bit weight with its share of the doubly quantised scales


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a model: its parameters, and those of its linear layers and convolutions, two FLOPs a token each."""

    parameters: int = 0
    linear: int = 0


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What a model's costs follow from.

    Args:
        family: Its ``model_type``.
        vision: The vision tower; `projector` what hands its features to the language model.
        language: The decoder's layers, without embeddings and head.
        embedding: The token embeddings; the head's weights, where they are the same, count there alone.
        head: Weights that make logits: vocabulary times width, wherever they are kept.
        head_is_own: Whether they are kept beside the embeddings.
        layers: Of the decoder; `width` its hidden size, `inner` its MLP's, `queries` and `keys` those of a layer's
            queries, and of its keys (or values); `norms` that of all its norms' inputs together.
        vision_layers: Of the tower; `vision_width` its hidden size.
        patch: The side of an image patch in pixels.
    """

    family: str
    vision: Part
    projector: Part
    language: Part
    embedding: int
    head: int
    head_is_own: bool
    layers: int
    width: int
    inner: int
    queries: int
    keys: int
    norms: int
    vision_layers: int
    vision_width: int
    patch: int
    four_bit: int  # weights that QLoRA keeps in four bits

    @property
    def parameters(self) -> int:
        """All parameters."""
        own = self.head if self.head_is_own else 0
        return self.vision.parameters + self.projector.parameters + self.language.parameters + self.embedding + own

    def weight_bytes(self, item: int, *, four_bit: bool = False) -> float:
        """Return the bytes of all weights at `item` bytes each; in `four_bit` the decoder's layers take less."""
        small = self.four_bit if four_bit else 0
        return (self.parameters - small) * item + small * _NF4_BYTES

    def cache_bytes(self, item: int) -> int:
        """Return the bytes of one token's keys and values in all layers."""
        return 2 * self.layers * self.keys * item

    def patches(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """Return how many patches an image's tensors hold, and in how many tiles."""
        pixels = tensors.get("pixel_values")
        if pixels is None:
            return 0, 0
        if pixels.dim() < 4:  # Qwen-VL's come as rows of patches
            return prod(pixels.shape[:-1]), 1
        tiles = prod(pixels.shape[:-3])
        return tiles * (pixels.shape[-2] // self.patch) * (pixels.shape[-1] // self.patch), tiles


def anatomy_of(model: Any) -> Anatomy:
    """Return the sizes of `model`, which may stand on the meta device."""
    name, language = language_part(model)
    config, head = model.config, model.get_output_embeddings()
    text, seen = config.get_text_config(), getattr(config, "vision_config", None)
    embedding = model.get_input_embeddings()
    left_out = {id(p) for p in (*embedding.parameters(), *head.parameters())}
    between = [m for n, m in model.named_modules() if n.rpartition(".")[2] in _between(model) and not _under(n, name)]
    inside, bridge = {id(p) for p in language.parameters()}, {id(p) for m in between for p in m.parameters()}
    rest = [id(p) for p in model.parameters() if id(p) not in inside | bridge | left_out]
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    queries, keys = heads * size, (getattr(text, "num_key_value_heads", None) or heads) * size
    return Anatomy(
        family=str(config.model_type),
        vision=_part(model, set(rest)),
        projector=_part(model, bridge - inside - left_out),
        language=_part(model, inside - left_out),
        embedding=sum(p.numel() for p in embedding.parameters()),
        head=head.weight.numel(),
        head_is_own=head.weight is not embedding.weight,
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        inner=text.intermediate_size,
        queries=queries,
        keys=keys,
        norms=_norms(language, {"q_norm": queries, "k_norm": keys}, text.hidden_size) // text.num_hidden_layers,
        vision_layers=_first(seen, "num_hidden_layers", "depth"),
        vision_width=_vision_width(seen),
        patch=_first(seen, "patch_size") or 1,
        four_bit=_part(model, inside - left_out).linear,
    )


def trained_parameters(model: Any, settings: LoraSettings) -> int:
    """Return how many parameters `finetune` trains of `model`."""
    if settings.finetune == "none":
        return 0
    if settings.finetune == "full":
        chosen = model if settings.lora_target == "all" else language_part(model)[1]
        kept = {id(p): p.numel() for p in (*chosen.parameters(), *model.get_output_embeddings().parameters())}
        return sum(kept.values())
    linear = (model.get_submodule(name) for name in target_modules(model, settings.lora_target))
    return sum(settings.lora_r * (one.in_features + one.out_features) for one in linear)


def _between(model: Any) -> set[str]:
    return {
        name.rpartition(".")[2]
        for name, _ in model.named_modules()
        if any(word in name.rpartition(".")[2] for word in _BETWEEN)
    }


def _norms(language: nn.Module, wide: Mapping[str, int], width: int) -> int:
    """Return how many numbers a token has in all inputs of the layers' norms; those of heads are as `wide` as said."""
    names = [name for name, module in language.named_modules() if type(module).__name__.endswith("Norm")]
    in_layers = [name for name in names if any(map(str.isdecimal, name.split(".")))]
    return sum(wide.get(name.rpartition(".")[2], width) for name in in_layers)


def _under(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def _part(model: Any, chosen: set[int]) -> Part:
    """Return the sizes of the parameters `chosen` by their id."""
    linear = 0
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) and id(module.weight) in chosen:
            linear += module.weight.numel()
    return Part(sum(p.numel() for p in model.parameters() if id(p) in chosen), linear)


def _first(config: Any, *names: str) -> int:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return int(value[0] if isinstance(value, list | tuple) else value)
    return 0


def _vision_width(seen: Any) -> int:
    """Return the tower's width; Qwen-VL's first calls it `embed_dim`, and `hidden_size` what it hands on."""
    return _first(seen, "embed_dim") or _first(seen, "hidden_size")
