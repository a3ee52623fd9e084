"""A model's own calls, one prompt at a time: what every faster way is checked against, and what is left without one."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from recbole_mllm.mllm.base import Decoding
from recbole_mllm.mllm.encode import Encoded
from recbole_mllm.mllm.forward import Body
from recbole_mllm.mllm.processors import changed


def plain_inputs(body: Body, prompt: Encoded) -> dict[str, Tensor]:
    """Return what the model's own forward pass takes, pixels included."""
    ids = torch.tensor([prompt.ids])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs |= body.pixels(prompt.images) if prompt.images else {}
    takes = inspect.signature(body.head_model.forward).parameters
    answers = body.architecture.token_types == "answer"
    told = torch.arange(ids.numel())[None] >= ids.numel() - prompt.answer if answers else ids == body.image_token_id
    for kinds in ("mm_token_type_ids", "token_type_ids"):
        if kinds in takes and (prompt.images or answers):
            inputs[kinds] = told.int()
    return {name: value.to(body.device) for name, value in inputs.items()}


def whole_logits(body: Body, prompt: Encoded) -> Tensor:
    """Return ``[T, V]`` float32 logits of `prompt` by the model's own forward pass; gradients flow."""
    return torch.as_tensor(body.head_model(**plain_inputs(body, prompt)).logits[0]).float()


def plain_logits(body: Body, prompt: Encoded, tokens: Sequence[int]) -> Tensor:
    """Return ``[len(tokens)]`` float32 logits behind `prompt` by the model's own forward pass with pixels."""
    return whole_logits(body, prompt)[-1, list(tokens)].cpu()


def drawn(logits: Tensor, decoding: Decoding, rng: np.random.Generator) -> int:
    """Return a token drawn from the fewest most likely ones that together reach ``top_p`` (nucleus sampling)."""
    share, token = torch.softmax(logits.double() / decoding.temperature, -1).sort(descending=True, stable=True)
    before = share.cumsum(-1) - share
    share = share[before < decoding.top_p]
    place = torch.searchsorted((share / share.sum()).cumsum(-1), rng.random())
    return int(token[min(int(place), len(share) - 1)])


class _Drawn(LogitsProcessor):  # type: ignore[misc]
    """Leaves only the token that the row's own random numbers draw, so that greedy decoding takes it."""

    def __init__(self, decoding: Decoding, rng: np.random.Generator) -> None:
        self.decoding, self.rng = decoding, rng

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        only = torch.full_like(scores, float("-inf"))
        only[0, drawn(scores[0], self.decoding, self.rng)] = 0.0
        return only


def plain_answer(
    body: Body, prompt: Encoded, decoding: Decoding, stop: frozenset[int], rng: np.random.Generator | None
) -> list[int]:
    """Return the tokens that transformers' own ``generate`` writes behind `prompt`, the one that ends it included."""
    how = GenerationConfig(
        **(json.loads(decoding.rules) if decoding.rules else {}),
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(stop) or None,
        pad_token_id=min(stop, default=0),
    )
    draws = LogitsProcessorList([_Drawn(decoding, rng)] if rng is not None else [])
    inputs = plain_inputs(body, prompt)
    with changed(body.head_model, "generation_config", GenerationConfig()):  # which fills in what `how` leaves open
        out = body.head_model.generate(**inputs, generation_config=how, logits_processor=draws)
    tokens: list[int] = out[0, len(prompt.ids) :].tolist()
    return tokens
