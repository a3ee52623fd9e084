"""Which items have an image that can be used, and why the others have none; what was decoded once is remembered.

Only decoding a file to its end shows that it is whole (half a millisecond a poster); a check of the headers alone would
let a run die, or silently change its prompts, hours later. So all images are decoded before a run, by all cores, and of
a large collection the verdicts are kept beside the dataset, each with its file's size and time, so that the next run
asks only for those. The file is a convenience: where it cannot be read or written, the images are decoded again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import PIL

from recbole_mllm.data.atomic import whole_file
from recbole_mllm.data.images import MAX_PIXELS, find_image, is_extreme, problem, resolve, size_of
from recbole_mllm.progress import Progress

REMEMBER_FROM = 1_000  # fewer images are decoded again in a second or two, without a file
_EDITION = f"2 pillow {PIL.__version__} pixels {MAX_PIXELS}"  # another Pillow may judge otherwise
_SIZE = re.compile(r"(\d+)x(\d+)")
_State = tuple[int, int]  # size in bytes, time of change in ns


class Missing(NamedTuple):
    """An item without an image, in the words of ``missing_images.tsv``."""

    item: str
    path: str
    reason: str


@dataclass(slots=True)
class ItemImages:
    """Images by raw item id; `missing` are those that were named but cannot be used, `absent` were not to be found.

    `extreme` holds width and height, in pixels, of those found that a model's processor may refuse (`is_extreme`).
    """

    found: dict[str, Path] = field(default_factory=dict)
    extreme: dict[str, tuple[int, int]] = field(default_factory=dict)
    missing: list[Missing] = field(default_factory=list)
    absent: list[Missing] = field(default_factory=list)

    def add(self, folder: Path, item: str, relative: str, image_dir: Path | None) -> None:
        """Look for an item's image at `relative` below `folder`, else by its id in `image_dir`."""
        path, reason = resolve(folder, relative) if relative else (None, None)
        refused = None
        if path is None and image_dir is not None:
            path, refused = find_image(image_dir, item)
        if path is not None:
            self.found[item] = path
        elif relative:
            self.missing.append(Missing(item, relative, str(reason)))
        elif refused is not None:
            self.missing.append(Missing(item, str(image_dir), refused))
        elif image_dir is not None:
            self.absent.append(Missing(item, "", f"no image of this id in {image_dir}"))

    def check(self, folder: Path) -> None:
        """Decode what was found; images that cannot be opened become missing."""
        reasons, self.extreme = judged(folder, self.found)
        for item, reason in reasons.items():
            self.missing.append(Missing(item, str(self.found.pop(item)), reason))


def judged(folder: Path, images: Mapping[str, Path]) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
    """Return the reason of each item whose image cannot be opened, and the size of each extreme one, in that order."""
    memory = folder / f".{folder.name}.images"
    known = _recall(memory)
    states = {path: _state(path) for path in dict.fromkeys(images.values())}
    verdicts = {p: known[str(p)][1] for p, s in states.items() if str(p) in known and known[str(p)][0] == s}
    fresh = [path for path in states if path not in verdicts]
    verdicts |= dict(zip(fresh, _judge(fresh), strict=True))
    if len(fresh) >= REMEMBER_FROM or (fresh and known):
        _remember(memory, ((path, state, verdicts[path]) for path, state in states.items()))
    told = {item: verdict for item, path in images.items() if (verdict := verdicts[path])}
    sizes = {item: found for item, verdict in told.items() if (found := _SIZE.fullmatch(verdict))}
    reasons = {item: verdict for item, verdict in told.items() if item not in sizes}
    return reasons, {item: (int(found[1]), int(found[2])) for item, found in sizes.items()}


def _state(path: Path) -> _State:
    try:
        found = path.stat()
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _judge(paths: list[Path]) -> list[str]:
    """Return each image's problem, its size where that is extreme, or ""; Pillow decodes outside Python's lock."""
    out = []
    with Progress(len(paths), "checking images", "image") as shown, ThreadPoolExecutor(os.cpu_count()) as pool:
        for verdict in pool.map(_verdict, paths):
            out.append(verdict)
            shown.update(1)
    return out


def _verdict(path: Path) -> str:
    if (reason := problem(path)) is not None:
        return reason
    size = size_of(path)
    return f"{size[0]}x{size[1]}" if size is not None and is_extreme(size) else ""


def _recall(memory: Path) -> dict[str, tuple[_State, str]]:
    known: dict[str, tuple[_State, str]] = {}
    with suppress(OSError, ValueError), memory.open(encoding="utf-8", newline="\n") as file:
        if file.readline() != _EDITION + "\n":
            return {}
        for line in file:
            path, size, changed, reason = line.removesuffix("\n").split("\t")
            known[path] = (int(size), int(changed)), reason
    return known


def _remember(memory: Path, verdicts: Iterable[tuple[Path, _State, str]]) -> None:
    with suppress(OSError, UnicodeEncodeError), whole_file(memory) as file:
        file.write(_EDITION + "\n")
        for path, (size, changed), reason in verdicts:
            if not {"\t", "\n"} & set(str(path)):
                file.write(f"{path}\t{size}\t{changed}\t{' '.join(reason.split())}\n")
