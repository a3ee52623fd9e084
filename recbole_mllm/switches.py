"""What Accelerate's launcher tells the processes it starts, by the environment."""

from __future__ import annotations

import os


def wants_cpu() -> bool:
    """Return whether GPUs are to be left alone."""
    return _says_yes("ACCELERATE_USE_CPU")


def wants_deepspeed() -> bool:
    """Return whether to take DeepSpeed, at any stage."""
    return _says_yes("ACCELERATE_USE_DEEPSPEED")


def wants_fsdp() -> bool:
    """Return whether to take FSDP."""
    return _says_yes("ACCELERATE_USE_FSDP")


def _says_yes(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")
