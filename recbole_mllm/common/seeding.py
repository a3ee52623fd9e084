"""Random generators: the state of all of them, and the seed of each training step."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from recbole_mllm.common import distributed


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


def seed_step(seed: int, epoch: int, batch: int) -> None:
    """Seed torch for the optimizer step that begins at `batch`, differently in each process.

    Dropout is what draws in a step. So a resumed run drops what the straight one does, on the same number of processes.
    """
    mixed = np.random.SeedSequence([seed, epoch, batch, distributed.process_index()])
    torch.manual_seed(int(mixed.generate_state(1, np.uint64)[0]))
