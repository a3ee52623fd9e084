"""Seconds of each stage: from a device's table row, from a probe's rates, or from a server's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from recbole_mllm.mllm.anatomy import Anatomy
from recbole_mllm.planning.counts import Count
from recbole_mllm.planning.devices import Device


class Clock(Protocol):
    """Says how long a stage takes on one device."""

    def seconds(self, stage: str, count: Count) -> float | None:
        """Return the seconds of `count`, or None where nothing is known."""
        ...


@dataclass(frozen=True, slots=True)
class ByDevice:
    """By a device's assumed rates: arithmetic for reading and training, memory for writing where that is slower.

    Args:
        device: Its table row.
        anatomies: Of each stage's model; a stage without one is a server's.
        item: Bytes of one number.
        slots: Prompts that are written side by side.
    """

    device: Device
    anatomies: Mapping[str, Anatomy]
    item: int
    slots: int

    def seconds(self, stage: str, count: Count) -> float | None:
        """Return the seconds of `count`."""
        if stage not in self.anatomies:
            return None
        rate = self.device.flops_per_s(self.item)
        written = count.decode_flops + count.head_flops if count.decode_flops else 0.0
        return (count.flops - written) / rate + max(written / rate, self._moved(stage, count) / self.device.bytes_per_s)

    def _moved(self, stage: str, count: Count) -> float:
        """Return the bytes that writing reads: all weights each step, and every row's own keys and values."""
        if not count.decode_flops or not count.prompts:
            return 0.0
        anatomy = self.anatomies[stage]
        steps = max(0.0, count.new_tokens - count.prompts) / min(self.slots, max(1.0, count.prompts))
        return steps * anatomy.weight_bytes(self.item) + count.cache_reads * anatomy.cache_bytes(self.item)


@dataclass(frozen=True, slots=True)
class Measured:
    """What a probe of one stage took, and what it computed."""

    seconds: float
    flops: float
    prompts: int
    tokens: float


@dataclass(frozen=True, slots=True)
class ByProbe:
    """By this machine's measured rates: seconds grow with the operations, and with the images to preprocess."""

    measured: Mapping[str, Measured]
    image_s: float = 0.0

    def seconds(self, stage: str, count: Count) -> float | None:
        """Return the seconds of `count`."""
        if not count.flops:
            return 0.0 if not count.prompts else None
        found = self.measured.get(stage) or (self.measured.get("test") if stage == "valid" else None)
        if found is None:
            return None
        images = self.image_s * count.images if stage in ("sft", "valid", "test") else 0.0
        return found.seconds * count.flops / found.flops + images


@dataclass(frozen=True, slots=True)
class ByServer:
    """By requests a second, all servers together."""

    requests_per_s: float

    def seconds(self, stage: str, count: Count) -> float | None:
        """Return the seconds of `count`."""
        return count.prompts / self.requests_per_s


def chain_seconds(device: Device, anatomy: Anatomy, item: int, count: Count, chain: int) -> float:
    """Return how long the longest user's chain takes by itself: its prompts wait for one another.

    Args:
        device: What one prompt runs on.
        anatomy: The user summariser's.
        item: Bytes of one number.
        count: Of all user summaries, whose mean prompt stands for each.
        chain: Prompts of the longest chain.
    """
    if not count.prompts or not chain:
        return 0.0
    mean = count.times(1 / count.prompts)
    moved = max(0.0, mean.new_tokens - 1) * anatomy.weight_bytes(item)
    return chain * (mean.prompt_flops / device.flops_per_s(item) + moved / device.bytes_per_s)


def all_reduce_seconds(device: Device, trained: int, steps: int, workers: int) -> float:
    """Return the seconds that float32 gradients of `trained` parameters travel in `steps` steps, in a ring."""
    return steps * 2 * (workers - 1) / workers * trained * 4 / (device.assumed_network_gb_s * 1e9)


def optimizer_steps(rows: float, batch: int, accumulation: int) -> int:
    """Return the optimizer's steps over an epoch of `rows`."""
    return math.ceil(math.ceil(rows / batch) / accumulation)
