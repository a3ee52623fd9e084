"""One forward pass for every architecture: explicit positions, image features made once, the head on chosen rows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from recbole_mllm.mllm.encode import Encoded, ImageInput, pad

# Families whose image features come, and are fed back, as one stacked tensor rather than a list (transformers 5.23)
_STACKED = {"gemma3", "paligemma"}
_FEATURE_BYTES = 2 * 2**30


class Body:
    """The transformer under a (possibly adapted) causal language model, with a cache of image features.

    Features are kept only while the vision tower is frozen (`frozen_vision`); with a trained tower they are made anew.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        # PEFT's wrapper adds nothing to the forward pass of a LoRA model: its layers sit inside the base model
        self.head_model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config = self.head_model.config
        self.device = next(self.head_model.parameters()).device
        self.family = str(self.config.model_type)
        self._features: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes = 0

    @property
    def frozen_vision(self) -> bool:
        """Whether no parameter outside the language model is trained, so that an image's features never change."""
        language = self.head_model.get_decoder() if hasattr(self.head_model, "get_decoder") else None
        inside = {id(p) for p in language.parameters()} if language is not None else set()
        inside |= {id(p) for p in self.head_model.get_output_embeddings().parameters()}
        return all(id(p) in inside for p in self.head_model.parameters() if p.requires_grad)

    def new_cache(self) -> DynamicCache:
        """Return an empty key-value cache."""
        return DynamicCache(config=self.config)

    def features(self, images: Sequence[ImageInput]) -> list[Tensor]:
        """Return each image's ``[tokens, D]`` features as the language model reads them."""
        if not self.frozen_vision:
            return [self._encode(image) for image in images]
        for image in images:
            if image.key in self._features:
                self._features.move_to_end(image.key)
                continue
            with torch.no_grad():
                made = self._encode(image)
            self._features[image.key] = made
            self._bytes += made.nbytes
        out = [self._features[image.key] for image in images]
        while self._bytes > _FEATURE_BYTES and len(self._features) > 1:
            self._bytes -= self._features.popitem(last=False)[1].nbytes
        return out

    def _encode(self, image: ImageInput) -> Tensor:
        dtype = self.head_model.dtype
        tensors = {
            name: value.to(self.device, dtype) if value.is_floating_point() else value.to(self.device)
            for name, value in image.tensors.items()
        }
        out = self.head_model.model.get_image_features(**tensors, return_dict=True).pooler_output
        return out.reshape(-1, out.size(-1)) if isinstance(out, Tensor) else torch.cat(list(out), 0)

    def image_outputs(self, images: Sequence[ImageInput]) -> dict[str, BaseModelOutputWithPooling]:
        """Return features as the model's ``mm_encoder_outputs``."""
        features = self.features(images)
        pooled: Any = torch.stack(features) if self.family in _STACKED else features
        return {"image": BaseModelOutputWithPooling(pooler_output=pooled)}

    def generation_images(self, ids: Tensor, images: Sequence[ImageInput]) -> dict[str, Any]:
        """Return the image arguments of ``generate`` for left-padded `ids` ``[B, T]``."""
        if not images:
            return {}
        extra: dict[str, Any] = {"mm_encoder_outputs": self.image_outputs(images)}
        grids = [image.tensors["image_grid_thw"] for image in images if "image_grid_thw" in image.tensors]
        if grids:
            extra["image_grid_thw"] = torch.cat(grids).to(self.device)
            extra["mm_token_type_ids"] = (ids == self.image_token_id).int().to(self.device)
        return extra

    @property
    def image_token_id(self) -> int:
        """The placeholder's token id, or -1 for a text-only model."""
        for name in ("image_token_id", "image_token_index"):
            if (value := getattr(self.config, name, None)) is not None:
                return int(value)
        return -1

    def positions(self, encoded: Encoded) -> Tensor:
        """Return the position of every token: ``[T]``, or ``[3, T]`` for rotary positions in three axes (Qwen-VL)."""
        ids = torch.tensor(encoded.ids)
        if encoded.images and hasattr(self.head_model.model, "get_rope_index"):
            grid = torch.cat([image.tensors["image_grid_thw"] for image in encoded.images])
            kinds = (ids == self.image_token_id).int()
            found, _ = self.head_model.model.get_rope_index(ids[None], kinds[None], image_grid_thw=grid)
            return torch.as_tensor(found[:, 0])
        start = 1 if self.family == "paligemma" else 0
        plain = torch.arange(start, start + len(ids))
        return plain.expand(3, -1) if hasattr(self.head_model.model, "get_rope_index") else plain

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
        extra |= self._token_types(ids, start, bool(images))
        out = self.head_model.model(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            position_ids=position_ids.to(self.device),
            past_key_values=cache,
            use_cache=cache is not None,
            **extra,
        )
        return torch.as_tensor(out.last_hidden_state)

    def _token_types(self, ids: Tensor, start: int, has_image: bool) -> dict[str, Tensor]:
        if self.family == "gemma3" and has_image:  # its mask code indexes by absolute position
            kinds = (ids == self.image_token_id).int()
            return {"token_type_ids": torch.cat([kinds.new_zeros(len(ids), start), kinds], 1).to(self.device)}
        if self.family == "paligemma":  # prefix-LM: the whole prompt is read in both directions
            return {"token_type_ids": torch.zeros_like(ids).to(self.device)}
        return {}

    def logits(self, states: Tensor, tokens: Sequence[int] | None = None) -> Tensor:
        """Return float32 logits of `states` ``[N, D]``, for `tokens` only or for the vocabulary."""
        head = self.head_model.get_output_embeddings()
        whole = tokens is None
        with torch.autocast(self.device.type, enabled=torch.is_autocast_enabled(self.device.type) and whole):
            out = head(states).float() if whole else states.float() @ head.weight[list(tokens or ())].float().T
        cap = getattr(self.config.get_text_config(), "final_logit_softcapping", None)
        return torch.as_tensor(torch.tanh(out / cap) * cap if cap else out)
