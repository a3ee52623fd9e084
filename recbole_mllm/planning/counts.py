"""What one stage costs, in numbers that add up and scale."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Self


@dataclass(slots=True)
class Count:
    """What a stage reads, writes and computes; fractions where a sample stands for the whole.

    Args:
        prompts: What is asked of a model; `known` what is answered without one, by the store.
        text_tokens: Of all those prompts, in training with their answers; `image_tokens` what their images become,
            `new_tokens` what is written.
        computed: Prompt tokens that pass through the language model: what is shared counts once.
        images: How often the vision tower reads an image.
        vision_flops: Of tower and projector; `prompt_flops` of reading, `decode_flops` of writing token by token,
            `head_flops` of logits, `backward_flops` of training's way back.
        cache_reads: Keys and values, in tokens, that writing reads again, step by step.
        longest: The longest prompt in tokens; `widest` the most tokens, padding included, that one pass (in training:
            one backward pass) holds; `prefix` the longest shared one; `at_once` the most tokens one pass computes. They
            neither add nor scale.
    """

    prompts: float = 0
    known: float = 0
    text_tokens: float = 0
    image_tokens: float = 0
    new_tokens: float = 0
    computed: float = 0
    images: float = 0
    vision_flops: float = 0
    prompt_flops: float = 0
    decode_flops: float = 0
    head_flops: float = 0
    backward_flops: float = 0
    cache_reads: float = 0
    longest: int = 0
    widest: int = 0
    prefix: int = 0
    at_once: int = 0

    @property
    def tokens(self) -> float:
        """Tokens of the prompts, each read whole."""
        return self.text_tokens + self.image_tokens

    @property
    def flops(self) -> float:
        """All floating-point operations."""
        return self.vision_flops + self.prompt_flops + self.decode_flops + self.head_flops + self.backward_flops

    def add(self, other: Count) -> None:
        """Take `other` in."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in _MOSTS:
            setattr(self, name, max(getattr(self, name), getattr(other, name)))

    def times(self, factor: float) -> Self:
        """Return the cost of `factor` times as much."""
        return replace(self, **{name: getattr(self, name) * factor for name in _SUMS})


_MOSTS = ("longest", "widest", "prefix", "at_once")
_SUMS = tuple(f.name for f in fields(Count) if f.name not in _MOSTS)
