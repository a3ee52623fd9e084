"""What RecBole must not do in one of several processes that a launcher has started: pick a GPU, start NCCL, speak."""

from __future__ import annotations

import logging
import os
from types import ModuleType, SimpleNamespace
from typing import Any

from recbole_mllm import ranks, switches
from recbole_mllm.errors import UserError
from recbole_mllm.recbole_patches.hooks import replace


def give_each_process_its_gpu(configurator: ModuleType) -> None:
    """Let Config leave CUDA_VISIBLE_DEVICES alone and take the launcher's GPU (config/configurator.py:477-515).

    Stock RecBole makes `gpu_id` (0) the only visible one, for every process. All but the main process are silent.
    """

    @replace(configurator.Config)
    def _init_device(stock: Any, self: Any) -> None:
        if not ranks.is_launched():
            stock(self)
            return
        values = self.final_config_dict
        if int(values.get("nproc") or 1) > 1 or "local_rank" in values:
            raise two_launchers("the configuration")
        gpu_id, visible = values["gpu_id"], os.environ.get("CUDA_VISIBLE_DEVICES")
        values["gpu_id"] = "" if switches.wants_cpu() else _all_gpus() if visible is None else visible
        try:
            stock(self)
        finally:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
            if visible is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = visible
        values["gpu_id"] = gpu_id
        if values["device"].type == "cuda":
            values["device"] = type(values["device"])("cuda", ranks.local_rank())
        if not ranks.is_main():
            values.update({"state": "ERROR", "show_progress": False})
            if values.get("log_wandb"):
                values["log_wandb"] = False


def _all_gpus() -> str:
    return ",".join(map(str, range(int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size())))))


def two_launchers(where: str) -> UserError:
    """Return the complaint about RecBole's `nproc`, its own way to several GPUs, given in `where`."""
    if ranks.is_launched():
        return UserError(
            f"nproc in {where} asks RecBole to start processes, and a launcher has started {ranks.world_size()} "
            "already; leave nproc out"
        )
    return UserError(
        f"nproc in {where} is RecBole's own way to several GPUs, which MLLMMSR does not go; leave it out and start "
        "`accelerate launch --num_processes N run_recbole_mllm.py …` (docs/launching.md)"
    )


def log_in_main_alone(logger: ModuleType) -> None:
    """Keep ``init_logger`` (utils/logger.py:69) from writing a log file a process; errors are seen from all of them."""

    @replace(logger)
    def init_logger(stock: Any, config: Any) -> None:
        if ranks.is_main():
            stock(config)
            return
        form = f"process {ranks.rank()}: %(message)s"
        logging.basicConfig(level=logging.ERROR, format=form)
        logging.getLogger().setLevel(logging.ERROR)


def draw_curves_in_main_alone(utils: ModuleType) -> None:
    """Give the other processes a Tensorboard writer that writes nothing (utils/utils.py:208)."""

    def nothing(*args: Any) -> None:
        pass

    @replace(utils)
    def get_tensorboard(stock: Any, logger: Any) -> Any:
        return stock(logger) if ranks.is_main() else SimpleNamespace(add_scalar=nothing, add_hparams=nothing)
