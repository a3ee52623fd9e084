"""Item images as small data URIs, so that the report is one file; as many and as large as the page can bear."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from recbole_mllm.data.images import open_image, resolve

SIDE = 96
"""The longest side in pixels: enough to recognise an item, too little to replace the picture."""

TRIES = ((SIDE, 70), (72, 60), (48, 55))  # side in pixels, JPEG quality: the next where the page would grow too big
BUDGET = 1_300_000
"""Characters that all thumbnails together may take, so that the page stays below two megabytes."""


def thumbnails(images: Iterable[str], folders: Sequence[Path]) -> Mapping[str, str]:
    """Return a data URI for each of `images`, paths relative to one of `folders`, that can be had.

    An image is counted as often as it is given, as the page holds it that often. What cannot be read, lies outside the
    folders or does not fit the budget is left out.
    """
    uses = Counter(image for image in images if image)
    opened = {image: picture for image in uses if (picture := _small(image, folders)) is not None}
    made: dict[str, str] = {}
    for side, quality in TRIES:
        made = {image: _encode(picture, side, quality) for image, picture in opened.items()}
        if sum(len(uri) * uses[image] for image, uri in made.items()) <= BUDGET:
            return made
    kept, spent = {}, 0
    for image, uri in made.items():
        spent += len(uri) * uses[image]
        if spent <= BUDGET:
            kept[image] = uri
    return kept


def _small(image: str, folders: Sequence[Path]) -> Image.Image | None:
    for folder in folders:
        path, _ = resolve(folder, image)
        if path is None:
            continue
        try:
            picture = open_image(path)
        except OSError:
            continue
        picture.thumbnail((SIDE, SIDE))
        return picture
    return None


def _encode(picture: Image.Image, side: int, quality: int) -> str:
    smaller = picture.copy()
    smaller.thumbnail((side, side))
    data = io.BytesIO()
    smaller.save(data, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
