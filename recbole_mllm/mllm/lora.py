"""What is trained of a model: an adapter, or the parameters themselves; how that is saved and loaded alone."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from recbole_mllm.common.errors import UserError, first_line
from recbole_mllm.common.files import write_text
from recbole_mllm.common.settings import LoraSettings
from recbole_mllm.mllm import sharding
from recbole_mllm.mllm.families import language_part
from recbole_mllm.mllm.placement import check_trainable

# PEFT reads it of transformers 5.23
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

TRAINED, DESCRIPTION = "trained.safetensors", "trained.json"
_NEVER = ("lm_head", "projector", "connector", "merger", "embed")
# their fused kernels read `out_proj`'s weight past any adapter; PEFT refuses it (`_check_lora_target_modules_mamba`)
_WITHOUT_OUT_PROJ = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


def check_finetune(settings: LoraSettings, device: torch.device) -> None:
    """Refuse what this machine cannot train, before anything is loaded.

    Raises:
        UserError: ``finetune: qlora`` without bitsandbytes, or on a device it has nothing for; or something that
            cannot be split among processes here.
    """
    if (how := sharding.wanted()) and settings.finetune in ("full", "qlora"):
        raise UserError(f"finetune: {settings.finetune} cannot be split by {how} here; set finetune: lora")
    if settings.finetune != "qlora":
        return
    try:
        functional = importlib.import_module("bitsandbytes.functional")
    except ImportError:
        raise UserError(
            'finetune: qlora needs bitsandbytes: pip install "recbole-mllm[qlora]", or set finetune: lora'
        ) from None
    try:  # with a few numbers
        packed, state = functional.quantize_4bit(torch.ones(64, 64, device=device), quant_type="nf4")
        functional.dequantize_4bit(packed, state)
    except (RuntimeError, AssertionError, NotImplementedError, AttributeError, OSError, ValueError) as error:
        raise UserError(
            f"finetune: qlora cannot run on {device}, as bitsandbytes fails there ({first_line(error)}); "
            "set finetune: lora"
        ) from None


def tune(model: Any, settings: LoraSettings, seed: int, revision: str | None = None) -> Any:
    """Return `model`, a hub's `revision` if given, with what ``finetune`` trains ready to be trained, in float32.

    Raises:
        UserError: Some of its weights are offloaded, or no layer qualifies for an adapter.
    """
    if settings.finetune == "none":
        return model
    check_trainable(model)
    if settings.finetune != "full":
        return adapt(model, settings, seed, revision)
    language = [*language_part(model)[1].parameters(), *model.get_output_embeddings().parameters()]
    for parameter in model.parameters() if settings.lora_target == "all" else language:
        # master weights: half precision would round small steps away; the forward pass is cast by autocast
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return model


def adapt(model: nn.Module, settings: LoraSettings, seed: int, revision: str | None = None) -> Any:
    """Return `model` as a PEFT model with a fresh, seeded adapter in float32."""
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=target_modules(model, settings.lora_target),
        task_type=None,
        revision=revision,  # which base an adapter's folder asks for
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def target_modules(model: nn.Module, where: str) -> list[str]:
    """Return the full names of the linear layers to adapt: those of the language model, or of the vision tower too.

    The head, the embeddings and the projector between the two are never adapted (as in the released code).

    Raises:
        UserError: No layer qualifies.
    """
    never: tuple[str, ...] = _NEVER
    if getattr(getattr(model, "config", None), "model_type", None) in _WITHOUT_OUT_PROJ:
        never += ("out_proj",)
    part = language_part(model)[0] if where == "language" else ""
    linear = [name for name, module in model.named_modules() if _is_linear(module) and name.startswith(part)]
    linear = [name for name in linear if not any(word in name for word in never)]
    if not linear:
        raise UserError(f"{type(model).__name__} has no linear layer LoRA could adapt (lora_target: {where})")
    return linear


def _is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer and gives nothing else back, as Llama 4's router does; GPT-2's count too."""
    kind = type(module)
    plain = kind.forward is nn.Linear.forward or kind.__module__.startswith("bitsandbytes.")
    return isinstance(module, Conv1D) or (isinstance(module, nn.Linear) and plain)


def trained_state(model: Any) -> dict[str, Tensor]:
    """Return the tensors that are trained, and no other."""
    if hasattr(model, "peft_config"):
        return dict(get_peft_model_state_dict(model))
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_trained_state(model: Any, state: dict[str, Tensor]) -> None:
    """Load what `trained_state` returned.

    Raises:
        UserError: It belongs to another model or was trained with other settings.
    """
    if hasattr(model, "peft_config"):
        try:
            outcome = set_peft_model_state_dict(model, state)
        except RuntimeError as error:
            raise UserError(
                "the checkpoint's adapter has other shapes: was it trained on another model or lora_r?"
            ) from error
        if outcome.unexpected_keys or any("lora_" in name for name in outcome.missing_keys):
            raise UserError(
                "the checkpoint's adapter fits other layers: was it trained on another model or lora_target?"
            )
        return
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own):
        raise UserError(
            "the checkpoint's parameters are not those trained here: was it another model, finetune or lora_target?"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def save_trained(model: Any, folder: Path, identity: str) -> None:
    """Write what is trained: a PEFT folder, or a fully tuned model's trained parameters as safetensors with a JSON."""
    if hasattr(model, "peft_config"):
        model.save_pretrained(str(folder))
        return
    state = {name: tensor.contiguous().cpu() for name, tensor in trained_state(model).items()}
    save_file(state, folder / TRAINED, metadata={"format": "pt"})
    about = {"base": identity, "tensors": len(state), "parameters": sum(tensor.numel() for tensor in state.values())}
    write_text(folder / DESCRIPTION, json.dumps(about, indent=2) + "\n")
