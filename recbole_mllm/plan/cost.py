"""What counts cost: a model's sizes, operations, bytes of memory, hours on a device. Formulas alone (docs/plan.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from torch import Tensor

from recbole_mllm.common.errors import UserError, did_you_mean
from recbole_mllm.common.resources import PROPERTIES
from recbole_mllm.common.settings import LoraSettings
from recbole_mllm.common.yaml_files import read_mapping
from recbole_mllm.mllm.families import language_part
from recbole_mllm.mllm.lora import target_modules

_PROJECTORS = ("projector", "connector", "merger")  # names of what hands the tower's features to the language model
_NF4_BYTES = 0.5 + 4.127 / 32 / 8  # a 4-bit weight with its share of the doubly quantised scales
_USABLE = 0.9  # of a device's memory; the rest is the allocator's, and what no formula knows
_MOST_PROCESSES = 64


@dataclass(slots=True)
class Count:
    """What a stage reads, writes and computes; fractions where a sample stands for the whole."""

    prompts: float = 0  # for a model
    known: float = 0  # that the store answers
    text_tokens: float = 0  # of the prompts, in training with their answers
    image_tokens: float = 0  # that their images become
    new_tokens: float = 0  # written
    computed: float = 0  # prompt tokens that pass through the language model: what is shared counts once
    attended: float = 0  # keys that those tokens' queries meet, masked ones included
    predicted: float = 0  # tokens that have logits, those of a whole vocabulary: written or labelled
    images: float = 0  # read by the vision tower
    vision_flops: float = 0  # of the tower and the projector
    # these neither add nor scale
    longest: int = 0  # tokens of the longest prompt
    widest: int = 0  # most tokens, padding and what is cached included, of one pass (in training: one backward pass)
    at_once: int = 0  # most tokens that one pass computes
    prefix: int = 0  # tokens of the longest shared prefix
    sampled: bool = False

    @property
    def tokens(self) -> float:
        """Tokens of the prompts, each read whole."""
        return self.text_tokens + self.image_tokens

    @property
    def steps(self) -> float:
        """Tokens that are written one by one, behind the first of each answer."""
        return max(0.0, self.new_tokens - self.prompts)

    @property
    def cache_reads(self) -> float:
        """Keys that the queries of those tokens meet."""
        return self.steps * (self.tokens + self.new_tokens / 2) / max(1.0, self.prompts)

    def add(self, other: Count) -> None:
        """Add `other` to this count."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in _MAXIMA:
            setattr(self, name, max(getattr(self, name), getattr(other, name)))

    def times(self, factor: float) -> Self:
        """Return the count of `factor` times as much."""
        return replace(self, **{name: getattr(self, name) * factor for name in _SUMS})


_MAXIMA = ("longest", "widest", "at_once", "prefix", "sampled")
_SUMS = tuple(f.name for f in fields(Count) if f.name not in _MAXIMA)


# ---- a model


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What a model's costs follow from, read from its modules, which may be on the meta device.

    `vision` to `head` are parameters, `language` those of the decoder's layers, `head` 0 where it is the embedding's.
    `queries` and `keys` are the widths of a layer's queries, and of its keys (or values), `inner` its MLP's; it has
    so many `norms`. An image patch has so many numbers as `patch` says.
    """

    family: str
    vision: int
    projector: int
    language: int
    embedding: int
    head: int
    vocabulary: int
    layers: int
    width: int
    inner: int
    queries: int
    keys: int
    norms: int
    patch: int

    @classmethod
    def of(cls, model: Any) -> Self:
        """Return the sizes of `model`."""
        decoder, language = language_part(model)
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        parts = dict.fromkeys(("vision", "projector", "language", "embedding", "head"), 0)
        for path, parameter in model.named_parameters():  # tied ones once
            if parameter is embedding or parameter is head:
                part = "embedding" if parameter is embedding else "head"
            elif path.startswith(f"{decoder}." if decoder else ""):
                part = "language"
            else:
                part = "projector" if any(word in path for word in _PROJECTORS) else "vision"
            parts[part] += parameter.numel()
        text, vision = model.config.get_text_config(), getattr(model.config, "vision_config", None)
        heads, layers, side = text.num_attention_heads, text.num_hidden_layers, getattr(vision, "patch_size", 1)
        size = getattr(text, "head_dim", None) or text.hidden_size // heads
        return cls(
            family=str(model.config.model_type),
            **parts,
            vocabulary=head.shape[0],
            layers=layers,
            width=text.hidden_size,
            inner=text.intermediate_size,
            queries=heads * size,
            keys=(getattr(text, "num_key_value_heads", None) or heads) * size,
            norms=sum(type(module).__name__.endswith("Norm") for module in language.modules()) // layers,
            # Qwen-VL shows an image twice, as if it were a video
            patch=3 * (side if isinstance(side, int) else side[0]) ** 2 * getattr(vision, "temporal_patch_size", 1),
        )

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.vision + self.projector + self.language + self.embedding + self.head

    def weight_bytes(self, item: int, *, four_bit: bool = False) -> float:
        """Return the bytes of all weights at `item` bytes each; in `four_bit` the decoder's layers take less."""
        small = self.language if four_bit else 0
        return (self.parameters - small) * item + small * _NF4_BYTES

    def cache_bytes(self, item: int) -> int:
        """Return the bytes of one token's keys and values in all layers."""
        return 2 * self.layers * self.keys * item

    def split_bytes(self, item: int) -> float:
        """Return the bytes that FSDP can split among processes: all layers but the one put together."""
        return item * self.language * (1 - 1 / max(1, self.layers))

    def image_flops(self, tensors: Mapping[str, Tensor], tokens: int) -> float:
        """Return the operations of one image's patches in the tower, without attention, and of its tokens behind it."""
        numbers = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("pixel_values"))
        return 2.0 * self.vision * numbers / self.patch + 2.0 * self.projector * tokens


def trained_parameters(model: Any, settings: LoraSettings) -> int:
    """Return how many parameters `finetune` trains of `model`."""
    if settings.finetune == "none":
        return 0
    if settings.finetune == "full":
        chosen = model if settings.lora_target == "all" else language_part(model)[1]
        return sum(p.numel() for p in {*chosen.parameters(), *model.get_output_embeddings().parameters()})
    linear = (model.get_submodule(name) for name in target_modules(model, settings.lora_target))
    return sum(settings.lora_r * (one.in_features + one.out_features) for one in linear)


def flops(
    sizes: ModelSizes, count: Count, trained: int = 0, *, full: bool = False, checkpointing: bool = False
) -> dict[str, float]:
    """Return the operations of `count` by kind: two a weight and token, four a query, key and channel of attention.

    The way back (with `trained` parameters) takes what the way forth does through frozen weights, twice that through
    trained ones (`full`), else the adapter's own beside; gradient checkpointing computes the layers once more.
    """
    each, attention = 2.0 * sizes.language, 4.0 * sizes.layers * sizes.queries
    layers, met = each * count.computed, attention * count.attended
    head, back = 2.0 * sizes.width * sizes.vocabulary * count.predicted, 0.0
    if trained:
        own = 0 if full else 6.0 * trained * count.computed
        back = (1 + full) * (layers + head) + 2 * met + own + checkpointing * (layers + met)
    decode = each * count.steps + attention * count.cache_reads
    return {"vision": count.vision_flops, "prompt": layers + met, "decode": decode, "head": head, "backward": back}


# ---- memory


def training_bytes(
    sizes: ModelSizes, item: int, lora: LoraSettings, tokens: int, labelled: int, *, checkpointing: bool = False
) -> float:
    """Return about how many bytes of activations a backward pass of `tokens` tokens, some of them `labelled`, holds.

    A layer holds its norms' inputs in float32; queries, keys and values for every head of queries, attention's output;
    the MLP's two branches, the gate's activation and their product; and what LoRA's layers read, cast or with a mask of
    dropout, and write. Under checkpointing each layer holds its input alone, and one at a time the rest. A number has
    `item` bytes.
    """
    width, queries, inner = sizes.width, sizes.queries, sizes.inner
    layer = 4 * sizes.norms * width + item * (2 * width + 4 * queries + 4 * inner)
    if lora.finetune == "full":
        layer += 4 * sizes.norms * width
    else:
        layer += 7 * item * lora.lora_r
        if item < 4 or lora.lora_dropout:
            layer += item * (3 * width + queries) + 5 * width + queries + inner
    held = sizes.layers * item * width + layer if checkpointing else sizes.layers * layer
    return float(tokens * (held + 8 * inner) + labelled * sizes.vocabulary * 8)


def pass_bytes(sizes: ModelSizes, item: int, tokens: float, written: float = 0) -> float:
    """Return about how many bytes a pass of `tokens` tokens that learns nothing holds, beside keys and values.

    One layer's MLP or the float32 of its norms, whichever is more, and logits of the `written` rows' next tokens.
    """
    layer = 4 * item * sizes.width + max(3 * item * sizes.inner, 12 * sizes.width)
    return tokens * layer + written * sizes.vocabulary * (4 + item)


# ---- devices


@dataclass(frozen=True, slots=True)
class Device:
    """A device of properties/devices.yaml; the assumed shares say how much of its peaks a run reaches."""

    name: str
    bf16_tflops: float
    fp32_tflops: float
    memory_gb: float
    bandwidth_gb_s: float
    assumed_share_of_peak: float
    assumed_share_of_bandwidth: float
    price_per_hour: float | None
    assumed_network_gb_s: float

    @classmethod
    def called(cls, name: str) -> Self:
        """Return the device of this name, in any case.

        Raises:
            UserError: There is none.
        """
        table = read_mapping(PROPERTIES / "devices.yaml")
        known = {key.lower(): key for key in table["devices"]}
        key = known.get(name.lower().replace(" ", "-"))
        if key is None:
            hint = did_you_mean(name, known.values(), f"there are {', '.join(known.values())}")
            raise UserError(f"--device {name!r} is not in properties/devices.yaml; {hint}")
        return cls(key, **table["devices"][key], assumed_network_gb_s=table["assumed_network_gb_s"])

    @property
    def kind(self) -> str:
        """What torch calls it."""
        return "cpu" if self.name.startswith("CPU") else "cuda"

    def fits(self, total: float, split: float) -> dict[str, Any]:
        """Return the `bytes` that `total` needs here, the `room` there is, and in how many `processes` it fits.

        FSDP splits `split` of the bytes among processes. `processes` is None where not even 64 make it fit; `bytes` are
        those of one process then.
        """
        room = self.memory_gb * 1e9 * _USABLE
        left = room - (total - split)  # for each process's share
        count = 1 if total <= room else math.ceil(split / left) if split and left > 0 else None
        found = count if count is not None and count <= _MOST_PROCESSES else None
        return {"bytes": total - split * (1 - 1 / (found or 1)), "room": room, "processes": found}

    def seconds(self, sizes: ModelSizes, count: Count, operations: Mapping[str, float], item: int, slots: int) -> float:
        """Return the seconds of `count`, whose `operations` are given by kind, with numbers of `item` bytes.

        Reading and training are bounded by arithmetic. So is writing, `slots` prompts side by side, unless memory is
        slower: each step reads all weights, and every row's own keys and values.
        """
        peak = (self.bf16_tflops if item <= 2 else self.fp32_tflops) * 1e12 * self.assumed_share_of_peak
        written = operations["decode"] + operations["head"]
        moved = count.steps / max(1.0, min(slots, count.prompts)) * sizes.weight_bytes(item)
        moved += count.cache_reads * sizes.cache_bytes(item)
        transfer = moved / (self.bandwidth_gb_s * 1e9 * self.assumed_share_of_bandwidth)
        return (sum(operations.values()) - written) / peak + max(written / peak, transfer)
