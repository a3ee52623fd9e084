"""Text-only families that have no row of their own: they are checked at first use, and split as the others are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer

from tiny_models.llava import llama
from tiny_models.parts import TEXT, write

_SHAPES: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": 24},
    "Ministral": {"head_dim": 16, "sliding_window": 24},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Gemma2": {"head_dim": 16, "sliding_window": 16},
    "Phi3": {},
    "Olmo2": {},
    "Granite": {"logits_scaling": 8.0},
    "Cohere": {"logit_scale": 0.25, "tie_word_embeddings": False},
    "SmolLM3": {},
}


def _builder(name: str, shape: dict[str, Any]) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        words = AutoTokenizer.from_pretrained(llama(folder))
        ends = {"vocab_size": len(words), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        config = getattr(transformers, f"{name}Config")(**TEXT | ends | shape)
        return write(folder, getattr(transformers, f"{name}ForCausalLM"), config, words)

    build.__name__ = name.lower()
    return build


def gemma3_text(folder: Path) -> Path:
    """Write the language model of a Gemma3 alone."""
    words = AutoTokenizer.from_pretrained(llama(folder))
    shape = {"head_dim": 16, "sliding_window": 16, "vocab_size": len(words), "pad_token_id": 0}
    config = transformers.Gemma3TextConfig(**TEXT | shape)
    return write(folder, transformers.Gemma3ForCausalLM, config, words)


TEXT_FAMILIES = (*(_builder(name, shape) for name, shape in _SHAPES.items()), gemma3_text)
