"""Families over another language model than their first: what that one's class does to its logits, they may not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from tiny_models import templates
from tiny_models.gemma import paligemma
from tiny_models.llava import internvl, llava, llava_next
from tiny_models.parts import HALF, TEXT, VISION, ids, made_once, write
from tiny_models.words import byte_level


@made_once
def aya_vision(folder: Path, text: Any = Cohere2Config, **shape: Any) -> Path:
    """Write an Aya Vision, whose images are cut into up to three tiles and an overview, each behind a token."""
    special = ["<PAD>", "<BOS>", "<EOS>", "<|im_start|>", "<|im_end|>", "<image>", "TILE", "TILE_GLOBAL"]
    special += [f"<|{name}|>" for name in ("START_OF_IMG", "END_OF_IMG", "IMG_PATCH", "IMG_LINE_BREAK")]
    named = {"bos_token": "<BOS>", "eos_token": "<EOS>", "pad_token": "<PAD>"}
    words = byte_level(special, templates.INTERNVL.replace("<IMG_CONTEXT>", "<image>"), **named)
    sizes = {"vocab_size": len(words), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "logit_scale": 0.25}
    config = AyaVisionConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=text(**TEXT | sizes | shape),
        **ids(words, image_token_index="<|IMG_PATCH|>"),
    )
    pixels = GotOcr2ImageProcessorPil(
        size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=3, **HALF
    )
    told = {"processor_class": "AyaVisionProcessor", "patch_size": 8, "img_size": 32, "downsample_factor": 2}
    return write(folder, AyaVisionForConditionalGeneration, config, words, pixels, **told)


def _over(build: Callable[..., Path], text: Any, **shape: Any) -> Callable[[Path], Path]:
    def built(folder: Path) -> Path:
        return build(folder, text=text, **shape)

    built.__name__ = f"{build.__name__}_{text.model_type}"
    return built


_WINDOW = {"head_dim": 16, "sliding_window": 24}
PAIRS = (
    _over(llava, CohereConfig, logit_scale=0.25),
    _over(llava, GraniteConfig, logits_scaling=8.0, embedding_multiplier=3.0, residual_multiplier=0.5),
    _over(llava, MistralConfig, **_WINDOW),
    _over(llava, Qwen2Config),
    _over(llava_next, GraniteConfig, logits_scaling=8.0),
    _over(llava_next, MistralConfig, **_WINDOW),
    _over(llava_next, Qwen2Config),
    _over(
        aya_vision,
        Cohere2Config,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    _over(aya_vision, CohereConfig),
    _over(internvl, Qwen3Config, head_dim=16),
    _over(internvl, LlamaConfig),
    # a cap that PaliGemma's own forward pass applies, unlike Gemma3's
    _over(paligemma, Gemma2Config, sliding_window=24, query_pre_attn_scalar=16, final_logit_softcapping=0.5),
)
