"""The pretraining images: drawn once, none of a reserved look."""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from recbole_mllm.demo.attributes import VISIBLE, Item, draw_item
from recbole_mllm.demo.render import render
from tiny_mllm.settings import IMAGE_SIDE, Budget

_FIRST_SEED = 10_000_000


@dataclass(frozen=True, slots=True)
class Pictures:
    """Items and their images, uint8 ``[N, 3, 64, 64]``; the last `held_out` are never trained on."""

    items: list[Item]
    pixels: Tensor
    held_out: int

    @property
    def training(self) -> int:
        """How many come first and are trained on."""
        return len(self.items) - self.held_out

    @property
    def unseen(self) -> list[int]:
        """The numbers of those held out."""
        return list(range(self.training, len(self.items)))

    def normalised(self, numbers: list[int]) -> Tensor:
        """Return ``[B, 3, 64, 64]`` in -1..1, as the image processor makes them."""
        return (self.pixels[numbers].float() / 255 - 0.5) / 0.5

    def draw(self, count: int, generator: torch.Generator) -> list[int]:
        """Draw the numbers of `count` training images."""
        numbers: list[int] = torch.randint(0, self.training, (count,), generator=generator).tolist()
        return numbers

    def values(self, tokens: dict[tuple[str, str], int], numbers: list[int]) -> Tensor:
        """Return ``[B, 16]``: the token each patch should carry; patch row r carries visible attribute r."""
        rows = [[tokens[field, self.items[n].traits[field]] for field in VISIBLE] for n in numbers]
        return torch.tensor(rows).repeat_interleave(4, dim=1)


def load_pictures(path: Path, budget: Budget) -> Pictures:
    """Read the images from `path`, or draw them first."""
    if not path.exists():
        with Pool(2) as pool:
            drawn = pool.map(_draw, range(budget.images), chunksize=200)
        pixels = torch.from_numpy(np.stack([image for _, image in drawn])).permute(0, 3, 1, 2).contiguous()
        scratch = path.with_suffix(".tmp")
        torch.save({"items": [(i.brand, i.traits) for i, _ in drawn], "pixels": pixels}, scratch)
        scratch.replace(path)
    saved = torch.load(path)
    return Pictures([Item(brand, **traits) for brand, traits in saved["items"]], saved["pixels"], budget.held_out)


def jittered(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Return `pixels` ``[B, 3, H, W]`` with contrast and tint changed a little."""
    count = len(pixels)
    contrast = 1 + 0.1 * torch.randn(count, 1, 1, 1, generator=generator)
    tint = 0.05 * torch.randn(count, 3, 1, 1, generator=generator)
    return (pixels * contrast + tint).clamp(-1, 1)


def _draw(number: int) -> tuple[Item, npt.NDArray[np.uint8]]:
    seed = _FIRST_SEED + number
    item = draw_item(Random(seed), reserved=False)
    small = render(item, seed).resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC)
    return item, np.asarray(small)
