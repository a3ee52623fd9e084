"""Idefics3 and SmolVLM: images cut into rows and columns of tiles, each behind a token of its own."""

from pathlib import Path
from typing import Any

from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tiny_models import templates
from tiny_models.parts import HALF, TEXT, VISION, ids, made_once, write
from tiny_models.words import byte_level

_SPECIAL = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
_SPECIAL += [f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)]


def _write(folder: Path, model: Any, config: Any, pixels: Any, start: str, template: str) -> Path:
    special = ["<pad>", start, "<|im_end|>", *_SPECIAL]
    words = byte_level(special, template, bos_token=start, eos_token="<end_of_utterance>", pad_token="<pad>")
    made = config(
        vision_config=VISION,
        text_config=LlamaConfig(vocab_size=len(words), **TEXT, pad_token_id=0, bos_token_id=1, eos_token_id=5),
        scale_factor=2,
        **ids(words, image_token_id="<image>"),
    )
    name = model.__name__.replace("ForConditionalGeneration", "Processor")
    image_processor = pixels(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, **HALF)
    return write(folder, model, made, words, image_processor, processor_class=name, image_seq_len=4)


@made_once
def idefics3(folder: Path) -> Path:
    """Write an Idefics3."""
    parts = Idefics3ForConditionalGeneration, Idefics3Config, Idefics3ImageProcessorPil
    return _write(folder, *parts, "<|begin_of_text|>", templates.IDEFICS3)


@made_once
def smolvlm(folder: Path) -> Path:
    """Write a SmolVLM."""
    parts = SmolVLMForConditionalGeneration, SmolVLMConfig, SmolVLMImageProcessorPil
    return _write(folder, *parts, "<|im_start|>", templates.SMOLVLM)
