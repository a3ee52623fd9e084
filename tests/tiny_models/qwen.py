"""Qwen-VL in three generations: images of any size, positions in three axes."""

from pathlib import Path
from typing import Any

from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tiny_models import templates
from tiny_models.parts import HALF, TEXT, ids, made_once, write
from tiny_models.words import byte_level

_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"]
_SPECIAL += ["<|image_pad|>", "<|video_pad|>"]
_TOWER = {"num_heads": 2, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}


def _qwen(folder: Path, model: Any, config: Any, vision: dict[str, Any], text: dict[str, Any]) -> Path:
    template = templates.QWEN3_VL if config is Qwen3VLConfig else templates.QWEN2_VL
    words = byte_level(_SPECIAL, template, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    marks = {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    made = config(
        vision_config=_TOWER | vision,
        text_config={"vocab_size": len(words), **TEXT, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0} | text,
        **ids(words, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>", **marks),
    )
    pixels = Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64}, **HALF
    )
    return write(folder, model, made, words, pixels)


def _rope(*sections: int) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}}


@made_once
def qwen2_vl(folder: Path) -> Path:
    """Write a Qwen2-VL."""
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64}
    return _qwen(folder, Qwen2VLForConditionalGeneration, Qwen2VLConfig, vision, _rope(2, 3, 3))


@made_once
def qwen2_5_vl(folder: Path) -> Path:
    """Write a Qwen2.5-VL: one layer of its tower attends within windows."""
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64}
    vision |= {"window_size": 32, "fullatt_block_indexes": [1]}
    return _qwen(folder, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, vision, _rope(2, 3, 3))


@made_once
def qwen3_vl(folder: Path) -> Path:
    """Write a Qwen3-VL: features of two layers of its tower are added inside the language model."""
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64}
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    text = _rope(2, 3, 3) | {"head_dim": 16}
    text["rope_parameters"]["mrope_interleaved"] = True
    return _qwen(folder, Qwen3VLForConditionalGeneration, Qwen3VLConfig, vision, text)
