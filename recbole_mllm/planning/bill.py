"""Hours and money, on one device or split over many."""

from __future__ import annotations

from typing import Any

from recbole_mllm.planning.devices import Device
from recbole_mllm.planning.hours import Clock, all_reduce_seconds, chain_seconds, optimizer_steps
from recbole_mllm.planning.models import STAGES, Models
from recbole_mllm.planning.prepared import Prepared
from recbole_mllm.planning.request import Request
from recbole_mllm.planning.stages import Counted, rounds


def bill(
    p: Prepared, models: Models, counted: Counted, clock: Clock | None, named: Device | None, request: Request
) -> dict[str, Any] | None:
    """Return hours by stage over all workers, the whole wall time and the price; None where no clock is known.

    Work is split evenly; what cannot be: a user's chain is written one state after the other, a step's rows go to
    no more workers than there are rows, and an adapter's gradients travel after each step.
    """
    if clock is None:
        return None
    workers, wall = request.workers, dict[str, float]()
    for name in STAGES:
        seconds = clock.seconds(name, counted.counts[name]) if models.blueprint(name) is not None else None
        if seconds is None:
            continue
        split, serial = _split(name, p, models, counted, named, workers)
        wall[name] = max(seconds / split, serial) if name == "users" else seconds / split + serial
    total = sum(wall.values()) / 3600
    price = request.price_per_hour or (named.price_per_hour if named else None)
    return {
        "workers": workers,
        "hours": {name: seconds / 3600 for name, seconds in wall.items()},
        "wall_hours": total,
        "device_hours": total * workers,
        "price": price and price * total * workers,
    }


def _split(
    name: str, p: Prepared, models: Models, counted: Counted, named: Device | None, workers: int
) -> tuple[int, float]:
    """Return over how many workers a stage is split, and the seconds that splitting cannot shorten, or adds."""
    one = counted.counts[name]
    if name == "users" and named and workers > 1:
        anatomy = models.anatomies()["users"]
        return workers, chain_seconds(named, anatomy, models.item_bytes, one, counted.summaries.users.longest_chain)
    if name != "sft" or workers == 1:
        return workers, 0.0
    batch, group = int(p.config["train_batch_size"]), p.settings.train.gradient_accumulation_steps
    split, epochs = min(workers, batch * group), max(1, rounds(p)[0])
    steps = epochs * optimizer_steps(one.prompts / epochs, batch, group)
    return split, all_reduce_seconds(named, models.trained, steps, split) if named else 0.0
