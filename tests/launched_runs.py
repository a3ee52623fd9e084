"""Trains, scores and ranks in as many processes as a launcher starts, and writes down every number that came out.

``torchrun --nproc_per_node N tests/launched_runs.py WORLD OUT plain FSDP``, of which the last splits the model; in one
process, call `collect`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from launching import FSDP

EVALUATED = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "uni10"}
PLAIN = {
    "frozen_candidates": True, "prompt_style": "demo", "item_summary": "none", "summary_mode": "none",
    "use_image": False, "train_last_k": 2, "limit_users": 15, "eval_args": EVALUATED, "train_batch_size": 8,
    "gradient_accumulation_steps": 2, "lora_dropout": 0.0, "epochs": 2, "show_progress": False, "seed": 7,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "text": {"mllm": "llama"},
    "images, shared prefixes": {"mllm": "llava", "use_image": True, "train_batch_size": 12, "epochs": 1},
}


def settings(world: Path, out: Path, more: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a case whose dataset and models lie in `world`."""
    keys = PLAIN | more
    return keys | {
        "data_path": str(world / "data"), "mllm": str(world / keys["mllm"]), "checkpoint_dir": str(out / "saved"),
    }  # fmt: skip


def words(world: Path, out: Path, **more: Any) -> list[str]:
    """Return a case's configuration as a command line says it."""
    keys = settings(world, out, {"mllm": "llama", **more})
    return ["--model=MLLMMSR", "--dataset=steps", *(f"--{k}={json.dumps(v).replace(' ', '')}" for k, v in keys.items())]


def collect(world: Path, out: Path) -> dict[str, Any]:
    """Return losses a step, what was learnt, scores and metrics of each case, and gradients of very small batches."""
    return {name: _run(settings(world, out / name[:4], more)) for name, more in CASES.items()} | {
        "small": _small(settings(world, out / "small", CASES["images, shared prefixes"]))
    }


def _run(keys: dict[str, Any]) -> dict[str, Any]:
    from recbole_mllm.quick_start import make_config, run
    from recbole_mllm.trainer import MLLMMSRTrainer

    losses: list[float] = []
    stock = MLLMMSRTrainer._step

    def step(self: Any, *args: Any) -> None:
        losses.append(self.place.loss)
        stock(self, *args)

    MLLMMSRTrainer._step = step
    try:
        outcome = run(make_config("MLLMMSR", "steps", [], keys))
    finally:
        MLLMMSRTrainer._step = stock
    pairs = {name: outcome.pairs[name].tolist() for name in ("user_id", "item_id", "score", "place")}
    return {"losses": losses, "learnt": outcome.model.state_dict(), "pairs": pairs, "test": outcome.test,
            "valid": outcome.valid, "world_size": outcome.world_size, "tokens": outcome.model.tokens_read,
            "held": sum(map(held_here, outcome.model.parameters()))}  # fmt: skip


def held_here(parameter: Any) -> int:
    """Return how many numbers of a parameter this process holds."""
    return int((parameter.to_local() if hasattr(parameter, "to_local") else parameter).numel())


def _small(keys: dict[str, Any]) -> dict[int, Any]:
    """Return loss and gradients of batches of 1, 2, 3 and 5 rows."""
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    from recbole_mllm.quick_start import make_config
    from recbole_mllm.training.optimization import sum_gradients

    config = make_config("MLLMMSR", "steps", [], keys)
    init_seed(7, True)
    train, *_ = data_preparation(config, create_dataset(config))
    trainer = get_trainer(config["MODEL_TYPE"], "MLLMMSR")(config, get_model("MLLMMSR")(config, train._dataset))
    batch, out = next(iter(train)), {}
    for count in (1, 2, 3, 5):
        trainer.optimizer.zero_grad()
        (loss,) = sum_gradients(trainer._trained(), trainer._backward(batch[list(range(count))], count))
        out[count] = loss, [None if p.grad is None else p.grad.clone() for p in trainer._trained()]
    return out


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]
    import torch

    import recbole_mllm  # noqa: F401
    from recbole_mllm.common import distributed

    world, out, kinds = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    sys.argv = sys.argv[:1]
    found = {}
    for kind in kinds:
        os.environ.update(FSDP if kind == "FSDP" else {})
        found[kind] = collect(world, out / kind)
    if distributed.is_main():
        torch.save(found, out / "found.pt")
    distributed.stop()
