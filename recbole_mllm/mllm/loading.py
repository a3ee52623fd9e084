"""Find and load a model with its processor: the bundled tiny one, a local folder, or a hub id."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from recbole_mllm.errors import UserError
from recbole_mllm.mllm.quantization import quantized

TINY = "tiny"
_WHOLE = 64 * 2**20  # files up to this many bytes are digested whole, larger ones by size, head and tail
_END = 2**20


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in evaluation mode with what turns prompts into its inputs; `processor` is None for a text-only one."""

    model: Any
    tokenizer: Any
    processor: Any | None
    identity: str


def source_of(name: str) -> str:
    """Return the folder of the bundled model for `tiny`, else `name` itself."""
    if name.startswith("server:"):
        raise UserError(f"{name}: a model behind a server cannot be loaded here; give a hub id or a local folder")
    if name == TINY:
        return str(Path(__file__).resolve().parents[1] / "demo" / "tiny")
    return name


def identity_of(name: str, revision: str | None) -> str:
    """Return what names the weights: a digest of a folder's files, or a hub id with its commit."""
    folder = Path(source_of(name))
    if not folder.is_dir():
        return f"{name}@{revision or 'main'}"
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}:{size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(min(size, _WHOLE) if size <= _WHOLE else _END))
            if size > _WHOLE:
                file.seek(-_END, 2)
                digest.update(file.read())
    return f"{folder.name}#{digest.hexdigest()[:16]}"


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype `name` stands for; ``auto`` is float32 on CPU and bfloat16 elsewhere."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def load(
    name: str, dtype: torch.dtype, device: torch.device, *, trust_remote_code: bool = False, four_bit: bool = False
) -> Loaded:
    """Load `name` for inference, its linear layers in four bits where asked for.

    Raises:
        UserError: The name is neither a folder nor a model id that can be had, or no auto class knows it.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    source = source_of(name)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        sees = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        extra = quantized(dtype, device) if four_bit else {}
        model = auto.from_pretrained(source, dtype=dtype, trust_remote_code=trust_remote_code, **extra).eval()
        model = model if four_bit else model.to(device)
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code) if sees else None
        tokenizer = (
            processor.tokenizer
            if processor is not None
            else AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model {name!r} cannot be loaded: {reason}; give a hub id, a local folder, or `tiny`"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.requires_grad_(False)
    return Loaded(model, tokenizer, processor, identity_of(name, getattr(config, "_commit_hash", None)))
