"""RecBole's way from atomic files to loaders, without its loops over rows: the same results, sooner and in less memory.

Every replacement is a function of RecBole's, wrapped once its module has been imported; whatever one of them is not
certain to do alike goes through RecBole's own code. ``RECBOLE_MLLM_FASTDATA=off`` leaves RecBole as it is, for tests
and benchmarks to compare with.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from recbole_mllm._importhook import after_import

# RecBole's module -> ours, whose `install` changes it
INSTALLERS = {
    "recbole.data.interaction": ("indexing",),
    "recbole.data.dataset.dataset": ("reading", "split"),
    "recbole.data.dataset.sequential_dataset": ("augment",),
    "recbole.sampler.sampler": ("used",),
}


def apply() -> None:
    """Put every replacement in place: at once where its module has been imported, else as soon as it is."""
    if os.environ.get("RECBOLE_MLLM_FASTDATA") == "off":
        return
    for name in INSTALLERS:
        after_import(name, _install)


def _install(module: ModuleType) -> None:
    for ours in INSTALLERS[module.__name__]:
        importlib.import_module(f"{__name__}.{ours}").install(module)
