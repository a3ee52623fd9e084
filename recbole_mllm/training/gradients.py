"""Gradients and parameters that several processes have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from recbole_mllm import ranks

_BUCKET = 2**24  # gradients summed at a time, so that full tuning takes little more memory


def sum_gradients(parameters: Iterable[Any], *numbers: float) -> list[float]:
    """Sum the gradients of `parameters` over all processes, in place, and return the sums of `numbers` (float64).

    A parameter without a gradient here gets one if another process has one; without one anywhere it keeps none, as an
    optimizer passes over it then.
    """
    if not ranks.is_launched():
        return list(numbers)
    ranks.start()
    ranks.arrive()
    every = list(parameters)
    device = every[0].device
    with ranks.together():
        has = [*numbers, *(float(p.grad is not None) for p in every)]
        summed = torch.tensor(has, dtype=torch.float64, device=device)
        dist.all_reduce(summed)
        used = [p for p, count in zip(every, summed[len(numbers) :].tolist(), strict=True) if count]
        for part in _buckets(used):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in part]
            flat: Any = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(flat)
            for p, grad in zip(part, flat.split([grad.numel() for grad in grads]), strict=True):
                p.grad = grad.view_as(p).clone() if p.grad is None else p.grad.copy_(grad.view_as(p))
    return [float(value) for value in summed[: len(numbers)].tolist()]


def copy_from_main(tensors: Iterable[Any]) -> None:
    """Overwrite `tensors` with the main process's."""
    if not ranks.is_launched():
        return
    ranks.start()
    with ranks.together():
        for tensor in tensors:
            dist.broadcast(tensor.data, 0)


def _buckets(parameters: Sequence[Any]) -> Iterator[list[Any]]:
    """Yield `parameters` in parts of one dtype and at most `_BUCKET` numbers, a larger one alone."""
    part: list[Any] = []
    for p in parameters:
        if part and (p.dtype != part[0].dtype or sum(q.numel() for q in part) + p.numel() > _BUCKET):
            yield part
            part = []
        part.append(p)
    if part:
        yield part
