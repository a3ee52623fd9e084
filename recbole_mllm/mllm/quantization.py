"""QLoRA's base model: linear layers in four bits, and back."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from recbole_mllm.errors import UserError


def check_four_bits(device: torch.device) -> None:
    """Refuse QLoRA where it cannot run: quantise a few numbers on `device` to see.

    Raises:
        UserError: There is no bitsandbytes, or it has nothing for this device.
    """
    try:
        functional = importlib.import_module("bitsandbytes.functional")
    except ImportError:
        raise UserError(
            'finetune: qlora needs bitsandbytes: pip install "recbole-mllm[qlora]", or set finetune: lora'
        ) from None
    try:
        packed, state = functional.quantize_4bit(torch.ones(64, 64, device=device), quant_type="nf4")
        functional.dequantize_4bit(packed, state)
    except (RuntimeError, AssertionError, NotImplementedError, AttributeError, OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"finetune: qlora cannot run on {device}, as bitsandbytes fails there ({reason}); set finetune: lora"
        ) from None


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


def compute_as_asked(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking weights for CPUs with AVX512-BF16 at their first use in evaluation.

    Repacked weights compute in bfloat16 whatever the compute dtype is, and have no gradient: training after a
    validation would learn nothing through them, and say nothing (bitsandbytes 0.50: ``matmul_4bit``).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (its type is not known)


def dequantized(model: Any) -> Any:
    """Return `model` with the weights its four bits stand for, which are those its adapter was trained on."""
    return model.dequantize().requires_grad_(False)
