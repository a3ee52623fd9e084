"""LLaVA-NeXT models of a given geometry with random weights, made on the device without a file."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import templates
from tiny_models.words import byte_level
from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    MistralConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from recbole_mllm.mllm.loading import Loaded

_WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "[INST]", "[/INST]"]
# the language model, the vision tower, the side of a tile and of a patch in pixels
GEOMETRIES: dict[str, dict[str, Any]] = {
    "llava-1.6-mistral-7b": {
        "text": {"vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768},
        "vision": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        | {"projection_dim": 768},
        "tile": 336,
        "patch": 14,
    },
    "tiny": {
        "text": {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
        | {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096},
        "vision": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4},
        "tile": 96,
        "patch": 8,
    },
}


def build(geometry: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Loaded:
    """Return a model of `geometry` on `device`; its weights never lie anywhere else."""
    tile, patch = geometry["tile"], geometry["patch"]
    grids = [[tile, 2 * tile], [2 * tile, tile], [2 * tile, 2 * tile], [3 * tile, tile], [tile, 3 * tile]]
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    words = byte_level(_WORDS, templates.LLAVA_NEXT, **named)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**geometry["vision"], image_size=tile, patch_size=patch),
        text_config=MistralConfig(**geometry["text"], sliding_window=None, pad_token_id=0),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grids,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    pixels = LlavaNextImageProcessorPil(
        size={"shortest_edge": tile}, crop_size={"height": tile, "width": tile}, image_grid_pinpoints=grids
    )
    processor = LlavaNextProcessor(
        image_processor=pixels,
        tokenizer=words,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=templates.LLAVA_NEXT,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlavaNextForConditionalGeneration(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    return Loaded(model, words, processor, f"random {geometry['text']['num_hidden_layers']} layers")
