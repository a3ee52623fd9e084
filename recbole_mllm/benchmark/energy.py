"""The energy of a run: read by codecarbon (extra ``energy``) from the machine's meters, and nothing where it has none.

codecarbon estimates what it cannot read, a processor by its name and all memory by its size; no estimate gets in here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any


@contextmanager
def measured_energy(device: Any, *, alone: bool) -> Iterator[dict[str, Any]]:
    """Yield what holds ``energy_kwh`` and ``energy_of`` afterwards, of the whole machine; without a meter, nothing.

    Args:
        device: Torch's, of the run; on a GPU its meter counts too.
        alone: Whether no other run shares the machine.
    """
    found: dict[str, Any] = {}
    here = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")  # no process on another machine
    tracker = _start() if alone and here and find_spec("codecarbon") else None
    try:
        yield found
    finally:
        if tracker is not None:
            found |= _stop(tracker, device)


def _start() -> Any:
    try:
        from codecarbon import OfflineEmissionsTracker

        tracker = OfflineEmissionsTracker(
            country_iso_code="USA", save_to_file=False, save_to_api=False, log_level="critical", pue=1.0,
            allow_multiple_runs=True, force_cpu_power=None, force_mode_cpu_load=False,
        )  # fmt: skip
        tracker.start()
        return tracker
    except Exception:  # whatever it meets on a machine: the run matters more than its meter
        logging.getLogger().warning("codecarbon cannot start, so energy is not measured", exc_info=True)
        return None


def _stop(tracker: Any, device: Any) -> dict[str, Any]:
    try:
        from codecarbon.core import cpu

        tracker.stop()
        data = tracker.final_emissions_data
        read = {"CPU": data.cpu_energy if cpu.is_rapl_available() else 0.0}
        read["GPU"] = data.gpu_energy if device.type == "cuda" else 0.0
    except Exception:  # as in `_start`: a meter that fails leaves the run without a figure, and no more
        logging.getLogger().warning("codecarbon failed, so energy is not measured", exc_info=True)
        return {}
    metered = {name: kwh for name, kwh in read.items() if kwh > 0}
    return {"energy_kwh": sum(metered.values()), "energy_of": " and ".join(metered)} if metered else {}
