"""Add up a batch's gradients part by part; a part that does not fit into memory is halved, and counted once."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from recbole_mllm.errors import UserError
from recbole_mllm.mllm.batching import free_memory, out_of_memory


class Halving:
    """Runs parts of batches; what it learns of how many rows fit is kept for the batches to come.

    `release` gives back what can be done without (cached image features) and says whether there was any.
    """

    def __init__(self, release: Callable[[], bool]) -> None:
        self.release = release
        self.most: int | None = None
        self._released = False  # for the part that is to be tried again; it makes anew what was given back

    def __call__(
        self, parts: Sequence[Sequence[int]], run: Callable[[Sequence[int]], float]
    ) -> Iterator[tuple[Sequence[int], float]]:
        """Yield each of `parts`, or its halves, with what `run` made of it.

        Raises:
            UserError: One row alone does not fit.
        """
        waiting = deque(piece for part in parts for piece in self._cut(part))
        while waiting:
            part = waiting.popleft()
            try:
                value = run(part)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            else:
                self._released = False
                yield part, value
                continue
            # not in the handler, where the error's traceback still holds the tensors of the failed call
            waiting.extendleft(reversed(self._again(part)))

    def _again(self, part: Sequence[int]) -> list[Sequence[int]]:
        """Return what to run in place of `part`."""
        freed = self.release() and not self._released
        self._released = True
        free_memory()
        if len(part) > 1:
            self.most = len(part) // 2
            logging.getLogger().warning(
                f"out of memory training on {len(part)} rows at once; going on with {self.most}"
            )
        elif not freed:
            raise UserError(
                "out of memory training on one row alone; set gradient_checkpointing: true, or lower max_text_tokens"
            )
        return self._cut(part)

    def _cut(self, part: Sequence[int]) -> list[Sequence[int]]:
        size = self.most or len(part)
        return [part[start : start + size] for start in range(0, len(part), size)]


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
