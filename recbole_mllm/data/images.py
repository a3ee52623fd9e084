"""Images of items: found by path or by item id, checked, opened as upright RGB; which items have a usable one.

Only decoding a file to its end shows that it is whole (half a millisecond a poster); a check of the headers alone would
let a run die, or silently change its prompts, hours later. So all images are decoded before a run, by all cores.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePath
from typing import NamedTuple

from PIL import Image, ImageOps, UnidentifiedImageError

from recbole_mllm.common.files import whole_file
from recbole_mllm.common.progress import Progress
from recbole_mllm.data.atomic import clean

IMAGES = "images"  # the folder of a dataset that holds its images
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_PIXELS = 50_000_000  # a larger image is a decompression bomb or no product photo
_NO_FILE = {errno.ENOENT: "does not exist", errno.ENOTDIR: "does not exist", errno.ELOOP: "is a link to itself"}
# Pillow knows many more, of which EPS would even start Ghostscript
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_SMALL, _LONG = 64, 10  # a processor that refuses images beyond these would refuse the ordinary ones too
_DRAFT = (64, 64)  # JPEG is decoded at an eighth of its size where only its soundness is asked
_EASY = {"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"}  # modes that `_rgb` never fails on


def resolve(folder: Path, relative: str) -> tuple[Path | None, str | None]:
    """Return the file that `relative` names below `folder`, or None and the reason why there is none.

    `folder` may itself be a link, and so may the ``images`` in it; no link below them may lead out.
    """
    if not relative:
        return None, "no path is given"
    try:
        parts = PurePath(relative).parts
        roots = [folder, folder / IMAGES] if parts[:1] == (IMAGES,) and ".." not in parts else [folder]
        path = Path(os.path.realpath(os.path.join(folder, relative)))
        if not any(path.is_relative_to(os.path.realpath(root)) for root in roots):
            return None, "leads out of the folder"
        mode = path.stat().st_mode
    except OSError as error:
        return None, _NO_FILE.get(error.errno or 0, f"cannot be a file: {error.strerror}")
    except ValueError as error:  # a NUL in the path
        return None, f"cannot be a file: {error}"
    return (folder / relative, None) if stat.S_ISREG(mode) else (None, "is no file")


def find_image(folder: Path, item: str) -> tuple[Path | None, str | None]:
    """Return the image of raw id `item` in `folder` (or its ``images`` subfolder), or None and the reason.

    A link that leads out of the folder it lies in is no image; the folder itself may be a link.
    """
    reason = None
    if not item or "/" in item or "\\" in item or item.startswith("."):
        return None, None
    suffixes = (*SUFFIXES, *map(str.upper, SUFFIXES))  # cameras write .JPG
    for name in (f"{parent}{item}{suffix}" for parent in ("", f"{IMAGES}/") for suffix in suffixes):
        if os.path.lexists(folder / name):
            path, refusal = resolve(folder, name)
            if path is not None:
                return path, None
            reason = reason or f"{name} {refusal}"
    return None, reason


def open_image(path: Path) -> Image.Image:
    """Open `path` as an upright RGB image, of an animation the first frame; transparent parts turn white.

    Raises:
        OSError: It is no image PIL can read, is broken, or has more than `MAX_PIXELS` pixels.
    """
    with _opened(path) as image:
        return _rgb(_upright(image))


def problem(path: Path) -> str | None:
    """Return why `open_image` would refuse `path`, in words that follow its name, or None."""
    found = decode(path)
    return found if isinstance(found, str) else None


def decode(path: Path) -> tuple[int, int] | str:
    """Return an image's width and height in pixels, or why `open_image` would refuse it.

    All of the file is decoded, as nothing less finds one cut short; a JPEG at an eighth of its size.
    """
    try:
        with _opened(path) as image:
            size = (int(image.width), int(image.height))
            image.draft(None, _DRAFT)
            image.load()
            if image.mode not in _EASY or "transparency" in image.info:
                _rgb(image)
            return size
    except OSError as error:
        return str(error).removeprefix(f"{path}: ")


def is_extreme(size: tuple[int, int]) -> bool:
    """Return whether an image is so small or so long that a model's processor may refuse it."""
    return min(size) < _SMALL or max(size) > _LONG * min(size)


# Pillow warns of odd files, which are refused or opened all the same; `catch_warnings` would not be safe in threads
warnings.filterwarnings("ignore", module=r"PIL\.")


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open `path`, checked for its size but not yet decoded; whatever goes wrong is an OSError with the reason."""
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):  # a pipe would be waited for
            raise _Refused("is no file")
        if state.st_size == 0:
            raise _Refused("is empty")
        with Image.open(path, formats=_formats()) as image:
            if (count := image.width * image.height) > MAX_PIXELS:
                raise _Refused(f"has {count:,} pixels, more than {MAX_PIXELS:,}")
            yield image
    # Pillow's readers raise whatever a broken file makes them meet: struct.error, IndexError, EOFError, ...
    except Exception as error:
        raise OSError(f"{path}: {_reason(path, error)}") from error


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


class _Refused(Exception):
    """A reason of our own, in the words of the report."""


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, _Refused):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):  # beyond Pillow's own limit, which is higher
        return f"has {int(re.findall(r'[0-9]+', str(error))[0]):,} pixels, more than {MAX_PIXELS:,}"
    if isinstance(error, UnidentifiedImageError):
        return _kind(path)
    if isinstance(error, OSError) and error.errno is not None:
        return {errno.EACCES: "may not be read", errno.ENOENT: "does not exist"}.get(error.errno, str(error.strerror))
    text = clean(str(error))
    if "decoder object" in text:  # WebP
        return "is truncated or broken"
    return "is truncated" if "truncated" in text.lower() else f"is broken ({text[:80] or type(error).__name__})"


def _kind(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in start:
        return "is no image of pixels (SVG drawing)"
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")) or b"<html" in start:
        return "is no image (HTML page)"
    starts = (b"\xff\xd8\xff", b"\x89png", b"gif8", b"riff", b"bm")
    return "is truncated" if start.startswith(starts) else "is no image"


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except OSError:
        raise
    except Exception:  # damaged EXIF data says nothing of the picture
        image.load()
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode[0] in "IF":
        image = _eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(ground, layer).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return 16-bit grey, 32-bit grey or floating-point grey as 8-bit grey; beyond 16 bits the full range is used."""
    deep = image.convert("F")
    low, high = deep.getextrema()
    assert isinstance(low, float) and isinstance(high, float)
    if image.mode != "F" and low >= 0 and high <= 65_535:
        low, high = 0.0, 65_535.0
    elif low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    scale = 255 / ((high - low) or 1.0)
    return deep.point(lambda value: value * scale + (0.5 - low * scale)).convert("L")


MISSING_HEADER = b"item_id\tpath\treason\n"


def write_report(path: Path, rows: Iterable[tuple[str, str, str]]) -> int:
    """Write ``item_id, path, reason`` of each missing image, tab-separated, whole or not at all; return how many."""
    count = 0
    with whole_file(path) as file:
        file.write(MISSING_HEADER.decode())
        for row in rows:
            file.write("\t".join(" ".join(value.split()) for value in row).encode(errors="replace").decode() + "\n")
            count += 1
    return count


@lru_cache(maxsize=1_000_000)
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def image_digest(path: Path) -> str:
    """Return the SHA-256 of the image's bytes, computed once for each state of the file."""
    stat = path.stat()
    return _digest(path, stat.st_size, stat.st_mtime_ns)


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

    def check(self) -> None:
        """Decode what was found; images that cannot be opened become missing."""
        reasons, self.extreme = check_images(self.found)
        for item, reason in reasons.items():
            self.missing.append(Missing(item, str(self.found.pop(item)), reason))


def check_images(images: Mapping[str, Path]) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
    """Return the reason of each item whose image cannot be opened, and the size of each extreme one, in that order."""
    reasons: dict[str, str] = {}
    extreme: dict[str, tuple[int, int]] = {}
    with Progress(len(images), "checking images", "image") as shown, ThreadPoolExecutor(os.cpu_count()) as pool:
        for item, found in zip(images, pool.map(decode, images.values()), strict=True):  # outside Python's lock
            if isinstance(found, str):
                reasons[item] = found
            elif is_extreme(found):
                extreme[item] = found
            shown.update(1)
    return reasons, extreme
