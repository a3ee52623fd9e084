"""How the cost of every stage grows with the users: counted by `plan` at three sizes, timed by runs at three more.

Worlds of interactions and titles alone: 3 to 20 interactions a user, items half as many as users, popularity uneven.
The bundled tiny model reads titles and no images. Counts of 1,000, 10,000 and 100,000 users come from `plan`, tokens
by a sample of its prompts; CPU seconds of 50, 100 and 200 users from runs in one thread (`--full`: to 1,000). Each
quantity is fitted as a * users ** b; residuals are each size's deviation from that, as a share. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import numpy as np
import torch

from recbole_mllm import quick_start, trainer
from recbole_mllm.common import fitting
from recbole_mllm.plan import make_plan
from recbole_mllm.quick_start import make_config, run

COUNTED, RUN, RUN_FULL = (1_000, 10_000, 100_000), (50, 100, 200), (125, 250, 500, 1_000)
KEYS = {
    "mllm": "tiny",
    "prompt_style": "demo",
    "use_image": False,
    "item_summary": "text",
    "item_summary_tokens": 24,
    "user_summary_tokens": 40,
    "block_size": 4,
    "train_last_k": 1,
    "MAX_ITEM_LIST_LENGTH": 20,
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "frozen_candidates": True,
    "show_progress": False,
    "state": "ERROR",
}
COLOURS, THINGS = ["red", "blue", "green", "white", "black"], ["cup", "lamp", "chair", "bag", "hat", "rug", "clock"]
LOOKS, PLACES = ["striped", "dotted", "plain", "starred"], ["kitchen", "garden", "beach", "office", "attic", "hall"]


def write_world(folder: Path, users: int) -> None:
    """Write interactions and titles of a world of `users` users."""
    rng = np.random.default_rng(users)
    items = max(200, users // 2)
    lengths = rng.integers(3, 21, users)
    owner = np.repeat(np.arange(users), lengths)
    met = (rng.random(len(owner)) ** 2 * items).astype(int)
    rows = (f"u{user}\ti{item}\t{time}" for time, (user, item) in enumerate(zip(owner, met, strict=True)))
    folder.mkdir(parents=True)
    header = "user_id:token\titem_id:token\ttimestamp:float"
    (folder / f"{folder.name}.inter").write_text("\n".join([header, *rows]) + "\n")
    named = (" ".join(rng.choice(words) for words in (LOOKS, COLOURS, THINGS, PLACES)) for _ in range(items))
    titles = (f"i{item}\t{name} {item}" for item, name in enumerate(named))
    (folder / f"{folder.name}.item").write_text("\n".join(["item_id:token\ttitle:token_seq", *titles]) + "\n")


def config_of(place: Path, users: int) -> Any:
    """Return the configuration of a run on the world of `users` users, written where it is absent."""
    name = f"world{users}"
    if not (place / name).is_dir():
        write_world(place / name, users)
    own = {"data_path": str(place), "checkpoint_dir": str(place / "saved")}
    return make_config("MLLMMSR", name, [], KEYS | own)


def counted(place: Path, users: int, limit: int) -> dict[str, float]:
    """Return what `plan` counts, by stage and quantity, and the seconds it took to read, split and count."""
    started = time.perf_counter()
    plan = make_plan(config_of(place, users), limit=limit)
    out = {"plan.wall_s": time.perf_counter() - started}
    for stage, one in plan["stages"].items():
        out |= {f"{stage}.prompts": one["prompts"], f"{stage}.tokens": one["text_tokens"] + one["new_tokens"]}
        out |= {f"{stage}.flops": one["flops"]["total"]}
    return out | {f"disk.{name}": size for name, size in plan["disk_bytes"].items() if name in ("store", "usum")}


def timed(place: Path, users: int) -> dict[str, float]:
    """Return the CPU seconds of a real run's stages, which a busy machine disturbs least."""
    outcome = run(config_of(place, users))
    return {"summarize.s": outcome.summarize_s, "train.s": outcome.train_s or 0.0, "score.s": outcome.score_s}


def fit(sizes: Sequence[int], found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Fit each quantity as ``a * users ** b`` by least squares of logarithms."""
    out = {}
    for name in found[0]:
        values = np.array([one[name] for one in found], float)
        if (values <= 0).any() or name == "plan.wall_s":
            continue
        power, level = np.polyfit(np.log(sizes), np.log(values), 1)
        residuals = values / np.exp(level + power * np.log(sizes)) - 1
        out[name] = {
            "exponent": round(float(power), 3),
            "at_1e6": float(np.exp(level) * 1e6**power),
            "residuals": [round(float(r), 3) for r in residuals],
        }
    return out


def main() -> None:
    """Count, run, fit, and show it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="runs of up to 1,000 users, and larger samples")
    full = parser.parse_args().full
    sys.argv = sys.argv[:1]
    runs = RUN_FULL if full else RUN
    torch.set_num_threads(1)
    for module in (quick_start, fitting, trainer):  # what a run times its stages by
        module.time = SimpleNamespace(perf_counter=time.process_time)
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        place = Path(name)
        counts = [counted(place, users, 20_000 if full else 3_000) for users in COUNTED]
        seconds = [timed(place, users) for users in runs]
        os.chdir(ROOT)
    fits = {"counts": fit(COUNTED, counts), "seconds": fit(runs, seconds)}
    for kind in fits:
        for quantity, one in fits[kind].items():
            print(f"{quantity:<16} users^{one['exponent']:.2f}  at 1e6: {one['at_1e6']:.3g}  off by {one['residuals']}")
    told = {"counted_at": COUNTED, "counts": counts, "run_at": runs, "seconds": seconds, "fit": fits}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
