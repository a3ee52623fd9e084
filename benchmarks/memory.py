"""Peak memory of scoring some items, and of scoring four times as many new ones afterwards, in one process.

What is kept of images is bounded, so a long evaluation holds no more than a short one once that is full. The bounds
here are a few megabytes, which the first items fill. An image is 0.8 MB as the vision tower reads it, so that keeping
each would show. Ends with one JSON line: megabytes resident at most, and the second over the first.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# each thread's own heap would keep what it once freed
os.environ.setdefault("MALLOC_ARENA_MAX", "2")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny_models
import torch
import yaml
from PIL import Image

from recbole_mllm.common.prompts import Prompt, Style, recommend_prompt
from recbole_mllm.common.resources import PROPERTIES
from recbole_mllm.common.settings import Settings
from recbole_mllm.mllm import backbone, encoder, hf

STYLE = Style.from_mapping("demo", yaml.safe_load((PROPERTIES / "prompt" / "demo.yaml").read_text()))
SETTINGS = Settings.from_config(yaml.safe_load((PROPERTIES / "model" / "MLLMMSR.yaml").read_text()) | {"mllm": "tiny"})
TIMES = 4


def pairs(folder: Path, first: int, items: int, users: int) -> list[Prompt]:
    """Return prompts of `items` images, no two alike, with `users` preferences each."""
    out = []
    for n in range(first, first + items):
        path = folder / f"{n}.png"
        Image.new("RGB", (90, 70), (n % 256, n // 256, 90)).save(path)
        out += [recommend_prompt(STYLE, f"likes number {user}", f"mug {n}", path) for user in range(users)]
    return out


def peak_mb() -> float:
    """Return the most that this process has had resident, in MB; Linux counts in kB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def measure(folder: Path, items: int, users: int) -> tuple[float, float]:
    """Return the peak after `items` and after `TIMES` as many more."""
    mllm = hf.HFModel(str(tiny_models.llava(folder / "llava", side=256)), SETTINGS.mllm, torch.device("cpu"))
    answers = mllm.answers(STYLE)
    mllm.yes_scores(pairs(folder, 0, items, users), answers)
    before = peak_mb()
    mllm.yes_scores(pairs(folder, items, TIMES * items, users), answers)
    return before, peak_mb()


def main() -> None:
    """Measure, and print a line for people and one for programs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--users", type=int, default=5, help="users per item")
    parser.add_argument("--cache_mb", type=int, default=8, help="of preprocessed images, and of image features")
    parser.add_argument("--full", action="store_true", help="a thousand items, then four thousand")
    args = parser.parse_args()
    encoder.IMAGE_BYTES = hf.IMAGE_BYTES = backbone.FEATURE_BYTES = args.cache_mb * 2**20
    items = 1000 if args.full else args.items
    with tempfile.TemporaryDirectory() as folder:
        first, second = measure(Path(folder), items, args.users)
    print(f"{items} items: {first:.0f} MB at most; {TIMES * items} more: {second:.0f} MB")
    print(json.dumps({"peak_mb": [round(first, 1), round(second, 1)], "ratio": round(second / first, 4)}))


if __name__ == "__main__":
    main()
