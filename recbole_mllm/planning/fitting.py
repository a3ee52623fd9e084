"""Whether what a stage holds fits its device; if not, among how many processes its model must be split to fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recbole_mllm.mllm.anatomy import Anatomy
from recbole_mllm.planning.devices import Device
from recbole_mllm.planning.memory import Precision, weights
from recbole_mllm.settings import LoraSettings

_SHARE = 0.9  # of a device's memory that is counted on; the rest is the allocator's, and what no formula knows
_MOST = 64  # processes
_WRITES = ("items", "users")


def fits(
    memory: Mapping[str, Mapping[str, float]], frozen: Mapping[str, float], device: Device
) -> dict[str, dict[str, Any]]:
    """Return of each stage the `bytes` it needs on a `device`, the `room` there, and in how many `processes` it fits.

    Args:
        memory: By stage and part, with their total.
        frozen: By stage, what FSDP or DeepSpeed can split among processes; each then needs as many bytes less.
        device: One of them.

    Returns:
        `processes` is None where not even 64 make it fit; `bytes` are those of one process then.
    """
    room, out = device.memory_gb * 1e9 * _SHARE, {}
    for stage, parts in memory.items():
        counts = range(1, _MOST + 1 if frozen[stage] else 2)
        each = {n: parts["total"] - frozen[stage] * (1 - 1 / n) for n in counts}
        found = next((n for n, need in each.items() if need <= room), None)
        out[stage] = {"bytes": each[found or 1], "room": room, "processes": found}
    return out


def frozen_layers(stage: str, anatomy: Anatomy, precision: Precision, lora: LoraSettings) -> float:
    """Return the bytes of a stage's model that can be split among processes: all layers but the one put together.

    Nothing of what ``full`` and ``qlora`` train (docs/launching.md).
    """
    if stage not in _WRITES and lora.finetune in ("full", "qlora"):
        return 0.0
    share = anatomy.language.parameters / anatomy.parameters
    return weights(anatomy, precision) * share * (1 - 1 / max(1, anatomy.layers))


def what_helps(stage: str, processes: int | None) -> str:
    """Return what to do about a stage that does not fit one device."""
    server = ", or a server writes instead" if stage in _WRITES else ""
    if processes:
        return f"fits when FSDP or DeepSpeed split it among {processes} processes (docs/launching.md){server}"
    if stage in _WRITES:
        return f"no split alone does it: a smaller summarize_batch_size takes less{server}"
    return "no split alone does it: gradient_checkpointing, a smaller micro_batch_size or finetune: lora take less"
