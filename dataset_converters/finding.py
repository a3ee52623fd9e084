"""Which file of a raw dump is meant."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, overload

from recbole_mllm.errors import UserError


@overload
def only_one(raw: Path, pattern: str, required: Literal[True]) -> Path: ...
@overload
def only_one(raw: Path, pattern: str, required: bool) -> Path | None: ...
def only_one(raw: Path, pattern: str, required: bool) -> Path | None:
    """Return the file in `raw` that matches `pattern`.

    Raises:
        UserError: There are several, or none and it is required.
    """
    found = sorted(path for path in raw.glob(pattern) if path.is_file() and not path.name.startswith("."))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{raw} holds several {pattern} ({names}); leave one dataset in a folder of its own")
    if not found and required:
        raise UserError(f"{raw} holds no {pattern}; give the folder of the raw files as --raw")
    return found[0] if found else None


def first_of(raw: Path, *names: str) -> Path | None:
    """Return the first of `names` that is a file in `raw`."""
    return next((raw / name for name in names if (raw / name).is_file()), None)


def folder_named(raw: Path, *words: str) -> Path | None:
    """Return the first subfolder of `raw` with one of `words` in its name, the words in order of preference."""
    folders = sorted(path for path in raw.iterdir() if path.is_dir())
    return next((path for word in words for path in folders if word in path.name.lower()), None)
