"""A model larger than a card, in one process: its layers lie on several GPUs, in the machine's memory, or on disk.

Accelerate's hooks bring inputs to where a layer is, and an offloaded layer's weights to where it computes; keys and
values are made where their layer computes, and stay there. What is read past a module's own call (the head's rows,
a parameter beside the layers) is fetched here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import get_max_memory

from recbole_mllm.common import distributed
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.files import check_place
from recbole_mllm.common.settings import MLLMSettings


def check_dispatch(settings: MLLMSettings) -> None:
    """Refuse `device_map` in one of several processes, before anything is loaded.

    Raises:
        UserError: Names the two ways there are.
    """
    if settings.device_map and distributed.is_launched():
        raise UserError(
            f"device_map: {settings.device_map} spreads a model over the devices of one process, and a launcher has "
            f"started {distributed.world_size()}; set device_map: null (FSDP splits a model among processes, see "
            "docs/launching.md), or start one process"
        )


def placement(settings: MLLMSettings, device: torch.device) -> dict[str, Any]:
    """Return what ``from_pretrained`` needs to place a model; nothing where the user asks for nothing.

    A run on the CPU (`device`) is kept from GPUs that happen to be there.
    """
    if not settings.device_map:
        return {}
    check_dispatch(settings)
    given = {int(k) if str(k).isdecimal() else k: v for k, v in (settings.max_memory or {}).items()} or None
    if device.type == "cpu":
        given = {"cpu": (given or {}).get("cpu", get_max_memory()["cpu"])}
    if settings.offload_folder:
        check_offload(Path(settings.offload_folder))
    folder = {"offload_folder": settings.offload_folder} if settings.offload_folder else {}
    return {"device_map": settings.device_map, "max_memory": given, **folder}


def check_offload(folder: Path) -> None:
    check_place(folder, "offload_folder:")
    there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if others := sorted(name for name in there if name != "index.json" and not name.endswith(".dat")):
        raise UserError(f"offload_folder: {folder} holds {others[0]}, which is no weight; give a folder of its own")


def is_dispatched(model: Any) -> bool:
    """Return whether `model` lies in several places, so that it must not be moved."""
    return len(_places(model)) > 1


def check_room(model: Any, device: torch.device) -> None:
    """Refuse a model of which nothing, not even what comes first, has found room where it computes.

    Some families ask their own first weight where they are (Idefics3), and learn nothing from one that is away.

    Raises:
        UserError: It says so.
    """
    places = _places(model)
    if places and (model.device.type == "meta" or (device.type != "cpu" and places <= {"cpu", "disk"})):
        where = "in memory" if device.type == "cpu" else "on a GPU"
        raise UserError(f"max_memory leaves no room {where} for the model's first layers; raise it")


def check_trainable(model: Any) -> None:
    """Refuse to train a model some of whose weights are brought to a device only while they are needed.

    Raises:
        UserError: Says what would do.
    """
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise UserError(
            "device_map has put layers into memory or on disk, where they can be scored and not trained; raise "
            "max_memory, take finetune: qlora or more GPUs, or set finetune: none"
        )


def input_device(model: Any) -> torch.device:
    """Return where the token embeddings of `model` compute, which is where its inputs go."""
    return computes_on(model.get_input_embeddings())


def computes_on(module: Any) -> torch.device:
    """Return where `module` computes: where its weights are, or where they are brought."""
    own = next(module.parameters()).device
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]) if own.type == "meta" else ():
        if (found := getattr(one, "execution_device", None)) is not None:
            return torch.device(found if not isinstance(found, int) else f"cuda:{found}")
    return torch.device(own)  # on the meta device, only sizes are asked of it


@contextmanager
def present(module: Any) -> Iterator[None]:
    """Have the weights that `module` itself owns in place for what reads them past its forward pass."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def _places(model: Any) -> set[str]:
    return set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))
