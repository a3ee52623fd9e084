"""Gemma3 (sliding windows, images read in both directions) and PaliGemma (the whole prompt read in both directions)."""

from pathlib import Path
from typing import Any

from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tiny_models import templates
from tiny_models.parts import HALF, TEXT, VISION, ids, made_once, write
from tiny_models.words import gemma_sentencepiece

_TURNS = ["<start_of_turn>", "<end_of_turn>"]
_NAMED = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}


@made_once
def gemma3(folder: Path) -> Path:
    """Write a Gemma3 whose sliding window is shorter than a prompt."""
    words = gemma_sentencepiece(templates.GEMMA3, extra_special_tokens=_NAMED)
    words.add_special_tokens({"additional_special_tokens": [*_TURNS, *_NAMED.values()]})
    text = TEXT | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24, "vocab_size": len(words)}
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        # a cap that Gemma3's own forward pass with images passes over, unlike the text-only one's
        text_config=Gemma3TextConfig(**text, layer_types=layers, final_logit_softcapping=0.5),
        mm_tokens_per_image=4,
        **ids(
            words,
            boi_token_index=_NAMED["boi_token"],
            eoi_token_index=_NAMED["eoi_token"],
            image_token_index=_NAMED["image_token"],
        ),
    )
    pixels = Gemma3ImageProcessorPil(size={"height": 32, "width": 32}, **HALF)
    told = {"processor_class": "Gemma3Processor", "image_seq_length": 4}
    return write(folder, Gemma3ForConditionalGeneration, config, words, pixels, **told)


@made_once
def paligemma(folder: Path, text: Any = GemmaConfig, **shape: Any) -> Path:
    """Write a PaliGemma; it has no chat template."""
    words = gemma_sentencepiece(None)
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    words.add_tokens([f"<loc{i:0>4}>" for i in range(1024)] + [f"<seg{i:0>3}>" for i in range(128)])
    sizes = TEXT | {"head_dim": 16, "vocab_size": len(words), "pad_token_id": 0}
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=text(**sizes | shape),
        **ids(words, image_token_index="<image>"),
        projection_dim=64,
        hidden_size=64,
    )
    pixels = SiglipImageProcessorPil(size={"height": 32, "width": 32}, image_seq_length=16, **HALF)
    pixels.image_seq_length = 16
    return write(folder, PaliGemmaForConditionalGeneration, config, words, pixels, processor_class="PaliGemmaProcessor")
