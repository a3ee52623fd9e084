"""Released models' sizes, as configurations without weights: what a plan counts of the presets' models.

Qwen3-VL-8B's and Qwen2.5-VL-3B's are those of stored copies of their config.json; the others are from memory, checked
against the size of the released files where a stored hub page shows it (`FILES`).
"""

from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, LlavaNextProcessor
from transformers.image_processing_utils import select_best_resolution
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from recbole_mllm.plan.cost import ModelSizes


def _qwen(width: int, inner: int, layers: int, heads: int, keys: int, vocabulary: int = 151936) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": vocabulary,
    }


def _qwen3_vl(text: dict[str, Any], *, large: bool = False) -> tuple[str, dict[str, Any]]:
    tower = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
    if large:
        tower = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
    text = text | {"head_dim": 128, "rope_parameters": {"rope_type": "default", "mrope_section": [24, 20, 20]}}
    vision = tower | {"out_hidden_size": text["hidden_size"], "num_heads": 16, "patch_size": 16}
    return "Qwen3VLConfig", {"text_config": text, "vision_config": vision, "tie_word_embeddings": not large}


def _qwen2_5_vl(text: dict[str, Any], *, tied: bool) -> tuple[str, dict[str, Any]]:
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": text["hidden_size"]}
    text = text | {"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]}}
    return "Qwen2_5_VLConfig", {"text_config": text, "vision_config": vision, "tie_word_embeddings": tied}


_SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
_SIGLIP_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}


def _smolvlm(text: dict[str, Any], tower: dict[str, Any], side: int, scale: int) -> tuple[str, dict[str, Any]]:
    patch = 14 if tower is _SIGLIP else 16
    text = text | {"model_type": "llama", "pad_token_id": 2}
    vision = tower | {"image_size": side, "patch_size": patch}
    shape = {"text_config": text, "vision_config": vision, "scale_factor": scale, "image_token_id": 49190}
    return "SmolVLMConfig", shape | {"tie_word_embeddings": False}


def _internvl(text: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    text = text | {"model_type": "qwen3", "head_dim": 128}
    return "InternVLConfig", {
        "text_config": text,
        "tie_word_embeddings": False,
    }  # the tower is the default: InternViT-300M


# A preset, the gigabytes of its released safetensors, and the bytes of a number in them
FILES = [
    ("qwen3-vl-2b", 4.26, 2),
    ("qwen2.5-vl-3b", 7.51, 2),
    ("smolvlm2-500m", 2.03, 4),
    ("smolvlm2-2.2b", 8.99, 4),
    ("internvl3.5-8b", 17.1, 2),
]
# By preset
RELEASED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-vl-2b": _qwen3_vl(_qwen(2048, 6144, 28, 16, 8)),
    "qwen3-vl-4b": _qwen3_vl(_qwen(2560, 9728, 36, 32, 8)),
    "qwen3-vl-8b": _qwen3_vl(_qwen(4096, 12288, 36, 32, 8), large=True),
    "qwen3-vl-reranker-2b": _qwen3_vl(_qwen(2048, 6144, 28, 16, 8)),
    "qwen2.5-vl-3b": _qwen2_5_vl(_qwen(2048, 11008, 36, 16, 2), tied=True),
    "qwen2.5-vl-7b": _qwen2_5_vl(_qwen(3584, 18944, 28, 28, 4, 152064), tied=False),
    "smolvlm-256m": _smolvlm(_qwen(576, 1536, 30, 9, 3, 49280), _SIGLIP_BASE, 512, 4),
    "smolvlm2-500m": _smolvlm(_qwen(960, 2560, 32, 15, 5, 49280), _SIGLIP_BASE, 512, 4),
    "smolvlm2-2.2b": _smolvlm(_qwen(2048, 8192, 24, 32, 32, 49280), _SIGLIP, 384, 3),
    "gemma-3-4b": (
        "Gemma3Config",
        {
            "text_config": _qwen(2560, 10240, 34, 8, 4, 262208) | {"head_dim": 256},
            "vision_config": _SIGLIP | {"image_size": 896, "patch_size": 14, "vision_use_head": False},
        },
    ),
    "internvl3.5-2b": _internvl(_qwen(2048, 6144, 28, 16, 8)),
    "internvl3.5-8b": _internvl(_qwen(4096, 12288, 36, 32, 8)),
    "llava-1.6-mistral-7b": (
        "LlavaNextConfig",
        {
            "text_config": _qwen(4096, 14336, 32, 32, 8, 32064) | {"model_type": "mistral", "head_dim": 128},
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": 336,
                "patch_size": 14,
                "projection_dim": 768,
            },
        },
    ),
}


def sizes_of(preset: str) -> tuple[Any, ModelSizes]:
    """Return the model of a preset on the meta device, and what a plan reads of it."""
    name, shape = RELEASED[preset]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(getattr(transformers, name)(**shape))
    model.tie_weights()
    return model, ModelSizes.of(model)


def image_tokens(preset: str, width: int = 400, height: int = 600) -> int:
    """Return the tokens of an image's patches by the released processor's settings, without those between tiles."""
    picture = [Image.new("RGB", (width, height))]
    if preset.startswith("qwen"):
        patch, least = (16, 2**16) if preset.startswith("qwen3") else (14, 56 * 56)
        size = {"shortest_edge": least, "longest_edge": 2**24}
        grid = Qwen2VLImageProcessorPil(patch_size=patch, size=size)(picture, return_tensors="np")["image_grid_thw"][0]
        return int(grid.prod()) // 4
    if preset.startswith("smolvlm"):
        side = RELEASED[preset][1]["vision_config"]["image_size"]
        sizes = {"size": {"longest_edge": 4 * side}, "max_image_size": {"longest_edge": side}}
        tiles = SmolVLMImageProcessorPil(**sizes)(picture, return_tensors="np")["pixel_values"].shape[1]
        return int(tiles) * {512: 64, 384: 81}[side]
    if preset.startswith("internvl"):
        pixels = GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}, crop_to_patches=True)
        return 256 * len(pixels(picture, return_tensors="np")["pixel_values"])
    if preset.startswith("gemma"):
        return 256
    grids = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    rows, columns = (side // 336 for side in select_best_resolution((height, width), grids))
    count = LlavaNextProcessor._get_unpadded_features
    return 24 * 24 + sum(count(None, height, width, 24, 24, rows, columns))
