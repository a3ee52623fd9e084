"""What is trained of a model: an adapter, or the parameters themselves; how that is saved and loaded alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from recbole_mllm.errors import UserError
from recbole_mllm.files import write_text
from recbole_mllm.mllm import splitting
from recbole_mllm.mllm.architectures import language_part
from recbole_mllm.mllm.dispatching import check_trainable
from recbole_mllm.mllm.lora import adapt, adapter_state, load_adapter_state, save_adapter
from recbole_mllm.mllm.quantization import check_four_bits
from recbole_mllm.settings import LoraSettings

TRAINED, DESCRIPTION = "trained.safetensors", "trained.json"


def check_finetune(settings: LoraSettings, device: torch.device) -> None:
    """Refuse what this machine cannot train, before anything is loaded.

    Raises:
        UserError: ``finetune: qlora`` without bitsandbytes, or on a device it has nothing for; or something that
            FSDP cannot split here.
    """
    if (how := splitting.wanted()) and settings.finetune in ("full", "qlora"):
        raise UserError(f"finetune: {settings.finetune} cannot be split by {how} here; set finetune: lora")
    if settings.finetune == "qlora":
        check_four_bits(device)


def tune(model: Any, settings: LoraSettings, seed: int) -> Any:
    """Return `model` with what ``finetune`` trains ready to be trained, in float32.

    Raises:
        UserError: Some of its weights are offloaded.
    """
    if settings.finetune == "none":
        return model
    check_trainable(model)
    if settings.finetune != "full":
        return adapt(model, settings, seed)
    for parameter in model.parameters() if settings.lora_target == "all" else _language(model):
        # master weights: half precision would round small steps away; the forward pass is cast by autocast
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return model


def _language(model: Any) -> list[nn.Parameter]:
    return [*language_part(model)[1].parameters(), *model.get_output_embeddings().parameters()]


def trained_state(model: Any) -> dict[str, Tensor]:
    """Return the tensors that are trained, and no other."""
    if hasattr(model, "peft_config"):
        return adapter_state(model)
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_trained_state(model: Any, state: dict[str, Tensor]) -> None:
    """Load what `trained_state` returned.

    Raises:
        UserError: It belongs to another model or was trained with other settings.
    """
    if hasattr(model, "peft_config"):
        load_adapter_state(model, state)
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
        save_adapter(model, folder)
        return
    state = {name: tensor.contiguous().cpu() for name, tensor in trained_state(model).items()}
    save_file(state, folder / TRAINED, metadata={"format": "pt"})
    about = {"base": identity, "tensors": len(state), "parameters": sum(tensor.numel() for tensor in state.values())}
    write_text(folder / DESCRIPTION, json.dumps(about, indent=2) + "\n")
