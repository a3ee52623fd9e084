"""The learning rate of each optimizer step."""

from __future__ import annotations

import math


def rate_at(step: int, steps: int, warmup: int, kind: str) -> float:
    """Return the share of the learning rate at `step` of `steps`: rising over `warmup`, falling as `kind` says."""
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    done = min(1.0, step / max(1, steps))
    fall = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[kind]
    return rise * fall
