"""Pretrain the bundled tiny MLLM: `python tools/train_tiny_mllm.py` does all of it, from fixed seeds and step counts.

Working files go to ``.tiny/``, the model to ``recbole_mllm/demo/tiny/``; about 45 minutes on two busy CPU cores.
`--stage NAME` does one stage again from the files of those before it.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: on busy cores, spinning threads cost 7 x the time

import argparse
import logging
import subprocess
import sys
import time
from pathlib import Path

from tiny_mllm import stages
from tiny_mllm.settings import LOG, ROOT, SHIPPED, SMOKE, Budget, Places

STAGES = ("tokenizer", "vision", "lm", "align", "joint", "export")


def main() -> None:
    """Read the arguments and run the stages asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument("--work", type=Path, default=ROOT / ".tiny", help="folder of the working files")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder of the finished model")
    parser.add_argument("--smoke", action="store_true", help="a few steps a stage, to see that all runs")
    arguments = parser.parse_args()
    places, budget = Places(arguments.work), SMOKE if arguments.smoke else Budget()
    places.work.mkdir(parents=True, exist_ok=True)
    _log_to(places.work / ("vision.log" if arguments.stage == "vision" else "train.log"))
    start = time.perf_counter()
    if arguments.stage == "all":
        stages.everything(places, budget, arguments.out, lambda: _start_vision(arguments))
    elif arguments.stage == "export":
        stages.export(places, budget, arguments.out)
    else:
        getattr(stages, arguments.stage)(places, budget)
    LOG.info("%s: done in %.0f s", arguments.stage, time.perf_counter() - start)


def _start_vision(arguments: argparse.Namespace) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--stage", "vision", "--work", str(arguments.work)]
    return subprocess.Popen([*command, "--smoke"] if arguments.smoke else command)


def _log_to(path: Path) -> None:
    to_file = logging.FileHandler(path, mode="a", encoding="utf-8")
    handlers: list[logging.Handler] = [logging.StreamHandler(), to_file]
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", handlers=handlers)
    LOG.setLevel(logging.INFO)


if __name__ == "__main__":
    main()
