"""Several devices where there is none: tensors that hold numbers of the CPU and say that they lie on ``card:N``.

Operations on tensors of two cards, or of a card and the CPU, fail as they do on GPUs; all else computes, gradients
included. So what a model spread over cards would mix up is found, without a card.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "card"
# tensors of one's own kind know nothing of it; this module must be imported before what uses it as a decorator
torch.inference_mode = torch.no_grad  # type: ignore[misc, assignment]
# what may be told from tensors elsewhere: copies, and indices of the CPU into a card's tensor
_ANYWHERE = {"aten::_to_copy", "aten::copy_", "aten::index.Tensor", "aten::_index_put_impl_", "aten::index_put_"}


class OnCard(torch.Tensor):
    """A tensor on card `index` whose numbers are in `held`."""

    @staticmethod
    def __new__(cls, held: torch.Tensor, index: int | None = None, requires_grad: bool = False) -> OnCard:
        if isinstance(held, OnCard):  # Accelerate makes a parameter of its own kind again
            return held.detach().requires_grad_(requires_grad)
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=torch.device(NAME, index), requires_grad=False,
        )  # fmt: skip
        made.held, made.index = held, index
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    cards = {x.index for x in given if isinstance(x, OnCard)}
    strays = [x for x in given if not isinstance(x, OnCard) and x.dim() > 0]
    known = name in _ANYWHERE or str(func).replace(".default", "").replace("aten.", "aten::") in _ANYWHERE
    if not known and (len(cards) > 1 or (cards and strays)):
        raise RuntimeError(f"{func}: tensors on {[str(x.device) for x in given]}")
    asked = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.device)]
    where = next(iter(cards), None) if not asked else (asked[0].index or 0) if asked[0].type == NAME else None
    args, kwargs = tree_map(_plain, (args, kwargs))
    if func._schema.is_mutable and given:
        func(*args, **kwargs)
        return given[0]
    out = func(*args, **kwargs)
    if name == "aten::_local_scalar_dense":
        return out
    return tree_map(lambda x: OnCard(x, where) if isinstance(x, torch.Tensor) and where is not None else x, out)


def _plain(x: Any) -> Any:
    if isinstance(x, torch.device):
        return torch.device("cpu") if x.type == NAME else x
    return x.held if isinstance(x, OnCard) else x


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Lists(TorchFunctionMode):
    """Lists go past the dispatcher: what ``torch.tensor`` makes of one is brought to its card afterwards."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        where = kwargs.pop("device", None) if func is torch.tensor else None
        if func is torch.Tensor.__getitem__ and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]))
        if func in (torch.Tensor.tolist, torch.Tensor.__format__, torch.Tensor.__repr__):
            args = (args[0].cpu(), *args[1:])
        made = func(*args, **kwargs)
        return made if where is None else made.to(where)


@contextmanager
def cards() -> Iterator[None]:
    """Within it, tensors are made on cards where that is asked for."""
    register()
    with _Lists(), _Operations():
        yield


class _Cards(_DummyBackendModule):
    def get_rng_state(self, device: Any) -> torch.Tensor:
        return torch.zeros(1)

    def set_rng_state(self, state: torch.Tensor, device: Any) -> None:
        """There is none: random numbers are the CPU's."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def register() -> None:
    """Let torch know of the cards; once a process."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        _setup_privateuseone_for_python_backend(NAME, backend_module=_Cards())
