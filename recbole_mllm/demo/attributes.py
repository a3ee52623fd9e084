"""What a product of the demo world can be: four attributes only its image shows, one only its title tells."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

VALUES: Mapping[str, tuple[str, ...]] = {
    "colour": ("red", "orange", "yellow", "green", "blue", "purple"),
    "pattern": ("plain", "striped", "dotted", "checked"),
    "kind": ("mug", "bottle", "lamp", "chair", "shirt", "hat", "shoe", "clock"),
    "scene": ("studio", "wood", "grass", "night"),
    "theme": ("sport", "retro", "kids", "luxury", "travel"),
}
FIELDS = tuple(VALUES)
VISIBLE = FIELDS[:4]  # these four are in the image and nowhere else
BRANDS = (
    "Norvik", "Alba", "Tessro", "Quill", "Hanbury", "Orlo", "Maripo", "Zento",
    "Kestrel", "Lumo", "Padova", "Fjell", "Sorano", "Bexley", "Wren",
)  # fmt: skip

Traits = Mapping[str, str]
"""A value for each known field; an unknown field is left out."""


@dataclass(frozen=True, slots=True)
class Item:
    """One product: its brand, which nobody cares for, and its five attributes."""

    brand: str
    colour: str
    pattern: str
    kind: str
    scene: str
    theme: str

    @property
    def traits(self) -> dict[str, str]:
        """The five attributes by field name."""
        return {field: getattr(self, field) for field in FIELDS}

    @property
    def title(self) -> str:
        """Brand and theme, never anything the image shows."""
        return f"{self.brand} {self.theme} edition"


def is_reserved(traits: Traits) -> bool:
    """Say whether this look is reserved for demo worlds, so that the tiny MLLM has never seen it in image or text.

    About 30 % of the 768 looks are; a digest picks them, so the choice needs no list and never changes.
    """
    look = "|".join(traits[field] for field in VISIBLE)
    return hashlib.sha256(look.encode()).digest()[0] < 77


def draw_traits(rng: Random) -> dict[str, str]:
    """Draw a value for every field, all alike."""
    return {field: rng.choice(values) for field, values in VALUES.items()}


def draw_item(rng: Random, *, reserved: bool, taste: Traits | None = None, pull: float = 0.0) -> Item:
    """Draw an item whose look is reserved or not; each field follows `taste` with probability `pull` (below 1)."""
    while True:
        traits = draw_traits(rng)
        for field, wanted in (taste or {}).items():
            if rng.random() < pull:
                traits[field] = wanted
        if is_reserved(traits) == reserved:
            return Item(brand=rng.choice(BRANDS), **traits)
