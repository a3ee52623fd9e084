"""The state of every random generator, to be put back later."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from recbole_mllm import ranks


def random_state() -> dict[str, Any]:
    """Return the state of every generator a training step may draw from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": cuda}


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Go on drawing where `random_state` was taken."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].cpu())  # loading may have moved it
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])


@contextmanager
def undisturbed() -> Iterator[None]:
    """Draw whatever within; afterwards all generators stand where they stood before."""
    state = random_state()
    try:
        yield
    finally:
        restore_random_state(state)


def seed_this_process(seed: int, epoch: int, batch: int) -> None:
    """Give each of several processes random numbers of its own, by (seed, epoch, batch, rank); alone, change nothing.

    What draws them in a training step is dropout that a model brings of its own; LoRA's is keyed (`mllm.dropout`).
    """
    if ranks.is_launched():
        mixed = np.random.SeedSequence([seed, epoch, batch, ranks.rank()])
        torch.manual_seed(int(mixed.generate_state(1, np.uint64)[0]))
