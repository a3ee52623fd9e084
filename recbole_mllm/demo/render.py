"""Draw a product of the demo world: a scene behind, a silhouette filled with a coloured pattern."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw, ImageFilter

from recbole_mllm.demo.attributes import Item

SIDE = 128

Colour = tuple[int, int, int]
_COLOURS: Mapping[str, Colour] = {
    "red": (205, 35, 40), "orange": (245, 135, 25), "yellow": (245, 215, 45),
    "green": (45, 150, 60), "blue": (40, 85, 205), "purple": (125, 50, 165),
}  # fmt: skip
_DARK, _LIGHT = (25, 25, 25), (250, 250, 250)


def render(item: Item, seed: int) -> Image.Image:
    """Draw `item`; `seed` moves, scales and tints the drawing a little, never what it shows."""
    rng = Random(seed)
    picture = _background(item.scene, rng)
    base = _jitter(_COLOURS[item.colour], rng)
    texture = _texture(item.pattern, base, rng)
    pen = _Pen.draw(rng)
    pen.silhouette(item.kind)
    too_dark = item.scene == "night" and sum(base) < 270
    picture.paste(_LIGHT if too_dark else _DARK, (0, 0), pen.mask.filter(ImageFilter.MaxFilter(5)))
    picture.paste(texture, (0, 0), pen.mask)
    if item.kind == "clock":
        _clock_hands(ImageDraw.Draw(picture), pen)
    return picture


def _jitter(colour: Colour, rng: Random, spread: int = 14) -> Colour:
    r, g, b = (max(0, min(255, part + rng.randint(-spread, spread))) for part in colour)
    return r, g, b


# ---- scenes


def _background(scene: str, rng: Random) -> Image.Image:
    ground = {"studio": (236, 236, 238), "wood": (176, 128, 82), "grass": (150, 205, 245), "night": (20, 24, 66)}
    picture = Image.new("RGB", (SIDE, SIDE), _jitter(ground[scene], rng, 8))
    _SCENES[scene](ImageDraw.Draw(picture), rng)
    return picture


def _studio(draw: ImageDraw.ImageDraw, rng: Random) -> None:
    draw.rectangle((0, int(0.8 * SIDE), SIDE, SIDE), fill=_jitter((215, 215, 220), rng, 8))


def _wood(draw: ImageDraw.ImageDraw, rng: Random) -> None:
    for y in range(-rng.randint(0, 24), SIDE, 24):
        draw.rectangle((0, y, SIDE, y + 11), fill=_jitter((150, 104, 62), rng, 8))


def _grass(draw: ImageDraw.ImageDraw, rng: Random) -> None:
    draw.rectangle((0, int(rng.uniform(0.5, 0.65) * SIDE), SIDE, SIDE), fill=_jitter((110, 180, 80), rng))


def _night(draw: ImageDraw.ImageDraw, rng: Random) -> None:
    for _ in range(22):
        x, y = rng.randint(0, SIDE), rng.randint(0, SIDE)
        draw.ellipse((x, y, x + 3, y + 3), fill=(240, 240, 200))


_SCENES = {"studio": _studio, "wood": _wood, "grass": _grass, "night": _night}


# ---- patterns


def _texture(pattern: str, base: Colour, rng: Random) -> Image.Image:
    texture = Image.new("RGB", (SIDE, SIDE), base)
    width = rng.randint(15, 19)
    start = -rng.randint(0, width)
    r, g, b = (int(part + (255 - part) * 0.72) for part in base)
    _PATTERNS[pattern](ImageDraw.Draw(texture), start, width, (r, g, b))
    return texture


def _plain(draw: ImageDraw.ImageDraw, start: int, width: int, light: Colour) -> None:
    """One colour all over."""


def _striped(draw: ImageDraw.ImageDraw, start: int, width: int, light: Colour) -> None:
    for y in range(start, SIDE, width):
        draw.rectangle((0, y, SIDE, y + width // 2 - 1), fill=light)


def _dotted(draw: ImageDraw.ImageDraw, start: int, width: int, light: Colour) -> None:
    for row, y in enumerate(range(start, SIDE, width)):
        for x in range(start + row % 2 * width // 2, SIDE, width):
            draw.ellipse((x, y, x + 8, y + 8), fill=light)


def _checked(draw: ImageDraw.ImageDraw, start: int, width: int, light: Colour) -> None:
    side = width // 2 + 2
    for row, y in enumerate(range(start, SIDE, side)):
        for column, x in enumerate(range(start, SIDE, side)):
            if (row + column) % 2:
                draw.rectangle((x, y, x + side - 1, y + side - 1), fill=light)


_PATTERNS = {"plain": _plain, "striped": _striped, "dotted": _dotted, "checked": _checked}


# ---- kinds


@dataclass(frozen=True, slots=True)
class _Pen:
    """Draws on `mask` in a unit square that is placed and scaled within the picture."""

    mask: Image.Image
    left: float
    top: float
    scale: float

    @classmethod
    def draw(cls, rng: Random) -> _Pen:
        scale = rng.uniform(0.78, 1.0) * SIDE
        left = (SIDE - scale) / 2 + rng.uniform(-0.06, 0.06) * SIDE
        top = (SIDE - scale) / 2 + rng.uniform(-0.05, 0.05) * SIDE
        return cls(Image.new("L", (SIDE, SIDE), 0), left, top, scale)

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.left + x * self.scale, self.top + y * self.scale

    def box(self, x0: float, y0: float, x1: float, y1: float) -> tuple[float, float, float, float]:
        return (*self.at(x0, y0), *self.at(x1, y1))

    def silhouette(self, kind: str) -> None:
        draw = ImageDraw.Draw(self.mask)
        for points in _POLYGONS.get(kind, ()):
            draw.polygon([self.at(x, y) for x, y in points], fill=255)
        for corners in _BOXES.get(kind, ()):
            draw.rectangle(self.box(*corners), fill=255)
        for corners in _ELLIPSES.get(kind, ()):
            draw.ellipse(self.box(*corners), fill=255)
        if kind == "mug":
            draw.ellipse(self.box(0.54, 0.34, 0.88, 0.70), outline=255, width=int(0.08 * self.scale))
        if kind == "hat":
            draw.pieslice(self.box(0.22, 0.18, 0.78, 0.98), 180, 360, fill=255)


_Corners = tuple[float, float, float, float]
_BOXES: Mapping[str, tuple[_Corners, ...]] = {
    "mug": ((0.18, 0.25, 0.66, 0.82),),
    "bottle": ((0.32, 0.36, 0.68, 0.94), (0.43, 0.06, 0.57, 0.40)),
    "lamp": ((0.46, 0.50, 0.54, 0.84),),
    "chair": ((0.22, 0.08, 0.36, 0.92), (0.22, 0.50, 0.80, 0.64), (0.68, 0.60, 0.80, 0.92)),
}
_ELLIPSES: Mapping[str, tuple[_Corners, ...]] = {
    "lamp": ((0.28, 0.80, 0.72, 0.94),),
    "hat": ((0.02, 0.54, 0.98, 0.74),),
    "clock": ((0.10, 0.10, 0.90, 0.90),),
}
_SHIRT = (
    (0.32, 0.14), (0.68, 0.14), (0.96, 0.36), (0.84, 0.52), (0.72, 0.44),
    (0.72, 0.88), (0.28, 0.88), (0.28, 0.44), (0.16, 0.52), (0.04, 0.36),
)  # fmt: skip
_POLYGONS: Mapping[str, tuple[tuple[tuple[float, float], ...], ...]] = {
    "lamp": (((0.34, 0.10), (0.66, 0.10), (0.86, 0.50), (0.14, 0.50)),),
    "shirt": (_SHIRT,),
    "shoe": (((0.08, 0.32), (0.36, 0.32), (0.50, 0.54), (0.90, 0.62), (0.96, 0.80), (0.08, 0.80)),),
}


def _clock_hands(draw: ImageDraw.ImageDraw, pen: _Pen) -> None:
    draw.ellipse(pen.box(0.38, 0.38, 0.62, 0.62), fill=_LIGHT)
    for x, y in ((0.5, 0.2), (0.74, 0.5)):
        draw.line((*pen.at(0.5, 0.5), *pen.at(x, y)), fill=(10, 10, 10), width=6)
