"""From atomic files to loaders with candidates: this project's way beside RecBole's own, on the same data in one run.

Each variant is a process of its own, so that its peak memory is its own. ``recbole`` is RecBole 1.2.1's code, ``ours``
this project's with frozen candidates. RecBole draws an evaluation's candidates only while it goes through the batches,
ours are drawn before; so ``ratio_vs_recbole`` is of the seconds until every evaluation batch has been laid out once,
and the ratio of the seconds until the loaders exist is printed beside it. Ends with one JSON line; its users, seconds
until the loaders exist and peak megabytes are the worst of three models on the largest data, by ours.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

EACH = 10  # interactions of a user
SMALL, LARGE, FULL = 20_000, 100_000, 1_000_000
MODELS = ("SASRec", "BPR")
OWN = ("MLLMMSR",)  # has no counterpart in RecBole
OF_MODEL: dict[str, dict[str, object]] = {"SASRec": {"train_neg_sample_args": None}, "MLLMMSR": {"mllm": "tiny"}}
UNI20 = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "uni20"}


def write(data_path: Path, users: int) -> str:
    """Write `users` x 10 interactions in random order, items by a skewed law; return the dataset's name."""
    import numpy as np

    rng = np.random.default_rng(users)
    name = f"users{users}"
    user = rng.permutation(np.repeat(np.arange(users), EACH))
    item = (rng.random(len(user)) ** 2 * users / 10).astype(int)
    times = rng.integers(1_000_000_000, 1_700_000_000, len(user))
    (data_path / name).mkdir()
    with (data_path / name / f"{name}.inter").open("w") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for low in range(0, len(user), 1 << 18):
            rows = zip(*(column[low : low + (1 << 18)].tolist() for column in (user, item, times)), strict=True)
            file.write("".join(f"u{u}\ti{i}\t{t}\n" for u, i, t in rows))
    return name


def prepare(data_path: str, name: str, model: str, frozen: bool, through: bool) -> dict[str, float]:
    """Prepare loaders in this process; return seconds, megabytes, and seconds of a pass over the evaluation batches."""
    import torch
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import init_seed

    torch.set_num_threads(2)
    settings = {
        "data_path": data_path,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "eval_args": UNI20,
        "frozen_candidates": frozen,
        "state": "ERROR",
        "worker": 0,
    } | OF_MODEL.get(model, {})
    if frozen:  # imports are not what is measured
        import recbole_mllm.data.dataset
        import recbole_mllm.evaluation.candidates  # noqa: F401  (loaded, not used)
    config = Config(model=model, dataset=name, config_dict=settings)
    init_seed(config["seed"], True)
    started = time.perf_counter()
    loaders = data_preparation(config, create_dataset(config))
    ready, peak = time.perf_counter() - started, _peak_mb()
    started = time.perf_counter()
    for loader in loaders[1:] if through else ():
        for _ in loader:
            pass
    return {"seconds": ready, "peak_mb": peak, "pass_s": time.perf_counter() - started}


def _peak_mb() -> float:
    """Return this process's peak memory; ``ru_maxrss`` may be that of the process it was started from."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


def in_a_process(data_path: Path, name: str, model: str, variant: str, through: bool) -> dict[str, float]:
    """Run `prepare` in a process of its own and print what it took."""
    environment = os.environ | {
        "PYTHONWARNINGS": "ignore",
        "RECBOLE_MLLM_FASTDATA": "on" if variant == "ours" else "off",
    }
    command = [sys.executable, __file__, "--child", str(data_path), name, model, variant, str(int(through))]
    done = subprocess.run(command, env=environment, cwd=data_path, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    passed = f", evaluation pass {found['pass_s']:6.1f} s" if through else ""
    print(
        f"{name:>13} {model:<7} {variant:<8} ready in {found['seconds']:6.1f} s, {found['peak_mb']:6.0f} MB{passed}",
        flush=True,
    )
    return found


def main() -> None:
    """Compare on small data, and measure ours on 100,000 users, or with --full on a million."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="a million users")
    users = FULL if parser.parse_args().full else LARGE
    with tempfile.TemporaryDirectory() as folder:
        data_path = Path(folder)
        small, large = write(data_path, SMALL), write(data_path, users)
        compared = {
            variant: [in_a_process(data_path, small, model, variant, True) for model in MODELS]
            for variant in ("recbole", "ours")
        }
        found = [in_a_process(data_path, large, model, "ours", False) for model in (*MODELS, *OWN)]
    ready, whole = (
        {way: sum(run["seconds"] + more * run["pass_s"] for run in runs) for way, runs in compared.items()}
        for more in (0, 1)
    )
    print(f"until the loaders exist, RecBole's candidates still undrawn: {ready['recbole'] / ready['ours']:.1f} times")
    print(
        json.dumps(
            {
                "users": users,
                "seconds": round(max(run["seconds"] for run in found), 1),
                "peak_mb": round(max(run["peak_mb"] for run in found)),
                "ratio_vs_recbole": round(whole["recbole"] / whole["ours"], 1),
            }
        )
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        arguments, sys.argv = sys.argv[2:], sys.argv[:1]  # RecBole's Config reads sys.argv
        import recbole_mllm  # noqa: F401  (makes RecBole run here, and arms the fast way unless it is off)

        print(json.dumps(prepare(*arguments[:3], arguments[3] == "ours", arguments[4] == "1")))
    else:
        main()
