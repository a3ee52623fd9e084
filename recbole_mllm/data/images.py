"""Images of items: found by path or by item id, checked, and opened as upright RGB."""

from __future__ import annotations

import hashlib
import warnings
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageOps

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_PIXELS = 50_000_000  # a larger image is a decompression bomb or no product photo


def find_image(folder: Path, item: str) -> Path | None:
    """Return the image of raw id `item` in `folder` (or its ``images`` subfolder), or None."""
    if not item or "/" in item or "\\" in item or item.startswith("."):
        return None
    for parent in (folder, folder / "images"):
        for suffix in SUFFIXES:
            if (path := parent / f"{item}{suffix}").is_file():
                return path
    return None


def inside(folder: Path, relative: str) -> Path | None:
    """Return the file `relative` names below `folder`; None where it is empty, absent or leads out of the folder."""
    if not relative:
        return None
    path = folder / relative
    if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        return None
    return path


def open_image(path: Path) -> Image.Image:
    """Open `path` as an upright RGB image; transparent parts turn white.

    Raises:
        OSError: It is no image PIL can read, or has more than `MAX_PIXELS` pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise OSError(f"{path}: {image.width}x{image.height} pixels are more than {MAX_PIXELS}")
                return _rgb(ImageOps.exif_transpose(image))
        except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise OSError(f"{path}: {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = image.point(lambda value: value / 257).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(ground, layer).convert("RGB")
    return image.convert("RGB")


def is_readable(path: Path) -> bool:
    """Return whether `open_image` would succeed."""
    try:
        open_image(path)
    except OSError:
        return False
    return True


@lru_cache(maxsize=1_000_000)
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def image_digest(path: Path) -> str:
    """Return the SHA-256 of the image's bytes, computed once for each state of the file."""
    stat = path.stat()
    return _digest(path, stat.st_size, stat.st_mtime_ns)
