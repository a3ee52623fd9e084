"""The processes a launcher has started: which one this is, how they wait for each other, and how they end together.

``torchrun`` and ``accelerate launch`` say in RANK and WORLD_SIZE who a process is. Without them there is one process:
then everything here is the identity, and imports nothing. Process 0 is the main one: it alone writes.

Two ways lead to the others. The launcher's key-value store is asked again and again, so a wait there takes as long as
it takes. The process group (gloo, NCCL on GPUs) is made on first use: a process that only waits holds no GPU.
"""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from recbole_mllm import rendezvous, switches
from recbole_mllm.errors import UserError

LOST = 76  # the exit code of a process that ends because another one has, without its having said why
_ENDED = "failed"
_COLLECTIVE = timedelta(hours=6)  # one that hangs this long hangs for good; one whose peer dies ends at once
_PIECE = 2**22  # bytes
_FIRST_POLL_S, _LONGEST_POLL_S = 0.005, 0.5

T = TypeVar("T")
_turns: dict[str, int] = {}
_before_meeting: list[Callable[[], None]] = []  # one at most


class LostProcess(UserError):
    """Another process of this run has ended; unless it has said why, one of those left behind says this."""


def rank() -> int:
    """Return which process this is, from 0."""
    return _number("RANK") if is_launched() else 0


def world_size() -> int:
    """Return how many processes work on this run."""
    return _number("WORLD_SIZE") if is_launched() else 1


def local_rank() -> int:
    """Return which of this machine's processes this is: the number of its GPU."""
    return _number("LOCAL_RANK", 0) if is_launched() else 0


def is_main() -> bool:
    """Return whether this process is the one that writes files and speaks."""
    return rank() == 0


def is_launched() -> bool:
    """Return whether a launcher has started this process as one of several.

    Raises:
        UserError: What should say so is no number, or numbers more than there are.
    """
    if "RANK" not in os.environ or _number("WORLD_SIZE", 1) < 2:
        return False
    if _number("RANK") >= _number("WORLD_SIZE"):
        raise UserError(f"RANK is {_number('RANK')} of WORLD_SIZE {_number('WORLD_SIZE')}; it counts from 0")
    return True


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise UserError(
            f"{name} is {text!r} where a launcher would have put a number; start with torchrun or accelerate launch, "
            "or unset RANK and WORLD_SIZE to run in one process"
        )
    return int(text)


def start() -> None:
    """Join the process group, once: gloo for what is on the CPU, NCCL for what is on GPUs; take this process's GPU."""
    if not is_launched():
        return
    torch, group = _torch(), _dist()
    if group.is_initialized():
        return
    meet()
    backend = "gloo"
    if torch.cuda.is_available() and not switches.wants_cpu():
        torch.cuda.set_device(local_rank())
        backend = "cpu:gloo,cuda:nccl"
    with together():
        group.init_process_group(
            backend,
            store=group.PrefixStore("group", rendezvous.store()),
            rank=rank(),
            world_size=world_size(),
            timeout=_COLLECTIVE,
        )
    if not switches.wants_deepspeed():  # else it would start that in its own way, before `mllm.zero3` does
        importlib.import_module("accelerate").PartialState()  # so that Accelerate's own helpers know of the group


def is_joined() -> bool:
    """Return whether this process has joined a process group and not left it."""
    return is_launched() and "torch.distributed" in sys.modules and bool(_dist().is_initialized())


def gather_objects(value: T) -> list[T]:
    """Return the `value` of every process, by rank; who comes first waits for the last, however long."""
    if not is_launched():
        return [value]
    start()
    meet()
    out: list[Any] = [None] * world_size()
    with together():
        _dist().all_gather_object(out, value)
    return out


def broadcast_object(value: T) -> T:
    """Return the main process's `value`; the others wait for it however long."""
    return on_main(lambda: value)


def on_main(work: Callable[[], T]) -> T:
    """Let the main process alone do `work`, which may take hours, and return its result, pickled, in all of them."""
    if not is_launched():
        return work()
    key = _turn("main")
    if is_main():
        value = work()
        arrive()
        post(key, pickle.dumps(value))
        return value
    arrive()
    return pickle.loads(read(key))  # type: ignore[no-any-return]


def main_first(work: Callable[[], T]) -> T:
    """Let the main process do `work` first, however long; then the others do it, finding what it has left."""
    first = [work()] if is_main() else []
    on_main(lambda: None)
    return first[0] if first else work()


def post(key: str, value: bytes) -> None:
    """Put `value` where every process can `read` it, in pieces, as the store takes 8 MiB at most."""
    pieces = [value[start : start + _PIECE] for start in range(0, len(value), _PIECE)]
    for number, piece in enumerate(pieces):
        with together():
            rendezvous.store().set(f"{key}/{number}", piece)
    _told(lambda store: store.set(key, str(len(pieces))))


def is_posted(key: str) -> bool:
    """Return whether a process has put something at `key`."""
    return bool(_told(lambda store: store.check([key])))


def read(key: str) -> bytes:
    """Return what a process puts at `key`, waiting for it however long; if one fails meanwhile, this one does too."""
    _await(key)
    return _told(lambda store: b"".join(store.get(f"{key}/{number}") for number in range(int(store.get(key)))))


def count(key: str) -> int:
    """Return how many times processes have called this for `key`, this time included: who comes first gets 1."""
    return int(_told(lambda store: store.add(key, 1)))


def stop() -> None:
    """Leave, when all is done: the main process last, as it may be the host of what the others still ask."""
    if not is_launched() or not rendezvous.is_connected():
        return
    if _dist().is_initialized():
        _dist().destroy_process_group()
    came = count("left")
    patience = time.monotonic() + 60
    while is_main() and came < world_size() and time.monotonic() < patience:
        time.sleep(_FIRST_POLL_S)
        came = _told(lambda store: store.add("left", 0))


def meet() -> None:
    """Wait until every process has come here, however long that takes."""
    if not is_launched():
        return
    arrive()
    key = _turn("meet")
    if count(f"{key}/come") == world_size():
        _told(lambda store: store.set(key, b"1"))
    _await(key)


def before_meeting(take_part: Callable[[], None] | None) -> None:
    """Have `take_part` called wherever all processes meet, before this one waits; it returns when all have come.

    A model split among processes needs them all for every forward pass, also those that have nothing to ask. A later
    one takes its place: the model at work is the last one made. None ends it; all processes must say so together.
    """
    _before_meeting[:] = [] if take_part is None else [take_part]


def arrive() -> None:
    """Say that this process has come where all meet; every meeting here, and every collective elsewhere, begins so."""
    with together():
        for take_part in _before_meeting:
            take_part()


def report_failure(code: int) -> bool:
    """Tell the other processes that this one ends with `code`; return whether it is the first: it alone speaks."""
    if not is_launched() or rendezvous.has_failed():
        return True
    if rendezvous.is_early():
        return is_main()
    try:
        store = rendezvous.store()
        first: bool = store.add(f"{_ENDED}/count", 1) == 1
        if first:
            store.set(_ENDED, str(code))
        return first
    except (RuntimeError, rendezvous.NeverMet):  # its host has ended, and has spoken
        return is_main()


def failure_code(own: int) -> int:
    """Return the exit code of the process that failed first, as far as it can be told; `own` is this one's."""
    if rendezvous.is_early():
        return own
    try:
        store = rendezvous.store()
        for _ in range(20):
            if store.check([_ENDED]):
                return int(store.get(_ENDED))
            time.sleep(0.05)
    except (RuntimeError, rendezvous.NeverMet):
        pass
    return LOST


def _torch() -> Any:
    return importlib.import_module("torch")


def _dist() -> Any:
    return importlib.import_module("torch.distributed")


def _turn(name: str) -> str:
    """Return the key of the next meeting of this kind; every process comes to them in the same order."""
    _turns[name] = _turns.get(name, 0) + 1
    return f"{name}/{_turns[name]}"


def _await(key: str) -> None:
    """Wait for `key`; another process's failure ends the wait."""
    pause = _FIRST_POLL_S
    while not _told(lambda store: store.check([key])):
        if _told(lambda store: store.check([_ENDED])):
            raise LostProcess(_LOST_WORDS)
        time.sleep(pause)
        pause = min(_LONGEST_POLL_S, pause * 1.3)


def _told(ask: Callable[[Any], T]) -> T:
    with together():
        return ask(rendezvous.store())


@contextmanager
def together() -> Iterator[None]:
    """Say what it means when another process does not answer: gloo and the store raise a RuntimeError each."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcess(_LOST_WORDS) from error


def lost_another(error: Exception) -> LostProcess | None:
    """Return what `error` means if it is what a collective says when another process is gone.

    A model split among processes holds collectives in each of its layers, out of reach of `together`.
    """
    if isinstance(error, LostProcess):
        return error
    if not is_launched() or not isinstance(error, RuntimeError):
        return None
    said = isinstance(error, _torch().distributed.DistError) or "gloo/" in str(error)
    return LostProcess(_LOST_WORDS) if said else None


_LOST_WORDS = (
    "another process of this run has ended without a word (killed, or out of memory); what was finished is kept: start "
    "the same command again, a training with --checkpoint_every_steps and --resume=auto"
)
