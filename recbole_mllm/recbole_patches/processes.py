"""What RecBole must not do in one of several processes that a launcher has started: pick a GPU, start NCCL, speak."""

from __future__ import annotations

import logging
import os
from types import ModuleType, SimpleNamespace
from typing import Any

from recbole_mllm.common import distributed
from recbole_mllm.recbole_patches.hooks import replace


def give_each_process_its_gpu(configurator: ModuleType) -> None:
    """Let Config leave CUDA_VISIBLE_DEVICES alone and take the launcher's GPU (config/configurator.py:477-515).

    Stock RecBole makes `gpu_id` (0) the only visible one, for every process. All but the main process are silent.
    """

    @replace(configurator.Config)
    def _init_device(stock: Any, self: Any) -> None:
        if not distributed.is_launched():
            stock(self)
            return
        values = self.final_config_dict
        if int(values.get("nproc") or 1) > 1 or "local_rank" in values:
            raise distributed.two_launchers("the configuration")
        gpu_id, visible = values["gpu_id"], os.environ.get("CUDA_VISIBLE_DEVICES")
        values["gpu_id"] = "" if distributed.wants("CPU") else _all_gpus() if visible is None else visible
        try:
            stock(self)
        finally:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
            if visible is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = visible
        values["gpu_id"] = gpu_id
        if values["device"].type == "cuda":
            values["device"] = type(values["device"])("cuda", distributed.local_process_index())
        if not distributed.is_main():
            values.update({"state": "ERROR", "show_progress": False})
            if values.get("log_wandb"):
                values["log_wandb"] = False


def _all_gpus() -> str:
    return ",".join(map(str, range(int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size())))))


def log_in_main_alone(logger: ModuleType) -> None:
    """Keep ``init_logger`` (utils/logger.py:69) from writing a log file a process; errors are seen from all of them."""

    @replace(logger)
    def init_logger(stock: Any, config: Any) -> None:
        if distributed.is_main():
            stock(config)
            return
        form = f"process {distributed.process_index()}: %(message)s"
        logging.basicConfig(level=logging.ERROR, format=form)
        logging.getLogger().setLevel(logging.ERROR)


def draw_curves_in_main_alone(utils: ModuleType) -> None:
    """Give the other processes a Tensorboard writer that writes nothing (utils/utils.py:208)."""

    def nothing(*args: Any) -> None:
        pass

    @replace(utils)
    def get_tensorboard(stock: Any, logger: Any) -> Any:
        return stock(logger) if distributed.is_main() else SimpleNamespace(add_scalar=nothing, add_hparams=nothing)
