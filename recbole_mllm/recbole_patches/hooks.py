"""How a module of RecBole is changed from outside: code that runs around its import, and functions replaced.

RecBole is slow to import and needs mending while it is imported. Waiting for the import keeps ``import recbole_mllm``
cheap, and leaves it to the user which of the two comes first.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.abc import Loader
else:  # importlib.abc alone would take half of `import recbole_mllm`'s time
    Loader = object

Callback = Callable[[ModuleType], None]
_MARK = "_recbole_mllm_shim"


def after_import(name: str, callback: Callback) -> None:
    """Call `callback` with module `name` now if it is imported, and each time its body has run from now on."""
    if _FINDER.add(_FINDER.after, name, callback) and name in sys.modules:
        # waits where another thread is in the middle of importing it
        callback(importlib.import_module(name))


def before_import(name: str, callback: Callback) -> None:
    """Call `callback` with the empty module `name` each time before its body runs; too late if it has been imported."""
    _FINDER.add(_FINDER.before, name, callback)


class _Finder:
    """Finds what the other finders find, and hands it on with a loader that calls back."""

    def __init__(self) -> None:
        self.before: dict[str, list[Callback]] = {}
        self.after: dict[str, list[Callback]] = {}

    def add(self, table: dict[str, list[Callback]], name: str, callback: Callback) -> bool:
        """Note `callback` for module `name` in `table`; return whether it is new there."""
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        known = table.setdefault(name, [])
        if callback in known:
            return False
        known.append(callback)
        return True

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a module with callbacks, its loader wrapped; None for every other."""
        if fullname not in self.before and fullname not in self.after:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _CallingLoader(spec.loader)
                return spec
        return None


_FINDER = _Finder()


class _CallingLoader(Loader):
    """A loader around a module's own, which takes its place again once the module's body has run."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create_module(self, spec: ModuleSpec) -> Any:
        """Let the module's own loader create the module."""
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the callbacks, the module's body, and the callbacks that wait for it."""
        module.__loader__ = self._inner
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        for callback in tuple(_FINDER.before.get(module.__name__, ())):
            callback(module)
        self._inner.exec_module(module)
        for callback in tuple(_FINDER.after.get(module.__name__, ())):
            callback(module)


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


def replace(owner: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate what takes the place of the function of its name in `owner`; the stock one is its first argument."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        wrap(owner, function.__name__, lambda stock: lambda *args, **kwargs: function(stock, *args, **kwargs))
        return function

    return decorate


def called_from(package: str) -> bool:
    """Return whether what called this one, put in place by `replace`, was called by a function of `package`."""
    name = str(sys._getframe(3).f_globals.get("__name__", ""))
    return name == package or name.startswith(f"{package}.")
