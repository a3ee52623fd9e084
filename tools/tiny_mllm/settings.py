"""Budgets and places of the tiny MLLM's pretraining: steps, never wall time, so that a run can be repeated."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "recbole_mllm" / "demo" / "tiny"
IMAGE_SIDE, PATCH = 64, 16
IMAGE_TOKENS = (IMAGE_SIDE // PATCH) ** 2
LOG = logging.getLogger("tiny_mllm")


@dataclass(frozen=True, slots=True)
class Budget:
    """How much each stage may do, and how fast it learns."""

    seed: int = 0
    images: int = 20_000
    held_out: int = 500
    vision_steps: int = 2600
    vision_batch: int = 128
    vision_lr: float = 1e-3
    lm_steps: int = 1600
    lm_lr: float = 2e-3
    lm_two_threads_from: int = 700  # until then the vision stage has the other core
    align_steps: int = 3000
    align_batch: int = 256
    align_lr: float = 2e-3
    joint_steps: int = 200
    joint_lr: float = 6e-4
    align_weight: float = 0.3
    summaries: int = 24
    title_matches: int = 3
    matches: int = 48
    captions: int = 8
    text_summaries: int = 3
    fused_summaries: int = 3


SMOKE = Budget(
    images=600, held_out=100, vision_steps=6, lm_steps=6, lm_two_threads_from=3, align_steps=20, joint_steps=4
)


@dataclass(frozen=True, slots=True)
class Places:
    """Where a run keeps its working files."""

    work: Path

    @property
    def model(self) -> Path:
        """The folder the processor and the model are saved in."""
        return self.work / "model"

    @property
    def images(self) -> Path:
        """The pretraining images."""
        return self.work / "images.pt"

    def state(self, stage: str) -> Path:
        """The weights after `stage`."""
        return self.work / f"{stage}.pt"
