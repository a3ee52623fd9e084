"""One forward pass for every architecture: explicit positions, image features made once, the head on chosen rows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from recbole_mllm.mllm.architectures import architecture_of, language_part
from recbole_mllm.mllm.batching import Budget
from recbole_mllm.mllm.dispatching import computes_on, input_device, present
from recbole_mllm.mllm.encode import Encoded, ImageInput, pad
from recbole_mllm.mllm.head import Head

_BATCH_TOKENS = 8192  # tokens of keys and values a batch holds, padding included
_FEATURE_BYTES = 2 * 2**30
# An image's features: one tensor where the family stacks them, else a list of one or more
_Features = Any


class Body:
    """The transformer under a (possibly adapted) causal language model, with a cache of image features.

    Features are kept only while the vision tower is frozen (`frozen_vision`); with a trained tower they are made anew.
    """

    def __init__(self, model: Any, *, split: bool = False) -> None:
        self.model = model
        self.split = split  # among processes, which then must make forward passes of one kind together (see splitting)
        # PEFT's wrapper adds nothing to the forward pass of a LoRA model: its layers sit inside the base model
        self.head_model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.inner = self.head_model.base_model  # what stands under the head
        self.config = self.head_model.config
        self.device = input_device(self.head_model)
        self.head = Head(self.head_model)
        self.architecture = architecture_of(self.head_model)
        self.way: Any = None  # how prompts are scored, found at first use (see check)
        self.way_sees = False  # whether it was found by prompts with images
        self.in_flight: dict[bool, bool] = {}  # whether answers are written in flight, with images or without (same)
        self.budget = Budget(_BATCH_TOKENS, self.forget_features)
        self._features: OrderedDict[str, BaseModelOutputWithPooling] = OrderedDict()
        self._bytes = 0

    def without_gradients(self) -> AbstractContextManager[None]:
        """Compute within as fast as can be where nothing is learnt.

        What is put together of split layers in inference mode could not take part in training afterwards.
        """
        return torch.no_grad() if self.split else torch.inference_mode()

    @property
    def frozen_vision(self) -> bool:
        """Whether no parameter outside the language model is trained, so that an image's features never change."""
        inside = {id(p) for p in language_part(self.head_model)[1].parameters()}
        inside |= {id(p) for p in self.head_model.get_output_embeddings().parameters()}
        return all(id(p) in inside for p in self.head_model.parameters() if p.requires_grad)

    def new_cache(self) -> DynamicCache:
        """Return an empty key-value cache."""
        return DynamicCache(config=self.config)

    def features(self, images: Sequence[ImageInput]) -> list[BaseModelOutputWithPooling]:
        """Return each image's features as the language model reads them."""
        if not self.frozen_vision:
            return [self._encode(image) for image in images]
        for image in images:
            if image.key in self._features:
                self._features.move_to_end(image.key)
                continue
            with torch.no_grad():
                made = self._encode(image)
            self._features[image.key] = made
            self._bytes += _bytes(made)
        out = [self._features[image.key] for image in images]
        while self._bytes > _FEATURE_BYTES and len(self._features) > 1:
            self._bytes -= _bytes(self._features.popitem(last=False)[1])
        return out

    def forget_features(self) -> bool:
        """Drop the kept features, as memory is short; return whether there were any."""
        any_kept, self._bytes = bool(self._features), 0
        self._features.clear()
        return any_kept

    def pixels(self, images: Sequence[ImageInput]) -> dict[str, Tensor]:
        """Return the images as the vision tower takes them."""
        dtype = self.head_model.dtype
        tensors = {name: torch.cat([image.tensors[name] for image in images]) for name in images[0].tensors}
        return {
            name: value.to(self.device, dtype) if value.is_floating_point() else value.to(self.device)
            for name, value in tensors.items()
        }

    def _encode(self, image: ImageInput) -> BaseModelOutputWithPooling:
        with present(self.inner):  # a parameter of its own, which a new line of tiles is told by (LLaVA-NeXT)
            out = self.inner.get_image_features(**self.pixels([image]), return_dict=True)
        kept = BaseModelOutputWithPooling(pooler_output=out.pooler_output)
        if (deep := getattr(out, "deepstack_features", None)) is not None:
            kept["deepstack_features"] = deep
        return kept

    def image_outputs(self, images: Sequence[ImageInput]) -> dict[str, BaseModelOutputWithPooling]:
        """Return features as the model's ``mm_encoder_outputs``, joined as the family itself joins those of a batch."""
        made = self.features(images)
        out = BaseModelOutputWithPooling(pooler_output=_joined([one.pooler_output for one in made]))
        if "deepstack_features" in made[0]:
            out["deepstack_features"] = [
                _joined(layer) for layer in zip(*(one["deepstack_features"] for one in made), strict=True)
            ]
        return {"image": out}

    @property
    def image_token_id(self) -> int:
        """The placeholder's token id, or -1 for a text-only model."""
        for name in ("image_token_id", "image_token_index"):
            if (value := getattr(self.config, name, None)) is not None:
                return int(value)
        return -1

    @property
    def logits_device(self) -> torch.device:
        """Where logits are made."""
        return computes_on(self.head_model.get_output_embeddings())

    def positions(self, encoded: Encoded) -> Tensor:
        """Return the position of every token: ``[T]``, or ``[3, T]`` where positions have three axes (Qwen-VL)."""
        ids, three = torch.tensor(encoded.ids), self.architecture.positions_in_three_axes
        if encoded.images and three:
            grid = torch.cat([image.tensors["image_grid_thw"] for image in encoded.images])
            kinds = (ids == self.image_token_id).int()
            found, _ = self.inner.get_rope_index(ids[None], kinds[None], image_grid_thw=grid)
            return torch.as_tensor(found[:, 0])
        start = self.architecture.first_position
        plain = torch.arange(start, start + len(ids))
        return plain.expand(3, -1) if three else plain

    def hidden(self, rows: Sequence[Encoded], start: int, stops: Sequence[int], cache: DynamicCache | None) -> Tensor:
        """Run tokens ``[start, stop)`` of each row, right-padded, behind the ``[0, start)`` that `cache` holds.

        Returns:
            ``[B, S, D]`` last hidden states, S the longest segment.
        """
        ids, own = pad([row.ids[start:stop] for row, stop in zip(rows, stops, strict=True)], 0)
        mask = torch.cat([torch.ones(len(rows), start, dtype=torch.long), own], 1)
        places = [self.positions(row)[..., start:stop] for row, stop in zip(rows, stops, strict=True)]
        position_ids = torch.zeros(*places[0].shape[:-1], *ids.shape, dtype=torch.long)
        for i, place in enumerate(places):
            position_ids[..., i, : place.size(-1)] = place
        # An image lies wholly before or wholly behind `start`: a prefix never ends inside one (see scoring)
        seen = [self.image_token_id in row.ids[start:stop] for row, stop in zip(rows, stops, strict=True)]
        images = [image for row, sees in zip(rows, seen, strict=True) if sees for image in row.images]
        extra: dict[str, Any] = {"mm_encoder_outputs": self.image_outputs(images)} if images else {}
        extra |= self._token_types(rows, ids, start, bool(images))
        out = self.inner(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            position_ids=position_ids.to(self.device),
            past_key_values=cache,
            use_cache=cache is not None,
            **extra,
        )
        return torch.as_tensor(out.last_hidden_state)

    def step(self, ids: Sequence[int], positions: Sequence[int], mask: Tensor, cache: DynamicCache) -> Tensor:
        """Run one further token of each row behind `cache`, which grows by it.

        Args:
            ids: ``[B]`` tokens.
            positions: ``[B]`` their positions, the same in every axis: text follows whatever images came before.
            mask: ``[B, T + 1]``, the new token's column included.
            cache: ``[0, T)`` of every row, right-aligned.

        Returns:
            ``[B, D]`` last hidden states.
        """
        tokens = torch.tensor(ids)[:, None]
        places = torch.tensor(positions)[:, None]
        if self.architecture.positions_in_three_axes:
            places = places.expand(3, -1, -1)
        kinds = torch.zeros_like(mask, dtype=torch.int)
        kinds[:, -1] = 1
        extra = {"token_type_ids": kinds.to(self.device)} if self.architecture.token_types == "answer" else {}
        out = self.inner(
            input_ids=tokens.to(self.device),
            attention_mask=mask.to(self.device),
            position_ids=places.to(self.device),
            past_key_values=cache,
            use_cache=True,
            **extra,
        )
        return torch.as_tensor(out.last_hidden_state[:, 0])

    def _token_types(self, rows: Sequence[Encoded], ids: Tensor, start: int, sees: bool) -> dict[str, Tensor]:
        kinds = torch.zeros(len(ids), start + ids.size(1), dtype=torch.int)
        if self.architecture.token_types == "image" and sees:
            kinds[:, start:] = ids == self.image_token_id
        elif self.architecture.token_types == "answer":
            for kind, row in zip(kinds, rows, strict=True):
                kind[len(row.ids) - row.answer : len(row.ids)] = 1
        else:
            return {}
        return {"token_type_ids": kinds.to(self.device)}

    def logits(self, states: Tensor, tokens: Sequence[int] | None = None) -> Tensor:
        """Return float32 logits of `states` ``[N, D]``, for `tokens` only or for the vocabulary, where the head is."""
        autocast = torch.is_autocast_enabled(self.device.type) and tokens is None
        with torch.autocast(self.device.type, enabled=autocast):
            return self.head(states, tokens)


def _joined(features: Sequence[_Features]) -> _Features:
    """Return the features of several images as one: tensors along their first axis, or one list of all tiles."""
    if isinstance(features[0], Tensor):
        return torch.cat(list(features), 0)
    return list(chain.from_iterable(features))


def _bytes(made: BaseModelOutputWithPooling) -> int:
    parts = [made.pooler_output, *made.get("deepstack_features", [])]
    return sum(tile.nbytes for part in parts for tile in ([part] if isinstance(part, Tensor) else part))
