"""Where the layers of a local model go, as a user may say it (`device_map`): checked before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping

from recbole_mllm.common.errors import UserError

_SIZE = re.compile(r"\d+(\.\d+)?\s*[KMG]i?B")


def check_placement(
    device_map: str | None, max_memory: Mapping[int | str, int | str] | None, folder: str | None, *, all_served: bool
) -> None:
    """Refuse a placement that would place nothing, and a memory nobody could read.

    Raises:
        UserError: Names the key and what to write.
    """
    if device_map and all_served:
        raise UserError(
            f"device_map is {device_map}, but all models are behind servers, which place their own; leave it out"
        )
    for key, value in {"max_memory": max_memory, "offload_folder": folder}.items():
        if value is not None and not device_map:
            raise UserError(f"{key} is only read under device_map; set device_map: auto, or leave {key} out")
    for place, size in (max_memory or {}).items():
        # a GPU's number may come as text: JSON, which run records are written in, knows no other keys
        known = not isinstance(place, bool) and (place == "cpu" or str(place).isdecimal())
        readable = _SIZE.fullmatch(size) if isinstance(size, str) else not isinstance(size, bool) and size >= 0
        if not (known and readable):
            raise UserError(
                f"max_memory says {place!r}: {size!r}; give each GPU's number, or cpu, its room, for example "
                "{0: 20GiB, cpu: 60GiB}"
            )
