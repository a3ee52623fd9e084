"""Run code just before or just after a module's body runs, whoever imports the module and whenever.

RecBole is slow to import and needs mending while it is imported. Waiting for the import keeps ``import recbole_mllm``
cheap, and leaves it to the user which of the two comes first.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.abc import Loader
else:  # importlib.abc alone would take half of `import recbole_mllm`'s time
    Loader = object

Callback = Callable[[ModuleType], None]


def after_import(name: str, callback: Callback) -> None:
    """Call `callback` with module `name` now if it is imported, and each time its body has run from now on."""
    if not _FINDER.add(_FINDER.after, name, callback):
        return
    if name in sys.modules:
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
        self._lock = threading.RLock()

    def add(self, table: dict[str, list[Callback]], name: str, callback: Callback) -> bool:
        """Note `callback` for module `name` in `table`; return whether it is new there."""
        with self._lock:
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
        """Return the spec of a module somebody waits for, its loader wrapped; None for every other."""
        if fullname not in self.before and fullname not in self.after:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _CallingLoader(spec.loader, self)
                return spec
        return None


class _CallingLoader(Loader):
    """A loader around a module's own, which takes its place again once the module's body has run."""

    def __init__(self, inner: Any, finder: _Finder) -> None:
        self._inner = inner
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Let the module's own loader make the module."""
        module: ModuleType | None = self._inner.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Run the callbacks, the module's body, and the callbacks that wait for it."""
        module.__loader__ = self._inner
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        for callback in tuple(self._finder.before.get(module.__name__, ())):
            callback(module)
        self._inner.exec_module(module)
        for callback in tuple(self._finder.after.get(module.__name__, ())):
            callback(module)


_FINDER = _Finder()
