"""One forward pass for every architecture: explicit positions, cached image features, the head on chosen rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from recbole_mllm.mllm.encoder import Encoded, ImageInput
from recbole_mllm.mllm.families import architecture_of, language_part
from recbole_mllm.mllm.memory import Budget, ByteCache
from recbole_mllm.mllm.placement import computes_on, input_device, present

_BATCH_TOKENS = 8192  # tokens of keys and values a batch holds, padding included
FEATURE_BYTES = 2 * 2**30


class Backbone:
    """The transformer under a (possibly adapted) causal language model, with a cache of image features.

    Features are cached only while the vision tower is frozen (`frozen_vision`): training it changes them.
    """

    def __init__(self, model: Any, *, split: bool = False) -> None:
        self.model, self.split = model, split  # processes that share its layers make passes of one kind together
        # PEFT's wrapper adds nothing to the forward pass of a LoRA model: its layers sit inside the base model
        self.head_model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.inner = self.head_model.base_model  # what stands under the head
        self.config = self.head_model.config
        self.device = input_device(self.head_model)
        self.head = Head(self.head_model)
        self.architecture = architecture_of(self.head_model)
        self.scoring_mode: Any = None  # how prompts are scored, found at first use (see `scoring_mode`)
        self.mode_sees = False  # whether it was found by prompts with images
        self.in_flight: dict[bool, bool] = {}  # whether answers are written side by side, with images or without
        self.budget = Budget(_BATCH_TOKENS, self.forget_features)
        self._features = ByteCache[BaseModelOutputWithPooling](lambda: FEATURE_BYTES, _bytes)

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

    @property
    def image_token_id(self) -> int:
        """The placeholder's token id, or -1 for a text-only model."""
        for name in ("image_token_id", "image_token_index"):
            if (value := getattr(self.config, name, None)) is not None:
                return int(value)
        return -1

    @property
    def logits_device(self) -> torch.device:
        """Where logits are computed."""
        return computes_on(self.head_model.get_output_embeddings())

    def new_cache(self) -> DynamicCache:
        """Return an empty key-value cache."""
        return DynamicCache(config=self.config)

    def features(self, images: Sequence[ImageInput]) -> list[BaseModelOutputWithPooling]:
        """Return each image's features as the language model reads them."""
        if not self.frozen_vision:
            return [self._encode(image) for image in images]
        with torch.no_grad():
            return [self._features.get(image.key, partial(self._encode, image)) for image in images]

    def forget_features(self) -> bool:
        """Drop the cached features, as memory is short; return whether there were any."""
        return self._features.clear()

    def _pixels(self, images: Sequence[ImageInput]) -> dict[str, Tensor]:
        dtype = self.head_model.dtype
        tensors = {name: torch.cat([image.tensors[name] for image in images]) for name in images[0].tensors}
        return {
            name: value.to(self.device, dtype) if value.is_floating_point() else value.to(self.device)
            for name, value in tensors.items()
        }

    def _encode(self, image: ImageInput) -> BaseModelOutputWithPooling:
        with present(self.inner):  # it has a parameter itself, which marks a new line of tiles (LLaVA-NeXT)
            out = self.inner.get_image_features(**self._pixels([image]), return_dict=True)
        features = BaseModelOutputWithPooling(pooler_output=out.pooler_output)
        if (deep := getattr(out, "deepstack_features", None)) is not None:
            features["deepstack_features"] = deep
        return features

    def _image_outputs(self, images: Sequence[ImageInput]) -> dict[str, BaseModelOutputWithPooling]:
        each = self.features(images)  # joined as the family itself joins those of a batch
        out = BaseModelOutputWithPooling(pooler_output=_joined([one.pooler_output for one in each]))
        if "deepstack_features" in each[0]:
            layers = zip(*(one["deepstack_features"] for one in each), strict=True)
            out["deepstack_features"] = [_joined(layer) for layer in layers]
        return {"image": out}

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
        count, width = len(rows), max(stops) - start
        ids, mask = torch.zeros(count, width, dtype=torch.long), torch.zeros(count, start + width, dtype=torch.long)
        position_ids = torch.zeros(3 if self.architecture.positions_in_three_axes else 1, count, width).long()
        images: list[ImageInput] = []
        for i, (row, stop) in enumerate(zip(rows, stops, strict=True)):
            ids[i, : stop - start] = torch.tensor(row.ids[start:stop])
            mask[i, :stop] = 1
            position_ids[:, i, : stop - start] = self.positions(row)[..., start:stop]
            # an image lies wholly before or wholly behind `start`: a prefix never ends inside one (see scoring)
            images += row.images if self.image_token_id in row.ids[start:stop] else ()
        extra: dict[str, Any] = {"mm_encoder_outputs": self._image_outputs(images)} if images else {}
        out = self.inner(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            position_ids=(position_ids if len(position_ids) > 1 else position_ids[0]).to(self.device),
            past_key_values=cache,
            use_cache=cache is not None,
            **extra,
            **self._token_types(rows, ids, start, bool(images)),
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
        places = torch.tensor(positions)[:, None]
        inputs = {
            "input_ids": torch.tensor(ids)[:, None],
            "attention_mask": mask,
            "position_ids": places.expand(3, -1, -1) if self.architecture.positions_in_three_axes else places,
        }
        if self.architecture.token_types == "answer":
            inputs["token_type_ids"] = functional.pad(torch.ones(len(ids), 1, dtype=torch.int), (mask.size(1) - 1, 0))
        on_device = {name: value.to(self.device) for name, value in inputs.items()}
        out = self.inner(**on_device, past_key_values=cache, use_cache=True)
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

    def plain_inputs(self, prompt: Encoded) -> dict[str, Tensor]:
        """Return what the model's own forward pass takes, pixels included."""
        ids = torch.tensor([prompt.ids])
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs |= self._pixels(prompt.images) if prompt.images else {}
        takes = inspect.signature(self.head_model.forward).parameters
        answers = self.architecture.token_types == "answer"
        behind = torch.arange(ids.numel())[None] >= ids.numel() - prompt.answer
        for kinds in ("mm_token_type_ids", "token_type_ids"):
            if kinds in takes and (prompt.images or answers):
                inputs[kinds] = (behind if answers else ids == self.image_token_id).int()
        return {name: value.to(self.device) for name, value in inputs.items()}

    def padded_logits(self, prompts: Sequence[Encoded], tokens: Sequence[int]) -> Tensor:
        """Return ``[B, len(tokens)]`` float32 logits behind `prompts` by a plain forward pass, padded on the right."""
        each, width = [self.plain_inputs(prompt) for prompt in prompts], max(len(prompt.ids) for prompt in prompts)
        inputs = {
            name: torch.cat([
                functional.pad(one[name], (0, width - len(p.ids))) if one[name].shape == (1, len(p.ids)) else one[name]
                for one, p in zip(each, prompts, strict=True)
            ])
            for name in each[0]
        }  # fmt: skip
        found = self.head_model(**inputs).logits
        return torch.stack([found[i, len(p.ids) - 1, list(tokens)] for i, p in enumerate(prompts)]).float().cpu()

    def plain_logits(self, prompt: Encoded) -> Tensor:
        """Return ``[T, V]`` float32 logits of `prompt` by the model's own forward pass; gradients flow."""
        return torch.as_tensor(self.head_model(**self.plain_inputs(prompt)).logits[0]).float()


def _joined(features: Sequence[Any]) -> Any:
    return torch.cat(list(features)) if isinstance(features[0], Tensor) else list(chain.from_iterable(features))


def _bytes(features: BaseModelOutputWithPooling) -> int:
    parts = [features.pooler_output, *features.get("deepstack_features", [])]
    return sum(tile.nbytes for part in parts for tile in ([part] if isinstance(part, Tensor) else part))


class Head:
    """What stands between the backbone of a causal language model and its logits: a head, and what its class adds.

    A class may scale or cap logits, or put a norm before the head, and its settings do not tell whether it does: of a
    ``logits_scaling`` a Granite takes account, and a LLaVA over the same Granite does not. So the class's own forward
    pass is run, with the states in place of its backbone and, for few tokens, their rows of the head alone.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._head = model, model.get_output_embeddings()
        children = model._modules.items()
        self._names = [next((n for n, m in children if m is one), "") for one in (model.base_model, self._head)]

    def __call__(self, states: Tensor, tokens: Sequence[int] | None) -> Tensor:
        """Return float32 logits of `states` ``[N, D]``, for `tokens` only or for the vocabulary, where the head is.

        Raises:
            NotImplementedError: The model is no backbone with a head behind it.
            IndexError, RuntimeError, ValueError: Its class looks for other tokens' logits among those of `tokens`.
        """
        if not all(self._names):
            raise NotImplementedError(f"{type(self._model).__name__} is no backbone with a head behind it")
        own = (_Instead(lambda *_, **__: _States((states[None],))), _Instead(partial(self._rows, tokens), self._head))
        twin = object.__new__(type(self._model))  # not `copy`, which FSDP's classes do not stand
        twin.__dict__ = {name: value for name, value in vars(self._model).items() if name != "forward"}
        twin.__dict__["_modules"] = self._model._modules | dict(zip(self._names, own, strict=True))
        ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        return torch.as_tensor(type(twin).forward(twin, input_ids=ids, return_dict=True).logits[0]).float()

    def _rows(self, tokens: Sequence[int] | None, states: Tensor) -> Tensor:
        head, states = self._head, states.to(computes_on(self._head))
        if tokens is None:
            return torch.as_tensor(head(states)).float()
        rows = list(tokens)
        with present(head):
            out = states.float() @ head.weight[rows].float().T
            bias = getattr(head, "bias", None)
            return torch.as_tensor(out if bias is None else out + bias[rows].float())


class _States(tuple[Tensor]):
    """A backbone's output that holds last hidden states and nothing else, whatever it is asked for."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Instead(nn.Module):
    """Stands in a backbone's or a `head`'s place, whose weight it shows, and computes what it is given."""

    def __init__(self, compute: Callable[..., Any], head: nn.Module | None = None) -> None:
        super().__init__()
        self.forward = compute
        self._head = [head]  # in a list, as a module would become a part

    @property
    def weight(self) -> Any:
        """The head's."""
        return getattr(self._head[0], "weight", None)
