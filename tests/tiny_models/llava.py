"""Text-only Llama, and the families that put a CLIP or SigLIP tower in front of one."""

from pathlib import Path
from typing import Any

from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tiny_models import templates
from tiny_models.parts import HALF, TEXT, VISION, ids, made_once, write
from tiny_models.words import byte_level, llama_sentencepiece

_NAMED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
_TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
_MISTRAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "[INST]", "[/INST]"]


@made_once
def llama(folder: Path, **shape: int) -> Path:
    """Write a text-only Llama with a byte-level BPE tokeniser; `shape` is the configuration's."""
    words = byte_level([w for w in _MISTRAL if w != "<image>"], templates.MISTRAL_TEXT, **_NAMED)
    config = LlamaConfig(vocab_size=len(words), **TEXT | shape, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return write(folder, LlamaForCausalLM, config, words)


@made_once
def llava(folder: Path, side: int = 32, text: Any = LlamaConfig, **shape: Any) -> Path:
    """Write a Llava of a SigLIP tower and a Llama with a SentencePiece tokeniser, which puts <s> in front itself.

    `side` is that of an image in pixels, always cut into 16 patches; `text` another language model, with its `shape`.
    """
    words = llama_sentencepiece(templates.LLAVA)
    words.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<image>"]})
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(
            **VISION | {"image_size": side, "patch_size": side // 4}, vision_use_head=False
        ),
        text_config=text(**TEXT | {"vocab_size": len(words), "bos_token_id": 1, "eos_token_id": 2} | shape),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    pixels = SiglipImageProcessorPil(size={"height": side, "width": side}, **HALF)
    told = {
        "processor_class": "LlavaProcessor",
        "patch_size": side // 4,
        "vision_feature_select_strategy": "full",
        "num_additional_image_tokens": 0,
    }
    return write(folder, LlavaForConditionalGeneration, config, words, pixels, **told)


@made_once
def llava_next(
    folder: Path, layers: int = 3, width: int = 64, tile: int = 32, text: Any = LlamaConfig, **shape: Any
) -> Path:
    """Write a LLaVA-NeXT whose images are an overview and up to four tiles; `tile` is the side of one in pixels."""
    words = byte_level(_MISTRAL, templates.LLAVA_NEXT, **_NAMED)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    sizes |= {"vocab_size": len(words), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION | _TOWER | {"image_size": tile}),
        text_config=text(**TEXT | sizes | shape),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=_grids(tile),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    pixels = LlavaNextImageProcessorPil(
        size={"shortest_edge": tile}, crop_size={"height": tile, "width": tile}, image_grid_pinpoints=_grids(tile)
    )
    told = {
        "processor_class": "LlavaNextProcessor",
        "patch_size": 8,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    return write(folder, LlavaNextForConditionalGeneration, config, words, pixels, **told)


def _grids(tile: int) -> list[list[int]]:
    """The benchmark's larger tiles always come in fours: about 740 image tokens at 96 pixels."""
    return [[64, 64]] + [[32, 64], [64, 32]] if tile == 32 else [[2 * tile, 2 * tile]]


@made_once
def internvl(folder: Path, text: Any = Qwen2Config, **shape: Any) -> Path:
    """Write an InternVL with a Qwen2, byte-level BPE, images cut into up to three tiles."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    marks = {"start_image_token": "<img>", "end_image_token": "</img>"}
    marks |= {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "extra_special_tokens": marks}
    words = byte_level(special, templates.INTERNVL, **named)
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**VISION | {"image_size": [32, 32], "patch_size": [8, 8]}),
        text_config=text(
            **TEXT | {"vocab_size": len(words), "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0} | shape
        ),
        **ids(words, image_token_id="<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    pixels = GotOcr2ImageProcessorPil(
        size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=3, **HALF
    )
    told = {"processor_class": "InternVLProcessor", "image_seq_length": 4}
    return write(folder, InternVLForConditionalGeneration, config, words, pixels, **told)
