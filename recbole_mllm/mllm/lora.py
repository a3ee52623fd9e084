"""Which layers LoRA adapts, and reading and writing adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from recbole_mllm.errors import UserError
from recbole_mllm.mllm.architectures import language_part
from recbole_mllm.settings import LoraSettings

_NEVER = ("lm_head", "projector", "connector", "merger", "embed")


# their fused kernels read `out_proj`'s weight past any adapter; PEFT refuses it (`_check_lora_target_modules_mamba`)
_WITHOUT_OUT_PROJ = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


def _is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer and gives nothing else back, as Llama 4's router does; GPT-2's count too."""
    kind = type(module)
    plain = kind.forward is nn.Linear.forward or kind.__module__.startswith("bitsandbytes.")
    return isinstance(module, Conv1D) or (isinstance(module, nn.Linear) and plain)


def target_modules(model: nn.Module, where: str) -> list[str]:
    """Return the full names of the linear layers to adapt: those of the language model, or of the vision tower too.

    The head, the embeddings and the projector between the two are never adapted (as in the released code).

    Raises:
        UserError: No layer qualifies.
    """
    linear = [name for name, module in model.named_modules() if _is_linear(module)]
    if getattr(getattr(model, "config", None), "model_type", None) in _WITHOUT_OUT_PROJ:
        linear = [name for name in linear if name.rpartition(".")[2] != "out_proj"]
    linear = [name for name in linear if not any(word in name for word in _NEVER)]
    if where == "language":
        part, _ = language_part(model)
        linear = [name for name in linear if name.startswith(part)]
    if not linear:
        raise UserError(f"{type(model).__name__} has no linear layer LoRA could adapt (lora_target: {where})")
    return linear


def adapt(model: nn.Module, settings: LoraSettings, seed: int) -> Any:
    """Return `model` as a PEFT model with a fresh, seeded adapter in float32."""
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=target_modules(model, settings.lora_target),
        task_type=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def adapter_state(adapted: Any) -> dict[str, Tensor]:
    """Return the adapter's tensors alone."""
    return dict(get_peft_model_state_dict(adapted))


def load_adapter_state(adapted: Any, state: dict[str, Tensor]) -> None:
    """Load what `adapter_state` returned.

    Raises:
        UserError: The adapter belongs to another model or other LoRA settings.
    """
    try:
        outcome = set_peft_model_state_dict(adapted, state)
    except RuntimeError as error:
        raise UserError(
            "the checkpoint's adapter has other shapes: was it trained on another model or lora_r?"
        ) from error
    missing = [name for name in outcome.missing_keys if "lora_" in name]
    if missing or outcome.unexpected_keys:
        raise UserError("the checkpoint's adapter fits other layers: was it trained on another model or lora_target?")


def save_adapter(adapted: Any, folder: Path) -> None:
    """Write the adapter as a PEFT folder (safetensors and JSON) that `PeftModel.from_pretrained` reads."""
    adapted.save_pretrained(str(folder))
