"""The few ways in which a module of RecBole is changed from outside; its files never are."""

from __future__ import annotations

import builtins
import functools
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

_MARK = "_recbole_mllm_shim"


def wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put ``make(stock)`` in the place of the function `name` of a module or class, once.

    A function may already stand in other modules under its name (``from recbole.data import create_dataset`` before
    ``import recbole_mllm``); it is replaced there too, so the order of imports makes no difference.
    """
    stock = vars(owner)[name]
    if hasattr(stock, _MARK):
        return
    shim = functools.wraps(stock)(make(stock))
    setattr(shim, _MARK, True)
    setattr(owner, name, shim)
    if isinstance(owner, ModuleType):
        for module in tuple(sys.modules.values()):
            if isinstance(module, ModuleType) and vars(module).get(name) is stock:
                setattr(module, name, shim)


def called_from(package: str, depth: int = 2) -> bool:
    """Return whether the function that called the caller of this one belongs to `package`."""
    name = str(sys._getframe(depth).f_globals.get("__name__", ""))
    return name == package or name.startswith(f"{package}.")


def lend_imports(module: ModuleType, lent: Mapping[str, Any]) -> None:
    """Let `module` alone see `lent` where its body says ``from NAME import …``.

    Nothing is put into ``sys.modules``: transformers and accelerate look there, and in ``find_spec``, for what is
    installed.
    """

    def lending_import(name: str, *args: Any, **kwargs: Any) -> Any:
        return lent[name] if name in lent else builtins.__import__(name, *args, **kwargs)

    vars(module)["__builtins__"] = {**vars(builtins), "__import__": lending_import}


def end_lending(module: ModuleType) -> None:
    """Give `module` Python's own builtins back; the functions it has defined keep what they were defined with."""
    vars(module)["__builtins__"] = vars(builtins)
