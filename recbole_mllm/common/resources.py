"""The name of the model, and where properties/ lies: beside the package in a checkout, inside it once installed."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from packaging.version import Version

MLLM = "MLLMMSR"
"""RecBole's name of this project's model, the one that reads summaries."""

TRANSFORMERS = "5.23"
"""The first version of transformers that can be used, as setup.py has it.

Until 5.17 no model takes ``mm_encoder_outputs``: images would not be read, in silence. Before 5.23 none says whether it
checkpoints activations, with which no prefix can be shared.
"""

_HERE = Path(__file__).resolve().parents[1]
PROPERTIES = next(
    (folder for folder in (_HERE / "properties", _HERE.parent / "properties") if folder.is_dir()), _HERE / "properties"
)


def is_usable_transformers(found: str) -> bool:
    """Return whether a version of transformers is `TRANSFORMERS` or a later one."""
    return Version(found).release >= Version(TRANSFORMERS).release


def resource(kind: str, name: str) -> Path | None:
    """Return ``properties/<kind>/<name>.yaml``, or None where there is none."""
    path = PROPERTIES / kind / f"{name}.yaml"
    return path if path.is_file() else None


def named(kind: str) -> list[str]:
    """Return the names that `resource` knows for `kind`."""
    return sorted(path.stem for path in (PROPERTIES / kind).glob("*.yaml"))


def converters(module: str) -> ModuleType:
    """Import ``dataset_converters.<module>``, which lies beside the package in a checkout, inside it once installed."""
    found = importlib.util.find_spec("dataset_converters")
    beside = found is not None and Path(str(found.origin)).parent == _HERE.parent / "dataset_converters"
    return importlib.import_module(f"{'' if beside else 'recbole_mllm.'}dataset_converters.{module}")
