"""From the body's last hidden states to logits, as the model's own class does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from recbole_mllm.mllm.dispatching import computes_on, present


class Head:
    """What stands between the body of a causal language model and its logits: a head, and what its class adds.

    A class may scale or cap logits, or put a norm before the head, and its settings do not tell whether it does: of a
    ``logits_scaling`` a Granite takes account, and a LLaVA over the same Granite does not. So the class's own forward
    pass is run, with the states in place of its body and, where few tokens are asked for, their rows of the head alone.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._head = model, model.get_output_embeddings()
        children = model._modules.items()
        self._names = [next((n for n, m in children if m is one), "") for one in (model.base_model, self._head)]
        self._each_alone: bool | None = None  # whether a token's logit does not depend on those of others; asked once

    def __call__(self, states: Tensor, tokens: Sequence[int] | None) -> Tensor:
        """Return float32 logits of `states` ``[N, D]``, for `tokens` only or for the vocabulary, where the head is.

        Raises:
            NotImplementedError: The model is no body with a head behind it.
        """
        if tokens is None or not self._each_alone_counts():
            out = self._run(states, lambda given: self._head(given.to(computes_on(self._head))).float())
            return out if tokens is None else out[:, list(tokens)]
        return self._run(states, lambda given: self._rows(given, list(tokens)))

    def _rows(self, states: Tensor, tokens: list[int]) -> Tensor:
        head = self._head
        with present(head):
            out = states.to(computes_on(head)).float() @ head.weight[tokens].float().T
            bias = getattr(head, "bias", None)
            return torch.as_tensor(out if bias is None else out + bias[tokens].float())

    def _each_alone_counts(self) -> bool:
        """Return whether the class treats every logit alike, so that some may be computed without the others."""
        if self._each_alone is None:
            whole = torch.randn(1, self._head.weight.size(0), generator=torch.Generator().manual_seed(0))
            whole = whole.to(computes_on(self._head))
            few = torch.arange(whole.size(1) - 1, -1, -3, device=whole.device)
            state = torch.zeros(1, self._head.weight.size(1), device=whole.device)
            every, self._each_alone = self._run(state, lambda _: whole[None]), False
            with suppress(IndexError, RuntimeError, ValueError):  # it looks for a token of its own among the few
                self._each_alone = torch.equal(self._run(state, lambda _: whole[None, :, few]), every[:, few])
        return self._each_alone

    def _run(self, states: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        """Run the class's forward pass over `states` ``[N, D]`` with `head` in place of its own."""
        if not all(self._names):
            raise NotImplementedError(f"{type(self._model).__name__} is no body with a head behind it")
        body_name, head_name = self._names
        twin = object.__new__(type(self._model))  # not `copy`, which FSDP's classes do not stand
        twin.__dict__ = {name: value for name, value in vars(self._model).items() if name != "forward"}
        own = {body_name: _Given(states[None]), head_name: _Instead(head, self._head)}
        twin.__dict__["_modules"] = {**self._model._modules, **own}
        ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        return torch.as_tensor(type(twin).forward(twin, input_ids=ids, return_dict=True).logits[0]).float()


class _States(tuple[Tensor]):
    """A body's output that holds last hidden states and nothing else, whatever it is asked for."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Given(nn.Module):
    """A body that has read its input already."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self._states = states

    def forward(self, *_: Any, **__: Any) -> Any:
        """Return the states."""
        return _States((self._states,))


class _Instead(nn.Module):
    """Computes what it is given in a head's place; its weights are the head's."""

    def __init__(self, compute: Callable[[Tensor], Tensor], head: nn.Module) -> None:
        super().__init__()
        self._compute, self._head = compute, [head]  # in a list, as a module would become a part

    @property
    def weight(self) -> Any:
        """The head's."""
        return self._head[0].weight

    def forward(self, states: Tensor) -> Tensor:
        """Return what is computed."""
        return self._compute(states)
