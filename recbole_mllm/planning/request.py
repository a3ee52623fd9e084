"""What a plan is asked for beside the configuration."""

from __future__ import annotations

from dataclasses import dataclass

from recbole_mllm.errors import UserError
from recbole_mllm.ranges import COUNT, Range

LIMIT = 20_000  # prompts of a stage that are all counted; beyond, a sample stands for them


@dataclass(frozen=True, slots=True)
class Request:
    """How a plan is priced.

    Args:
        device: A name in properties/devices.yaml.
        probe: Whether this machine is measured.
        nodes: Over how many nodes of `devices_per_node` each the work is split.
        price_per_hour: Of one device.
        requests_per_s: What all servers together answer.
        limit: Prompts of a stage above which a sample is counted.
    """

    device: str | None = None
    probe: bool = False
    nodes: int = 1
    devices_per_node: int | None = None
    price_per_hour: float | None = None
    requests_per_s: float | None = None
    limit: int = LIMIT

    def __post_init__(self) -> None:
        if self.device and self.probe:
            raise UserError(
                "--device prices a device by its data sheet, --probe measures this machine; give one of them"
            )
        whole, above_0 = COUNT, Range(float, above=0)
        limits = {"nodes": whole, "devices_per_node": whole, "price_per_hour": above_0, "requests_per_s": above_0}
        for name, limit in limits.items():
            if (value := getattr(self, name)) is not None:
                limit.checked(f"--{name}", value)

    @property
    def workers(self) -> int:
        """Devices that work side by side: 8 a node where several nodes are asked for, else one."""
        return self.nodes * (self.devices_per_node or (8 if self.nodes > 1 else 1))
