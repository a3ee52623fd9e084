"""One optimizer step: its learning rate and precision, and gradients of micro-batches and of several processes."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from recbole_mllm.common import distributed
from recbole_mllm.common.files import whole_file

NONFINITE_COLUMNS = ("user_id", "item_id", "position", "label", "suspect")


def rate_at(step: int, steps: int, warmup: int, kind: str) -> float:
    """Return the share of the learning rate at `step` of `steps`: rising over `warmup`, falling as `kind` says."""
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    done = min(1.0, step / max(1, steps))
    fall = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[kind]
    return rise * fall


class MixedPrecision:
    """Autocast and loss scaling for one run; what is trained is always float32.

    A model loaded in half precision (`dtype`) computes in it, a float32 one in bfloat16 under RecBole's ``enable_amp``.
    Losses are scaled for float16 alone, whose smallest numbers gradients fall below; bfloat16 has float32's range.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, *, amp: bool) -> None:
        self.device = device
        self.dtype = torch.bfloat16 if amp and dtype == torch.float32 else dtype
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def autocast(self, enabled: bool = True) -> Any:
        """Return the context of a forward pass."""
        half = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype if half else None, enabled=enabled and half)


def add_gradients(loss: Tensor, parameters: Sequence[Any]) -> None:
    """Add the gradients of `loss` to the parameters' own: of all of them or, out of memory, of none.

    ``loss.backward()`` adds them one by one, so that a part that fails on the way would be counted twice when repeated.
    """
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
        if gradient is None:
            continue
        if parameter.grad is None:
            parameter.grad = gradient.detach().clone()
        else:
            parameter.grad.add_(gradient)


def sum_gradients(parameters: Iterable[Any], *numbers: float) -> list[float]:
    """Sum the gradients of `parameters` over all processes, in place, and return the sums of `numbers` (float64).

    A parameter without a gradient here gets one if another process has one; without one anywhere it has none, as an
    optimizer passes over it then.
    """
    if not distributed.is_launched():
        return list(numbers)
    distributed.arrive()
    every = list(parameters)
    with distributed.peers_alive():
        has = [*numbers, *(float(p.grad is not None) for p in every)]
        summed = torch.tensor(has, dtype=torch.float64, device=every[0].device)
        dist.all_reduce(summed)
        used = [p for p, count in zip(every, summed[len(numbers) :].tolist(), strict=True) if count]
        for p in used:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.contiguous()
            dist.all_reduce(p.grad)
    return [float(value) for value in summed[: len(numbers)].tolist()]


def copy_from_main(tensors: Iterable[Any]) -> None:
    """Overwrite `tensors` with the main process's."""
    if not distributed.is_launched():
        return
    distributed.start()
    with distributed.peers_alive():
        for tensor in tensors:
            dist.broadcast(tensor.data, 0)


def write_nonfinite(path: Path, rows: Sequence[tuple[str, str, int, int]], suspects: Container[int]) -> None:
    """Write the `rows` of a batch whose loss or gradient is no finite number, for people to look at.

    Args:
        path: A tab-separated file with `NONFINITE_COLUMNS`.
        rows: Raw user, raw item, position and label of each.
        suspects: The places of those computed when it happened.
    """
    with whole_file(path) as file:
        file.write("\t".join(NONFINITE_COLUMNS) + "\n")
        for place, row in enumerate(rows):
            file.write("\t".join(map(str, (*row, int(place in suspects)))) + "\n")
