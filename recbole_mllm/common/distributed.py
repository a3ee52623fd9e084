"""Several processes that work on one run, started by ``torchrun`` or ``accelerate launch``.

The launcher's environment says which process this is. Without a launcher there is one: then everything here is the
identity, and imports nothing. Process 0 is the main one: it alone writes files, and speaks.

The processes meet in collectives of torch's process group (gloo on the CPU, NCCL for what is on GPUs), whose timeout is
long: one may write summaries for days while the others wait. One whose peer dies ends at once. Failures, and the orders
of a benchmark, go through the launcher's key-value store, which works while a process is busy.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, NoReturn, TypeVar

from recbole_mllm.common.errors import UserError

LOST = 76  # the exit code of a process that ends because another one has, without its having said why
_CONNECT = timedelta(minutes=10)
_COLLECTIVE = timedelta(days=20)  # below 2^31 milliseconds
_FAILED = "failed"

T = TypeVar("T")
_before_meeting: list[Callable[[], None]] = []  # one at most


class LostProcess(UserError):
    """Another process of this run has ended; unless it has said why, one of those left behind says this."""


class NeverMet(UserError):
    """This process could not reach the others where the launcher's environment says they are."""


def process_index() -> int:
    """Return which process this is, from 0."""
    return int(os.environ["RANK"]) if is_launched() else 0


def local_process_index() -> int:
    """Return which of this machine's processes this is: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0)) if is_launched() else 0


def world_size() -> int:
    """Return how many processes work on this run."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


def is_one_machine() -> bool:
    """Return whether all processes run on this machine, as far as the launcher says."""
    return not is_launched() or int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) == world_size()


def is_main() -> bool:
    """Return whether this process is the one that writes files and speaks."""
    return process_index() == 0


def is_launched() -> bool:
    """Return whether a launcher has started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def wants(what: str) -> bool:
    """Return whether Accelerate's launcher asks for `what`: ``CPU`` (leave GPUs alone), ``FSDP`` or ``DEEPSPEED``."""
    return os.environ.get(f"ACCELERATE_USE_{what}", "").lower() in ("1", "true", "yes")


# -- the store and the group -------------------------------------------------------------------------------------------


@cache
def _connection() -> Any:
    """Return the launcher's store, connected, or the error to raise; cached, so that nobody waits twice."""
    dist = _dist()
    try:
        found, _, _ = next(dist.rendezvous("env://", timeout=_CONNECT))
        return dist.PrefixStore("recbole_mllm", found)
    except (RuntimeError, ValueError):
        return NeverMet(_why_unmet())


def _store() -> Any:
    """Return the launcher's key-value store.

    Raises:
        NeverMet: The environment does not say where it is, or not all have come within `_CONNECT`.
    """
    found = _connection()
    if isinstance(found, NeverMet):
        raise found
    return found


def _has_tried() -> bool:
    return _connection.cache_info().currsize > 0


def _why_unmet() -> str:
    index, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        return (
            f"by RANK and WORLD_SIZE a launcher has started {size} processes, but {' and '.join(missing)} are not set; "
            "start with torchrun or accelerate launch, or unset RANK and WORLD_SIZE to run in one process"
        )
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return (
        f"process {index} of {size} has not met the others at {where} within {_CONNECT.total_seconds():g} s; "
        "check that all were started, that process 0 runs there, and that nothing else uses that port"
    )


def start() -> None:
    """Join the process group, once, and take this process's GPU; who comes first waits for the last."""
    if not is_launched() or _dist().is_initialized():
        return
    if count("joining") == world_size():
        post("all here", b"1")
    read("all here")  # in Python, unlike the group's own wait, so that a process that fails before it is noticed
    torch, dist = importlib.import_module("torch"), _dist()
    backend = "gloo"
    if torch.cuda.is_available() and not wants("CPU"):
        torch.cuda.set_device(local_process_index())
        backend = "cpu:gloo,cuda:nccl"
    with peers_alive():
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("group", _store()),
            rank=process_index(),
            world_size=world_size(),
            timeout=_COLLECTIVE,
        )


def gather_objects(value: T) -> list[T]:
    """Return the `value` of every process, by its index; who comes first waits for the last, however long."""
    if not is_launched():
        return [value]
    arrive()
    out: list[Any] = [None] * world_size()
    with peers_alive():
        _dist().all_gather_object(out, value)
    return out


def barrier() -> None:
    """Wait until every process has come here, however long that takes."""
    gather_objects(None)


def broadcast_object(value: T) -> T:
    """Return the main process's `value`; the others wait for it however long."""
    return on_main(lambda: value)


def on_main(work: Callable[[], T]) -> T:
    """Let the main process alone do `work`, which may take hours, and return its result, pickled, in all of them."""
    if not is_launched():
        return work()
    found = [work() if is_main() else None]
    arrive()
    with peers_alive():
        _dist().broadcast_object_list(found, 0)
    return found[0]  # type: ignore[return-value]  # None is replaced by the broadcast


def main_first(work: Callable[[], T]) -> T:
    """Let the main process do `work` first, however long; then the others do it, finding what it has left."""
    first = [work()] if is_main() else []
    barrier()
    return first[0] if first else work()


def before_meeting(take_part: Callable[[], None] | None) -> None:
    """Have `take_part` called wherever all processes meet, before this one waits; it returns when all have come.

    A model split among processes needs them all for every forward pass, also those that have nothing to ask. A later
    one takes its place: the model at work is the last one made. None ends it; all processes must say so together.
    """
    _before_meeting[:] = [] if take_part is None else [take_part]


def arrive() -> None:
    """Say that this process has come where all meet; every meeting here, and every collective elsewhere, begins so."""
    start()
    with peers_alive():
        for take_part in _before_meeting:
            take_part()


def post(key: str, value: bytes) -> None:
    """Put `value`, below 8 MiB, where every process can `read` it."""
    with peers_alive():
        _store().set(key, value)


def is_posted(key: str) -> bool:
    """Return whether a process has put something at `key`."""
    with peers_alive():
        return bool(_store().check([key]))


def read(key: str) -> bytes:
    """Return what a process puts at `key`, waiting for it however long; if one fails meanwhile, this one does too."""
    pause = 0.005
    while not is_posted(key):
        if is_posted(_FAILED):
            raise LostProcess(_LOST_WORDS)
        time.sleep(pause)
        pause = min(0.5, pause * 1.3)
    with peers_alive():
        return bytes(_store().get(key))


def count(key: str) -> int:
    """Return how many times processes have called this for `key`, this time included: who comes first gets 1."""
    with peers_alive():
        return int(_store().add(key, 1))


def stop() -> None:
    """Leave, when all is done: the main process last, as it may be the host of the store the others still ask."""
    if not is_launched() or not _has_tried():
        return
    if _dist().is_initialized():
        _dist().destroy_process_group()
    came, patience = count("left"), time.monotonic() + 60
    while is_main() and came < world_size() and time.monotonic() < patience:
        time.sleep(0.005)
        with peers_alive():
            came = _store().add("left", 0)


def _dist() -> Any:
    return importlib.import_module("torch.distributed")


# -- how they end together ---------------------------------------------------------------------------------------------


_LOST_WORDS = (
    "another process of this run ended without a message (killed, or out of memory); finished work is saved: start "
    "the same command again, a training with --checkpoint_every_steps and --resume=auto"
)


@contextmanager
def peers_alive() -> Iterator[None]:
    """Say what it means when another process does not answer: gloo and the store raise a RuntimeError each."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcess(_LOST_WORDS) from error


def lost_another(error: BaseException) -> LostProcess | None:
    """Return what `error` means if it is what a collective says when another process is gone.

    A model split among processes holds collectives in each of its layers, out of reach of `peers_alive`.
    """
    if isinstance(error, LostProcess):
        return error
    if not is_launched() or not isinstance(error, RuntimeError):
        return None
    return LostProcess(_LOST_WORDS) if isinstance(error, _dist().DistError) or "gloo/" in str(error) else None


def _fail(code: int) -> tuple[bool, int]:
    """Tell the other processes that this one ends with `code`.

    Returns:
        Whether it is the first to fail, which alone speaks; and the exit code to leave with, that of the first one.
    """
    if not _has_tried() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return is_main(), code  # nobody may be there to connect to yet: what fails so early fails in all alike
    try:
        if _store().add(f"{_FAILED}/count", 1) == 1:
            _store().set(_FAILED, str(code))
            return True, code
        for _ in range(20):
            if _store().check([_FAILED]):
                return False, int(_store().get(_FAILED))
            time.sleep(0.05)
    except NeverMet:
        return True, code
    except RuntimeError:  # the store's host has ended, and has spoken
        if is_main():
            return True, code
    return False, LOST


def exit_code(run: Callable[[list[str]], int], words: Sequence[str]) -> int:
    """Return what `run` returns, and what `console.exit_code` does for a mistake; anything else raised is 1."""
    from recbole_mllm.common.console import in_a_line

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _ended_by_launcher)
    if not is_main():
        warnings.simplefilter("ignore")  # the main process has shown them
    debug = "--debug" in words
    try:
        code = run([word for word in words if word != "--debug"])
        sys.stdout.flush()
        stop()
        return code
    except (Exception, KeyboardInterrupt) as error:  # whatever it is, the other processes must hear of it and end
        lost = lost_another(error)
        known = (1, str(lost)) if lost else in_a_line(error)
        code, line = known or (1, "")
        line = traceback.format_exc() if debug or not known else line and f"recbole-mllm: {line}"
    first, code = _fail(code)
    if first:
        print(line.rstrip(), end="\n" * bool(line), file=sys.stderr, flush=True)
    return _abandon(code)


def child_code(run: Callable[[], int]) -> int:
    """Return what `run` returns, for a child that a benchmark has started in each of its processes.

    `LOST` is for one that could not finish for want of another; why that one failed stands in its own log.
    """
    if not is_launched():
        return run()
    try:
        code = run()
        if code == 0:
            stop()
            return 0
    except Exception as error:  # whatever it is, the other processes must hear of it and end
        code = LOST if lost_another(error) else 1
        if code == 1:
            traceback.print_exc()
    _fail(code)
    return _abandon(code)


def _abandon(code: int) -> int:
    """Leave at once where a process group is open: torn down without its members, it aborts the process at random."""
    if is_launched() and "torch.distributed" in sys.modules and _dist().is_initialized():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _ended_by_launcher(number: int, frame: object) -> NoReturn:
    raise LostProcess("the launcher has ended this process, as another one has ended; finished work is saved")


# -- shares of work ----------------------------------------------------------------------------------------------------


def cut(keys: Any, shared: Any, own: Any, parts: int) -> list[range]:
    """Cut a list of work into contiguous parts, one a process, whose costliest part is as cheap as can be.

    Args:
        keys: ``[n]``; neighbours with an equal key share a computation.
        shared: ``[n]`` int, what that computation costs, the same for an equal key; each part that has some of the
            neighbours pays it once.
        own: ``[n]`` int, what each entry costs beside, at least 1.
        parts: How many.

    Returns:
        `parts` ranges that cover the list in order; some are empty where it is short.
    """
    import numpy as np

    keys, shared, own = np.asarray(keys), np.asarray(shared, np.int64), np.asarray(own, np.int64)
    first = np.r_[True, keys[1:] != keys[:-1]][: len(keys)]
    total = np.r_[0, np.cumsum(own + np.where(first, shared, 0))]
    again = np.r_[np.where(first, 0, shared), 0]  # what a part pays that begins between neighbours

    def ends(limit: int) -> list[int]:
        out, at = [], 0
        for _ in range(parts):
            at = max(at, int(np.searchsorted(total, limit + total[at] - again[at], side="right")) - 1)
            out.append(at)
        return out

    low, high = 0, int(total[-1])
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if ends(middle)[-1] == len(keys) else (middle + 1, high)
    stops = ends(high)
    return [range(start, stop) for start, stop in zip([0, *stops[:-1]], stops, strict=True)]


def two_launchers(where: str) -> UserError:
    """Return the complaint about RecBole's `nproc`, its own way to several GPUs, given in `where`."""
    if is_launched():
        return UserError(
            f"nproc in {where} asks RecBole to start processes, and a launcher has started {world_size()} "
            "already; leave nproc out"
        )
    return UserError(
        f"nproc in {where} is RecBole's own way to several GPUs, which MLLMMSR does not go; leave it out and start "
        "`accelerate launch --num_processes N run_recbole_mllm.py …` (docs/launching.md)"
    )
