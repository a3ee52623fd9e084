"""Where a family of models truly differs from the one code path; every other family takes the generic row.

A family with a row of its own, over a language model named there, is tested against transformers' own forward pass in
``tests/families``. Any other pair of the two is checked at its first use (see ``scoring``), as it may differ in a way
this table knows nothing of.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one family differs."""

    # The families of its language model (``model_type`` of its text settings) that it is tested with
    texts: frozenset[str] = frozenset()
    # Tested with the language model at hand: no check at first use
    known: bool = False
    # False: a prefix-LM reads the whole prompt in both directions, so no part of it can be computed without the rest
    shares_prefix: bool = True
    # Where `token_type_ids` are 1: nowhere; at images, read in both directions; at the answer, read in one
    token_types: str | None = None
    # The position of the first token
    first_position: int = 0
    # Positions have three axes: time, height and width of an image's patches
    positions_in_three_axes: bool = False
    # Without a chat template: <bos> stands behind the last image and a newline ends the prompt
    bos_behind_image: bool = False
    # Its language model attends to images in layers of their own (Llama-3.2-Vision), which is not computed here
    attends_across: bool = False
    # The name of the language model among the modules; None: the model says which it is
    language: str | None = "language_model"


def _row(*texts: str, **differs: Any) -> Architecture:
    return Architecture(frozenset(texts), **differs)


_FAMILIES = {
    "llama": _row("llama", language="model"),
    "llava": _row("llama", "mistral", "qwen2", "granite", "cohere"),
    "llava_next": _row("llama", "mistral", "qwen2", "granite"),
    "aya_vision": _row("cohere", "cohere2"),
    "internvl": _row("qwen2", "qwen3", "llama"),
    "qwen2_vl": _row("qwen2_vl_text", positions_in_three_axes=True),
    "qwen2_5_vl": _row("qwen2_5_vl_text", positions_in_three_axes=True),
    "qwen3_vl": _row("qwen3_vl_text", positions_in_three_axes=True),
    "idefics3": _row("llama", language="text_model"),
    "smolvlm": _row("llama", language="text_model"),
    # Its mask code reads token types by absolute position: those of a cached prefix must stand in front
    "gemma3": _row("gemma3_text", token_types="image"),
    # Its own positions begin at 1
    "paligemma": _row(
        "gemma", "gemma2", shares_prefix=False, token_types="answer", first_position=1, bos_behind_image=True
    ),
}

# Text-only families without a row, whose layers are split among processes in the tests as well
_SPLIT_TOO = {
    "mistral", "ministral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "granite", "cohere", "smollm3",
}  # fmt: skip


def can_be_split(family: str) -> bool:
    """Return whether splitting among processes is tested for the family (a config's ``model_type``)."""
    return family in _FAMILIES or family in _SPLIT_TOO


def architecture_of(model: Any) -> Architecture:
    """Return the row of the model's family; a family without one takes the generic row and what the model shows."""
    found = _FAMILIES.get(str(model.config.model_type))
    if found is not None:
        return replace(found, known=str(model.config.get_text_config().model_type) in found.texts)
    across = getattr(model.config.get_text_config(), "cross_attention_layers", None)
    three = hasattr(model.base_model, "get_rope_index")
    return Architecture(language=None, positions_in_three_axes=three, attends_across=bool(across))


def language_part(model: Any) -> tuple[str, nn.Module]:
    """Return the full name and the module of the language model in `model` (text-only: what is under its head)."""
    name = architecture_of(model).language
    decoder = None if name else model.get_decoder()
    for path, module in model.named_modules():
        if (path.rpartition(".")[2] == name) if name else (module is decoder):
            return path, module
    return "", model
