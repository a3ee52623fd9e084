"""Load a model with its processor by transformers' auto classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from recbole_mllm.errors import UserError
from recbole_mllm.mllm.dispatching import check_room
from recbole_mllm.mllm.processors import load_processor
from recbole_mllm.mllm.quantization import compute_as_asked, quantized
from recbole_mllm.mllm.sources import TINY, gguf_of, identity_of, source_of

__all__ = ["TINY", "Loaded", "dtype_of", "identity_of", "load", "source_of"]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in evaluation mode with what turns prompts into its inputs; `processor` is None for a text-only one."""

    model: Any
    tokenizer: Any
    processor: Any | None
    identity: str


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype `name` stands for; ``auto`` is float32 on CPU and bfloat16 elsewhere."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def load(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    trust_remote_code: bool = False,
    four_bit: bool = False,
    placed: Mapping[str, Any] | None = None,
) -> Loaded:
    """Load `name` for inference, its linear layers in four bits where asked for.

    `placed` says where its layers go (see `dispatching.placement`); else all go to `device`.

    Raises:
        UserError: The name is neither a folder nor a model id that can be had, or no auto class knows it.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    source = source_of(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if (file := gguf_of(source)) is not None:
        source, options["gguf_file"] = str(file.parent), file.name
    try:
        config = AutoConfig.from_pretrained(source, **options)
        sees = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and file is None
        auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        extra = (quantized(dtype, device) if four_bit else {}) | dict(placed or {})
        model = auto.from_pretrained(source, dtype=dtype, **options, **extra).eval()
        model = model if four_bit or placed else model.to(device)
        check_room(model, device)
        processor = load_processor(source, **options) if sees else None
        tokenizer = processor.tokenizer if processor is not None else AutoTokenizer.from_pretrained(source, **options)
    except (ImportError, OSError, ValueError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"model {name!r} cannot be loaded: {reason}; give a hub id, a local folder, a .gguf file, or `tiny`"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    compute_as_asked(model)
    model.requires_grad_(False)
    return Loaded(model, tokenizer, processor, identity_of(name, getattr(config, "_commit_hash", None)))
