"""How many tokens a prompt has, and what reading and answering it costs a model, here or behind a server."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from recbole_mllm.mllm.blueprint import Blueprint
from recbole_mllm.mllm.encode import Encoded, ImageInput
from recbole_mllm.mllm.passes import Pass
from recbole_mllm.planning.counts import Count
from recbole_mllm.planning.flops import decode_flops, head_flops, image_flops, read_flops
from recbole_mllm.prompts import Prompt

CHARACTERS = 4  # of a token, where only a server has the tokeniser


class Reader(Protocol):
    """Counts what a model would read."""

    def written(self, prompt: Prompt, new: float, room: int = 0) -> Count:
        """Return the cost of answering `prompt` with `new` tokens, of up to `room` that it may have."""
        ...

    def tokens(self, text: str) -> int:
        """Return how many tokens `text` has by itself."""
        ...


@dataclass(slots=True)
class LocalReader:
    """Counts with the model's own tokeniser, processor and config."""

    blueprint: Blueprint
    _flops: dict[int, float] = field(default_factory=dict)

    def written(self, prompt: Prompt, new: float, room: int = 0) -> Count:
        """Return the cost of answering `prompt` with `new` tokens, of up to `room` that it may have."""
        anatomy = self.blueprint.anatomy
        count = self.read(self.blueprint.encoder(prompt, room=room))
        length = count.longest
        count.computed, count.new_tokens = length, new
        count.prompt_flops = read_flops(anatomy, [Pass(1, 0, length, length, 0)])
        count.decode_flops, count.head_flops = decode_flops(anatomy, length, new), head_flops(anatomy, new)
        count.cache_reads = max(0.0, new - 1) * (length + new / 2)
        return count

    def read(self, encoded: Encoded) -> Count:
        """Return the prompt's tokens, and the operations of its images as if each were read by the vision tower."""
        shown = sum(len(image.ids) for image in encoded.images)
        vision = sum(self.vision(image) for image in encoded.images)
        return Count(
            prompts=1,
            text_tokens=len(encoded.ids) - shown,
            image_tokens=shown,
            images=len(encoded.images),
            vision_flops=vision,
            longest=len(encoded.ids),
        )

    def vision(self, image: ImageInput) -> float:
        """Return the operations of one image; images of one size share their tensors."""
        known = id(image.tensors)
        if known not in self._flops:
            self._flops[known] = image_flops(self.blueprint.anatomy, image.tensors, len(image.ids))
        return self._flops[known]

    def tokens(self, text: str) -> int:
        """Return how many tokens `text` has by itself."""
        return len(self.blueprint.encoder.tokenizer(text, add_special_tokens=False)["input_ids"])


class ServerReader:
    """Guesses the text's tokens from its length; what images become there is not known here."""

    def written(self, prompt: Prompt, new: float, room: int = 0) -> Count:
        """Return what a server would be asked."""
        text = self.tokens(prompt.text)
        return Count(
            prompts=1, text_tokens=text, new_tokens=new, computed=text, images=len(prompt.images), longest=text
        )

    def tokens(self, text: str) -> int:
        """Return about how many tokens `text` has."""
        return -(-len(text) // CHARACTERS)
