"""DeepSpeed's ZeRO stage 3, as Accelerate's configuration asks for it: it splits frozen layers among processes.

DeepSpeed gets only what does not change: the layers' frozen parameters, without an optimizer (its own "parameter
offload", which ZeRO-Inference is). It cuts them up, brings them together around each module and fetches ahead, by the
settings of its `zero_optimization` section. What is trained it never sees, so that gradients, optimizer and checkpoints
are those of a run without it. Stages 1 and 2 split gradients and optimizer states, of which an adapter has few: they
are not followed, and every process keeps its own.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from recbole_mllm.errors import UserError

# These say how an optimizer is kept and what is saved, neither of which is DeepSpeed's here
_NOT_READ = ("offload_optimizer", "stage3_gather_16bit_weights_on_model_save")


def settings() -> dict[str, Any]:
    """Return DeepSpeed's `zero_optimization` section as Accelerate reads it: a DeepSpeed file, or its own few keys.

    Raises:
        UserError: DeepSpeed is not installed, or the file is no configuration of it.
    """
    from accelerate.utils import DeepSpeedPlugin, is_deepspeed_available

    if not is_deepspeed_available():
        raise UserError("DeepSpeed is asked for and not installed: pip install 'recbole-mllm[deepspeed]'")
    try:
        section: dict[str, Any] = DeepSpeedPlugin().deepspeed_config["zero_optimization"]
    except (ValueError, KeyError, OSError) as error:
        where, why = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "the launcher's"), " ".join(str(error).split())
        raise UserError(f"DeepSpeed's configuration ({where}) cannot be read: {why}") from error
    return {key: value for key, value in section.items() if value != "auto" and key not in _NOT_READ}


def whole_numel(parameter: torch.Tensor) -> int:
    """Return how many numbers a parameter has, also while it is split (it is empty then)."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def partition(language: nn.Module, layers: Sequence[nn.Module], device: torch.device) -> Any:
    """Split the frozen parameters of `layers`, modules of `language`, among all processes, in place.

    Returns DeepSpeed's engine, which is to be kept as long as the model: without it the layers stay apart.

    Raises:
        UserError: DeepSpeed does not take the configuration, or would round parameters it holds.
    """
    from pydantic import ValidationError  # DeepSpeed brings it

    deepspeed = _import(device)
    section = {"memory_efficient_linear": False, **settings()}  # else it puts its own in torch's place, for good
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": section, **_precision(layers)}
    with _alone(language, layers):
        try:
            # one parameter after the other: the engine would first move all to its device, where they may not fit
            deepspeed.zero.Init(module=language, config_dict_or_path=config)
            engine, *_ = deepspeed.initialize(model=language, config=config, dist_init_required=False)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise UserError(f"DeepSpeed refuses its configuration: zero_optimization: {wrong}") from error
    # the first layer's input needs no gradient, so DeepSpeed is not told that the way back has passed it
    language.register_forward_pre_hook(lambda *_: engine.optimizer.release_backward_leftovers(), prepend=True)
    return engine


def forget(language: nn.Module) -> None:
    """Have DeepSpeed hold a model no longer that is done with: else its layers stay beside every later one's.

    It keeps the outermost module in its list of those under way, and in a cache of the whole process's (of what to put
    down behind each module) all others.
    """
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    under_way = parameter_offload.FWD_MODULE_STACK
    under_way[:] = [module for module in under_way if module is not language]
    for method in vars(PartitionedParameterCoordinator).values():
        for inner in (method, *(cell.cell_contents for cell in getattr(method, "__closure__", None) or ())):
            if hasattr(inner, "cache_clear"):
                inner.cache_clear()


def _import(device: torch.device) -> Any:
    """Return the package, told of the device (it guesses, aloud) and not to compile what only tensor parallelism uses.

    A build that is killed leaves a lock behind on which every later run would wait for ever.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it speaks on stdout, where results are
    warnings.filterwarnings("ignore", r"`torch\.distributed\..* is deprecated", FutureWarning)  # what it calls
    return deepspeed


def _precision(layers: Sequence[nn.Module]) -> dict[str, Any]:
    held = {p.dtype for layer in layers for p in layer.parameters() if not p.requires_grad}
    if len(held) > 1:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in held))
        raise UserError(f"DeepSpeed holds a model in one precision, and this one's layers are {names}; take FSDP")
    return {"bf16": {"enabled": held == {torch.bfloat16}}, "fp16": {"enabled": held == {torch.float16}}}


@contextmanager
def _alone(language: nn.Module, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Hide every module of `language` outside of `layers`, and those inside that hold something trained."""
    inside = {module for layer in layers for module in layer.modules()}
    hidden = []
    for parent in list(language.modules()):
        for name, child in parent.named_children():
            trained = any(p.requires_grad for p in child.parameters(recurse=False))
            if trained or not any(module in inside for module in child.modules()):
                hidden.append((parent, name, child))
    for parent, name, _ in hidden:
        parent._modules[name] = None  # keeps its place, and with it the order of parameters
    try:
        yield
    finally:
        for parent, name, child in hidden:
            parent._modules[name] = child
