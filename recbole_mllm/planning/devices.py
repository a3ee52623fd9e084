"""The devices of properties/devices.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from recbole_mllm.errors import UserError
from recbole_mllm.resources import PROPERTIES
from recbole_mllm.yamlfile import read_mapping


@dataclass(frozen=True, slots=True)
class Device:
    """One device; the assumed shares say how much of its peaks a run reaches."""

    name: str
    bf16_tflops: float
    fp32_tflops: float
    memory_gb: float
    bandwidth_gb_s: float
    assumed_share_of_peak: float
    assumed_share_of_bandwidth: float
    price_per_hour: float | None
    assumed_network_gb_s: float

    @property
    def kind(self) -> str:
        """What torch calls it."""
        return "cpu" if self.name.startswith("CPU") else "cuda"

    def flops_per_s(self, item: int) -> float:
        """Return the operations a second it is assumed to do on numbers of `item` bytes."""
        return (self.bf16_tflops if item <= 2 else self.fp32_tflops) * 1e12 * self.assumed_share_of_peak

    @property
    def bytes_per_s(self) -> float:
        """The bytes a second its memory is assumed to give."""
        return self.bandwidth_gb_s * 1e9 * self.assumed_share_of_bandwidth


def device(name: str) -> Device:
    """Return the device called `name`, in any case.

    Raises:
        UserError: There is none.
    """
    table = read_mapping(PROPERTIES / "devices.yaml")
    known = {key.lower(): key for key in table["devices"]}
    key = known.get(name.lower().replace(" ", "-"))
    if key is None:
        near = get_close_matches(name.lower(), known, n=1)
        hint = f"did you mean {known[near[0]]}?" if near else f"there are {', '.join(known.values())}"
        raise UserError(f"--device {name!r} is not in properties/devices.yaml; {hint}; --probe measures this machine")
    return Device(key, **table["devices"][key], assumed_network_gb_s=table["assumed_network_gb_s"])
