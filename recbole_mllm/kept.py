"""A file that several runs share: made by whoever comes first, whole for everybody after."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from glob import escape
from pathlib import Path


def made_once(path: Path, make: Callable[[Path], None]) -> bool:
    """Let `make` write `path` unless it is there; return whether it did.

    Who comes while it is being made waits for it. The lock goes with the process that holds it, so after ``kill -9``
    the next one begins anew; what the killed one left is removed.

    Args:
        path: Whole or absent at any time.
        make: Gets the scratch file to write, in the same folder and with the same suffix.
    """
    if path.is_file():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.is_file():
            return False
        _sweep(path)
        scratch = path.with_name(f"{path.stem}.part-{os.getpid()}{path.suffix}")
        make(scratch)
        scratch.replace(path)
    return True


def _sweep(path: Path) -> None:
    """Remove what a killed process has left of `path`; a hidden file is what `whole_file` was making a scratch of."""
    for hidden in ("", "."):
        for left in path.parent.glob(f"{hidden}{escape(path.stem)}.part-*{escape(path.suffix)}*"):
            left.unlink(missing_ok=True)
