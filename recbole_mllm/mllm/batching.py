"""Run rows in batches that shrink when the machine runs out of memory, rather than lose a long run to one big batch."""

from __future__ import annotations

import gc
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size

from recbole_mllm.errors import UserError
from recbole_mllm.mllm import splitting

Row = TypeVar("Row")
Out = TypeVar("Out")


@dataclass(slots=True)
class Budget:
    """What one batch may cost, in any unit; running out of memory lowers it for good.

    `release` gives back what can be done without (cached image features) and says whether there was any.
    """

    size: int
    release: Callable[[], bool] = lambda: False


def in_batches(
    rows: Sequence[Row],
    run: Callable[[Sequence[Row]], Out],
    cost: Callable[[Sequence[Row]], int],
    budget: Budget,
    name: Callable[[Row], str],
) -> Iterator[tuple[Sequence[Row], Out]]:
    """Yield every batch of `rows`, in order, with what `run` made of it.

    A batch that does not fit into memory is halved, as are those after it. `name` names a row to the user.

    Raises:
        UserError: One row alone does not fit.
    """
    waiting, released = deque(rows), False
    while waiting:
        batch = _next(waiting, cost, budget.size)
        try:
            out = run(batch)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        else:
            released = False
            yield batch, out
            continue
        # here and not in the handler, where the error's traceback still holds the tensors of the failed call
        freed = budget.release() and not released  # a second try has made it anew, and failed with it
        released = True
        free_memory()
        if len(batch) == 1 and not freed:
            raise UserError(
                f"out of memory with one prompt alone: {name(batch[0])}; take a smaller model, image or max_text_tokens"
            )
        budget.size = max(1, cost(batch) // 2)
        logging.getLogger().warning(f"out of memory with {len(batch)} prompts at once; going on with smaller batches")
        waiting.extendleft(reversed(batch))


def _next(waiting: deque[Row], cost: Callable[[Sequence[Row]], int], size: int) -> list[Row]:
    batch = [waiting.popleft()]
    while waiting and cost([*batch, waiting[0]]) <= size:
        batch.append(waiting.popleft())
    return batch


def out_of_memory(error: Exception) -> bool:
    """Whether `error` says that an accelerator, or the machine, has no memory left.

    Raises:
        UserError: It does, and the model is split: the other processes are in the middle of the pass that failed here.
    """
    found = isinstance(error, torch.OutOfMemoryError) or bool(should_reduce_batch_size(error))
    if found and splitting.wanted():
        raise splitting.out_of_memory() from None
    return found


def free_memory() -> None:
    """Return cached memory to the accelerator."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
