"""``clean``: what runs have left behind that nobody needs again; nothing else, and nothing before ``--yes``."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil  # type: ignore[import-untyped]  # it ships no types

from recbole_mllm.common.files import (
    BENCHMARK,
    check_removable,
    left_scratch,
    remove_empty_folder,
    remove_file,
    remove_scratch,
)
from recbole_mllm.common.resources import MLLM

_TIME = r"-[A-Z][a-z]{2}-\d{2}-\d{4}_\d{2}-\d{2}-\d{2}"  # as RecBole names files by the moment
_LOG = rf"[^/]+{_TIME}-[0-9a-f]+"
KINDS = {
    "scratch": ("", "what killed processes had begun to write"),
    "logs": (
        rf"log/[^/]+/{_LOG}\.log|log_tensorboard/{_LOG}/(\d+\.\d+/)?events\.out\.tfevents\.[^/]+",
        "log files and Tensorboard curves",
    ),
    "scores": (
        r"scores-[0-9a-f]{32}\.\d+",
        "scores of killed evaluations, which a resumed run would not ask for again",
    ),
    "retrievers": (r"retriever-\w+-[0-9a-f]{12}\.pth", "retrievers of full rankings, which the next run trains again"),
    "pairs": (r"runs/[^/]+/(valid_)?scores\.npz", "scored pairs of runs: without them nothing is fused, no case shown"),
    "checkpoints": (
        rf"[^/]+{_TIME}((\.last)?\.pth|\.ids|/(adapter_config\.json|\w+\.safetensors))",
        "trained models: without them nothing is recommended or exported",
    ),
}
"""What ``--kind`` names: how the ends of the paths read, and what they are."""

DEFAULT = ("scratch", "scores", "retrievers")
"""Logs are named as stock RecBole names its own, so whose they are is unknown: they are removed only if named."""


_OURS: dict[str, Callable[[Path], bool]] = {
    "pairs": lambda path: BENCHMARK.outputs(path.parents[2]) is not None,
    "checkpoints": lambda path: (
        any(name.startswith(f"{MLLM}-") for name in (path.name, path.parent.name))
        or path.with_suffix(".ids").is_file()  # which our runs of a baseline leave beside it
    ),
}
"""What else shows that a file of such a name is no one else's, such as stock RecBole's."""


class Found(NamedTuple):
    """Something that may be removed."""

    kind: str
    path: Path
    size: int


def clean(folders: Collection[Path], kinds: Collection[str], *, remove: bool, tell: Callable[[str], None]) -> None:
    """Say what below `folders` is of these `kinds`, and remove it if asked to.

    No link is followed, and of what another process is at work on nothing is touched.

    Raises:
        UserError: A folder is none, or is the working or home folder, or above it.
    """
    found: list[Found] = []
    for folder in folders:
        check_removable(folder, "clean")
        found += _below(folder, kinds)
    for kind in sorted({one.kind for one in found}):
        own = [one for one in found if one.kind == kind]
        tell(f"{kind}: {len(own)} files, {sum(one.size for one in own) / 1e6:.1f} MB")
        for one in own:
            tell(f"  {one.path}")
            if remove:
                _remove(one)
    total = sum(one.size for one in found) / 1e6
    if not found:
        tell("nothing to remove")
    elif remove:
        tell(f"{len(found)} removed, {total:.1f} MB freed")
    else:
        tell(f"{len(found)} would be removed, {total:.1f} MB; nothing is removed without --yes")


def _below(folder: Path, kinds: Collection[str]) -> Iterator[Found]:
    """Yield what is of these `kinds`, but for what a process has open."""
    used = _open_files()
    for place, folders, names in os.walk(folder):
        folders.sort()
        here = Path(place)
        if "scratch" in kinds:
            yield from (Found("scratch", path, _size(path)) for path in left_scratch(here))
        for name in sorted(names):
            path = here / name
            kind = next((kind for kind, (form, _) in KINDS.items() if form and _matches(form, path, folder)), None)
            if kind not in kinds or path.is_symlink() or os.path.realpath(path) in used:
                continue
            if kind not in _OURS or _OURS[kind](path):
                yield Found(str(kind), path, _size(path))


def _matches(form: str, path: Path, folder: Path) -> bool:
    return (
        re.fullmatch(rf"(.*/)?({form})", f"{folder.absolute().name}/{path.relative_to(folder).as_posix()}") is not None
    )


def _size(path: Path) -> int:
    inside = [Path(place, name) for place, _, names in os.walk(path) for name in names] if path.is_dir() else [path]
    return sum(one.lstat().st_size for one in inside)


def _open_files() -> set[str]:
    """Return the files that processes of this machine have open, as far as this one may know."""
    found: set[str] = set()
    for process in psutil.process_iter(["open_files"]):
        found |= {os.path.realpath(file.path) for file in process.info["open_files"] or ()}
    return found


def _remove(one: Found) -> None:
    """Remove what was found, and a folder that held nothing else."""
    if one.kind == "scratch":
        remove_scratch(one.path)
        return
    remove_file(one.path)
    for folder in one.path.parents if one.kind == "logs" else ():
        remove_empty_folder(folder)
        if folder.name in ("log", "log_tensorboard"):
            break
