"""Where properties/ lies: beside the package in a checkout, inside it once installed."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent
PROPERTIES = next(
    (folder for folder in (_HERE / "properties", _HERE.parent / "properties") if folder.is_dir()), _HERE / "properties"
)


def resource(kind: str, name: str) -> Path | None:
    """Return ``properties/<kind>/<name>.yaml``, or None where there is none."""
    path = PROPERTIES / kind / f"{name}.yaml"
    return path if path.is_file() else None


def named(kind: str) -> list[str]:
    """Return the names that `resource` knows for `kind`."""
    return sorted(path.stem for path in (PROPERTIES / kind).glob("*.yaml"))
