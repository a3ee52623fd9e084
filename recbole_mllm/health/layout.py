"""Where a dataset's files are, and what its columns are called."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole_mllm.data import schema
from recbole_mllm.data.atomic import read_columns
from recbole_mllm.errors import UserError
from recbole_mllm.keys import checked_file


@dataclass(frozen=True, slots=True)
class Layout:
    """A dataset's folder, its files of interactions and the names of its columns."""

    folder: Path
    inter: tuple[Path, ...]
    user: str = schema.USER
    item: str = schema.ITEM
    time: str = schema.TIME
    history: str | None = None
    image_dir: Path | None = None

    @property
    def name(self) -> str:
        """Return the name that the files share with the folder."""
        return self.folder.name


def find_layout(folder: Path, given: Mapping[str, Any]) -> Layout:
    """Return the layout of the dataset in `folder`.

    Its ``dataset.yaml`` may name the columns, benchmark files and image folder; the keys `given` with the command win.

    Raises:
        UserError: There is no such folder, or it holds no interactions.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give a dataset's folder, or its name under ./dataset")
    if not folder.name or folder.name == "..":
        folder = folder.resolve()
    keys = {**_keys(folder / "dataset.yaml"), **given}
    files = _inter_files(folder, keys)
    user, item = (str(keys.get(key) or name) for key, name in _FIELDS)
    columns = read_columns(files[0])
    for name in (user, item):
        if name not in columns:
            raise UserError(
                f"{files[0]}:1: there is no column {name}; its columns are {', '.join(columns)}; name yours with "
                "USER_ID_FIELD and ITEM_ID_FIELD, in dataset.yaml or a config file"
            )
    history = f"{item}{keys.get('LIST_SUFFIX') or '_list'}"
    time, images = str(keys.get("TIME_FIELD") or schema.TIME), keys.get("image_dir")
    return Layout(
        folder, files, user, item, time, history if history in columns else None, Path(str(images)) if images else None
    )


_FIELDS = (("USER_ID_FIELD", schema.USER), ("ITEM_ID_FIELD", schema.ITEM))
# The configuration keys that say where a dataset's files are and what its columns are called
LAYOUT_KEYS = ("image_dir", "USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD", "LIST_SUFFIX", "benchmark_filename")


def _keys(path: Path) -> Mapping[str, Any]:
    if not os.path.lexists(path):
        return {}
    return checked_file(path, of_dataset=True)


def _inter_files(folder: Path, keys: Mapping[str, Any]) -> tuple[Path, ...]:
    """Return the benchmark files ``X.<part>.inter`` where they are named or alone, else ``X.inter``."""
    plain = folder / f"{folder.name}.inter"
    named = keys.get("benchmark_filename")
    if isinstance(named, list) and named:
        return tuple(folder / f"{folder.name}.{part}.inter" for part in named)
    if os.path.lexists(plain):
        return (plain,)
    files = [folder / f"{folder.name}.{part}.inter" for part in ("train", "valid", "test")]
    if there := tuple(path for path in files if path.is_file()):
        return there
    others = sorted(path.name for path in folder.glob("*.inter"))
    hint = (
        f"it holds {', '.join(others[:3])}: RecBole wants files named after their folder" if others else "it is empty"
    )
    hint = hint if others or not any(folder.iterdir()) else "a folder of datasets is none itself"
    raise UserError(f"{folder} holds no {plain.name}; {hint}")
