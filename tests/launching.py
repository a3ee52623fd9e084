"""Starts processes as a launcher does, or lets this one believe that it was started so."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
# what `accelerate launch` makes of an fsdp_config
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
ONE_OF_TWO = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}


def script_with(change, folder):
    """Write a script that changes something, and then is the command line; return its path."""
    lines = ["import os, signal, sys", change.strip(), "from recbole_mllm.cli import main", "sys.exit(main())"]
    path = folder / "script.py"
    path.write_text("\n".join(lines))
    return path


def launched(count, words, folder, *, limit_s=150, **more):
    """Run `words` in `count` processes on the CPU; return what they said, and the launcher's exit code."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    } | more
    words = [*TORCHRUN, f"--nproc_per_node={count}", *map(str, words)]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=limit_s)


@contextmanager
def one_of_two(monkeypatch, **more):
    """Let this process be the main one of two, of which the other will not come; a command's handlers go afterwards."""
    for name, value in {**ONE_OF_TWO, **more}.items():
        monkeypatch.setenv(name, value)
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
