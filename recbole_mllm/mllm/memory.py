"""What fits into memory: batches that shrink when it runs out, and caches with a limit in bytes."""

from __future__ import annotations

import gc
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size

from recbole_mllm.common.errors import UserError
from recbole_mllm.mllm import sharding

Item = TypeVar("Item")
Out = TypeVar("Out")


@dataclass(slots=True)
class Budget:
    """What one batch may cost, in any unit; running out of memory lowers it for good.

    `release` frees what can be computed again (cached image features) and says whether there was any.
    """

    size: int
    release: Callable[[], bool] = lambda: False


def in_batches(
    rows: Sequence[Item],
    run: Callable[[Sequence[Item]], Out],
    cost: Callable[[Sequence[Item]], int],
    budget: Budget,
    alone: Callable[[Item], str],
) -> Iterator[tuple[Sequence[Item], Out]]:
    """Yield every batch of `rows`, in order, with the result of `run`.

    A batch that does not fit into memory is halved, as are those after it.

    Raises:
        UserError: One row alone does not fit: `alone` says what helps.
    """
    waiting, released = deque(rows), False
    while waiting:
        batch = [waiting.popleft()]
        while waiting and cost([*batch, waiting[0]]) <= budget.size:
            batch.append(waiting.popleft())
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
        freed = budget.release() and not released  # a second try has computed it again, and failed with it
        released = True
        free_memory()
        if len(batch) == 1 and not freed:
            raise UserError(f"out of memory {alone(batch[0])}")
        budget.size = max(1, cost(batch) // 2)
        logging.getLogger().warning(f"out of memory with {len(batch)} prompts at once; going on with smaller batches")
        waiting.extendleft(reversed(batch))


def out_of_memory(error: Exception) -> bool:
    """Whether `error` says that an accelerator, or the machine, has no memory left.

    Raises:
        UserError: It does, and the model is split: the other processes are in the middle of the pass that failed here.
    """
    found = isinstance(error, torch.OutOfMemoryError) or bool(should_reduce_batch_size(error))
    if found and sharding.wanted():
        raise sharding.out_of_memory() from None
    return found


def free_memory() -> None:
    """Return cached memory to the accelerator."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


class ByteCache(Generic[Out]):
    """Values by key, those used last, of at most so many bytes in all; the newest stays whatever its size."""

    def __init__(self, limit: Callable[[], int], size: Callable[[Out], int]) -> None:
        self._limit, self._size, self._bytes = limit, size, 0
        self._held: OrderedDict[str, Out] = OrderedDict()

    def get(self, key: str, make: Callable[[], Out]) -> Out:
        """Return the value of `key`, computed by `make` where it is not held."""
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        out = self._held[key] = make()
        self._bytes += self._size(out)
        while self._bytes > self._limit() and len(self._held) > 1:
            self._bytes -= self._size(self._held.popitem(last=False)[1])
        return out

    def clear(self) -> bool:
        """Drop everything; return whether there was anything."""
        held, self._bytes = bool(self._held), 0
        self._held.clear()
        return held

    def __len__(self) -> int:
        return len(self._held)
