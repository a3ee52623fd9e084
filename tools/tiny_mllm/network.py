"""The tiny LLaVA: SigLIP's vision tower, one projector, and a small Llama; 2.7 million parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tiny_mllm.language import BOS, EOS, IMAGE_ID, PAD
from tiny_mllm.settings import IMAGE_SIDE, IMAGE_TOKENS, PATCH

VISION_WIDTH = 128


def build(vocabulary: int, seed: int) -> Any:
    """Return a freshly drawn model; the same seed draws the same weights."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    torch.manual_seed(seed)
    vision = SiglipVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        initializer_range=0.05,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=IMAGE_ID,
            image_seq_length=IMAGE_TOKENS,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            tie_word_embeddings=True,
        )
    )
    model.tie_weights()
    return model


def seen(model: Any, pixels: Tensor) -> Tensor:
    """Return ``[B, 16, 128]``, what the vision tower makes of `pixels` ``[B, 3, 64, 64]``."""
    states: Tensor = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    return states


def projected(model: Any, pixels: Tensor) -> Tensor:
    """Return ``[B, 16, 192]``, what the language model is given for `pixels`."""
    features: Tensor = model.model.multi_modal_projector(seen(model, pixels))
    return features


def language_parameters(model: Any) -> Iterator[nn.Parameter]:
    """Yield the language model's parameters."""
    for name, parameter in model.named_parameters():
        if "language_model" in name or "lm_head" in name:
            yield parameter
