"""Packages that RecBole's modules ask for while they are imported, and that need not be there."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence
from functools import total_ordering
from types import ModuleType, SimpleNamespace
from typing import Any

from recbole_mllm.compat.patching import lend_imports
from recbole_mllm.errors import UserError

INSTALL = "pip install --no-deps recbole==1.2.1"


class RecBoleMissing(UserError, ModuleNotFoundError):
    """RecBole is not installed; from Python 3.12 on pip cannot bring it, as its metadata asks for ray<=2.6.3."""


class MissingRecBoleFinder:
    """Stands last on ``sys.meta_path``: reached only when nobody else has found RecBole."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        """Say in one line how RecBole is installed.

        Raises:
            RecBoleMissing: `fullname` is ``recbole``.
        """
        if fullname == "recbole":
            raise RecBoleMissing(f"RecBole is not installed; run `{INSTALL}`", name="recbole")


def name_missing_recbole() -> None:
    """Give ``import recbole`` a helpful answer where it is not installed."""
    if not any(isinstance(finder, MissingRecBoleFinder) for finder in sys.meta_path):
        sys.meta_path.append(MissingRecBoleFinder())


def do_without_ray(module: ModuleType) -> None:
    """Let quick_start/quick_start.py:20 say ``from ray import tune`` where ray is absent or cannot be imported."""
    lend_imports(module, {"ray": SimpleNamespace(tune=SimpleNamespace(report=report_to_ray))})


def report_to_ray(**metrics: Any) -> None:
    """Answer ``tune.report(**test_result)`` (quick_start/quick_start.py:223): nothing, unless ray is tuning.

    ray reaches ``objective_function`` only after it was imported, so there is no need to import it to find out.
    """
    tune = sys.modules.get("ray.tune")
    if tune is None:
        return
    try:
        tune.report(metrics)  # ray >= 2.7 takes one dict
    except TypeError:
        tune.report(**metrics)
    except RuntimeError:  # recent ray, outside a tuning session
        return


def do_without_distutils(module: ModuleType) -> None:
    """Let thop/profile.py:1 and thop/fx_profile.py:5 import ``LooseVersion`` on Python 3.12+ without setuptools.

    RecBole reaches thop in utils/utils.py:298, for the FLOPs it logs.
    """
    if importlib.util.find_spec("distutils") is None:
        lend_imports(module, {"distutils.version": SimpleNamespace(LooseVersion=LooseVersion)})


@total_ordering
class LooseVersion:
    """Compares versions by their numbers, which is all thop does: ``LooseVersion(torch.__version__) < "1.0.0"``."""

    def __init__(self, text: object) -> None:
        self.vstring = str(text)
        self.version = [int(number) for number in re.findall(r"\d+", self.vstring)]

    def __eq__(self, other: object) -> bool:
        return self.version == LooseVersion(other).version

    def __lt__(self, other: object) -> bool:
        return self.version < LooseVersion(other).version

    def __hash__(self) -> int:
        return hash(tuple(self.version))

    def __str__(self) -> str:
        return self.vstring
