"""Where the processes of a run meet: the key-value store that the launcher's environment names."""

from __future__ import annotations

import importlib
import os
from datetime import timedelta
from typing import Any

from recbole_mllm.errors import UserError

_CONNECT = timedelta(minutes=10)

# By process id, as a forked child must not share its parent's connection
_store_of: dict[int, Any] = {}
_failed: dict[int, NeverMet] = {}


class NeverMet(UserError):
    """This process could not reach the others where the launcher's environment says they are."""


def store() -> Any:
    """Return the store, connected once a process.

    Raises:
        NeverMet: The environment does not say where it is, or not all have come within `_CONNECT`; said at once when
            asked again, so that nobody waits twice.
    """
    process = os.getpid()
    if process in _failed:
        raise _failed[process]
    if process not in _store_of:
        group: Any = importlib.import_module("torch.distributed")
        try:
            found, _, _ = next(group.rendezvous("env://", timeout=_CONNECT))
        except (RuntimeError, ValueError) as error:
            _failed[process] = NeverMet(_why())
            raise _failed[process] from error
        _store_of[process] = group.PrefixStore("recbole_mllm", found)
    return _store_of[process]


def is_connected() -> bool:
    """Return whether this process has met the others."""
    return os.getpid() in _store_of


def has_failed() -> bool:
    """Return whether this process has tried to meet the others in vain."""
    return os.getpid() in _failed


def is_early() -> bool:
    """Return whether nobody may be there to connect to yet: what fails so early fails in all processes alike."""
    return not is_connected() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _why() -> str:
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        return (
            f"by RANK and WORLD_SIZE a launcher has started {size} processes, but {' and '.join(missing)} are not set; "
            "start with torchrun or accelerate launch, or unset RANK and WORLD_SIZE to run in one process"
        )
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return (
        f"process {rank} of {size} has not met the others at {where} within {_CONNECT.total_seconds():g} s; "
        "check that all were started, that process 0 runs there, and that nothing else uses that port"
    )
