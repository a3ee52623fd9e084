"""QLoRA's base model: linear layers in four bits."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig


def quantized(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return what ``from_pretrained`` needs for QLoRA's 4-bit NormalFloat; head and vision side stay as they are."""
    whole = ["lm_head", r".*(?:vision|visual|image|projector|connector|merger)[^.]*"]
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=whole,
    )
    return {"quantization_config": how, "device_map": {"": device}}
