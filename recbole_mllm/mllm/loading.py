"""Load a model with its processor by transformers' auto classes."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from recbole_mllm.errors import UserError
from recbole_mllm.mllm.architectures import language_part
from recbole_mllm.mllm.dispatching import check_room
from recbole_mllm.mllm.processors import changed, load_processor
from recbole_mllm.mllm.quantization import compute_as_asked, quantized
from recbole_mllm.mllm.sources import TINY, gguf_of, identity_of, source_of

__all__ = ["TINY", "Loaded", "dtype_of", "identity_of", "load", "source_of"]

# What reading a folder that is damaged, or no model's, may raise
UNREADABLE = (ImportError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)


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


def family_of(name: str, *, trust_remote_code: bool = False) -> str | None:
    """Return the family (``model_type``) that the configuration of `name` says; None where there is none to read."""
    source = source_of(name)
    if gguf_of(source) is not None:
        return None
    try:
        return str(AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code).model_type)
    except UNREADABLE:  # said when it is loaded
        return None


def load_images_processor(name: str, *, trust_remote_code: bool = False) -> Any:
    """Return the processor of `name`, without its weights; None for a model of text alone or one that cannot be had."""
    try:
        source = source_of(name)
        if gguf_of(source) is not None:
            return None
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            return None
        return load_processor(source, trust_remote_code=trust_remote_code)
    except (UserError, *UNREADABLE):  # said when it is loaded
        return None


def load(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    trust_remote_code: bool = False,
    four_bit: bool = False,
    placed: Mapping[str, Any] | None = None,
    weights: bool = True,
) -> Loaded:
    """Load `name` for inference, its linear layers in four bits where asked for.

    `placed` says where its layers go (see `dispatching.placement`); else all go to `device`. Without `weights` only
    small files are read, and the model is on the meta device: it has shapes and no numbers.

    Raises:
        UserError: The name is neither a folder nor a model id that can be had, no auto class knows it, or it has not
            all of its weights.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # what `accelerate launch` sets for FSDP: all but the first process would wait for Accelerate to send them weights
    os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
    source = source_of(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if (file := gguf_of(source)) is not None:
        source, options["gguf_file"] = str(file.parent), file.name
    try:
        config = AutoConfig.from_pretrained(source, **options)
        sees = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and file is None
        auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        extra = (quantized(dtype, device) if four_bit else {}) | dict(placed or {})
        if weights:
            with _without_bar() if file is not None else nullcontext():
                model, found = auto.from_pretrained(source, dtype=dtype, output_loading_info=True, **options, **extra)
            _check_weights(name, model.eval(), found["missing_keys"])
            model = model if four_bit or placed else model.to(device)
            check_room(model, device)
        else:
            with torch.device("meta"):
                model = auto.from_config(config, trust_remote_code=trust_remote_code).eval()
            model.tie_weights()
        processor = load_processor(source, **options) if sees else None
        tokenizer = processor.tokenizer if processor is not None else AutoTokenizer.from_pretrained(source, **options)
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"model {name!r} cannot be loaded: {_reason(error, Path(source))}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    compute_as_asked(model)
    model.requires_grad_(False)
    return Loaded(model, tokenizer, processor, identity_of(name, getattr(config, "_commit_hash", None)))


def _without_bar() -> AbstractContextManager[None]:
    """Let a .gguf file be read without a bar: its reader asks tqdm itself, not transformers', which is silent."""
    return changed(import_module("transformers.modeling_gguf_pytorch_utils"), "tqdm", transformers_logging.tqdm)


def _check_weights(name: str, model: Any, missing: Collection[str]) -> None:
    """Refuse a language model with weights left at random, which would answer anything; tell of others.

    A vision tower may have parts that are made and never run (SigLIP's head), and that no file holds.

    Raises:
        UserError: There are such weights.
    """
    if not missing:
        return
    listed = f"{len(missing)} of its weights are in no file ({', '.join(sorted(missing)[:3])}, ...)"
    part, _ = language_part(model)
    if any(key.startswith(f"{part}." if part else "") or "lm_head" in key for key in missing):
        raise UserError(f"model {name!r} is not whole: {listed}, or have other names than its config.json asks for")
    logging.getLogger().warning(f"model {name!r}: {listed} and are left at random; is the download complete?")


def _reason(error: Exception, folder: Path) -> str:
    """Return why a model cannot be loaded, and what to give in its place."""
    if (folder / "adapter_config.json").is_file():
        with suppress(OSError, ValueError, AttributeError):
            about = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            base = about.get("base_model_name_or_path")
            return (
                f"it is an adapter of {base!r}, no whole model; `recbole-mllm export RUN --out DIR --merge` writes one"
            )
    reason = next((line for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, torch.OutOfMemoryError):
        return f"{reason}; take a smaller model, or dtype: bfloat16"
    if isinstance(error, ImportError) and reason:
        return f"{reason.partition('. ')[0]}; install what it asks for"
    if isinstance(error, OSError | ValueError) and reason:
        return f"{reason}; give a hub id, a local folder, a .gguf file, or `tiny`"
    if "ignore_mismatched_sizes" in reason:
        reason = "its weights have other shapes than its config.json says"
    return f"its files are damaged or do not belong together ({type(error).__name__}: {reason})"
