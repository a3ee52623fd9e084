"""Starts processes as a launcher does, and says with Accelerate's variables how they are to split a model."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
# what `accelerate launch` makes of an fsdp_config
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
# and of a deepspeed_config_file: by its defaults DeepSpeed leaves parameters as small as the tests' whole
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ROOT / "tests" / "zero3.json")}

SPLITS = {"plain": {}, "FSDP": FSDP, "DeepSpeed": ZERO}


def launched(count, words, folder, *, limit_s=150, **more):
    """Run `words` in `count` processes on the CPU; return what they said, and the launcher's exit code."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | more
    words = [*TORCHRUN, f"--nproc_per_node={count}", *map(str, words)]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=limit_s)
