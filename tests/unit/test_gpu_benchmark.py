"""The yardstick for GPUs runs, on a CPU and a tiny geometry."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_gpu_benchmark_ends_with_one_json_line():
    command = [sys.executable, "benchmarks/gpu.py", "--geometry", "tiny", "--users", "3", "--items", "1"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = json.loads(out.splitlines()[-1])
    for stage in ("scoring", "training"):
        assert found[stage]["largest"].keys() and found["matmul_tflops"] > 0
        for way in ("usual", "ours"):
            assert found[stage][way]["pairs_per_s"] > 0 and 0 < found[stage][way]["share_of_peak"] < 1.5
