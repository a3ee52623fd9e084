"""What RecBole must not do in one of several processes that a launcher has started: pick a GPU, start NCCL, speak.

And where its log and its Tensorboard curves go: in a run of ours below ``checkpoint_dir``, beside what else it writes.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
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


class RunLog(logging.FileHandler):
    """A run's log file, ``<checkpoint_dir>/log/MODEL/…``, made with its first line."""

    def __init__(self, config: Any) -> None:
        from recbole.utils import get_local_time

        self.place, model = Path(config["checkpoint_dir"]), config["model"]
        name = f"{model}-{config['dataset']}-{get_local_time()}-{os.getpid()}.log"
        super().__init__(self.place / "log" / model / name, encoding="utf-8", delay=True)

    def _open(self) -> Any:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()


def open_log(config: Any, *, to_file: bool = True) -> None:
    """Log as ``init_logger`` does (utils/logger.py:69), whose files stand in ``./log`` wherever a command is called."""
    from colorlog import ColoredFormatter  # type: ignore[import-untyped]
    from recbole.utils import logger

    if not distributed.is_main():
        logger.init_logger(config)
        return
    level = logging.getLevelNamesMapping().get(str(config["state"] or "INFO").upper(), logging.INFO)
    shown = logging.StreamHandler()
    form = "%(log_color)s%(asctime)-15s %(levelname)s  %(message)s"
    shown.setFormatter(ColoredFormatter(form, "%d %b %H:%M", log_colors=logger.log_colors_config))
    handlers: list[logging.Handler] = [shown]
    if to_file:
        log_file = RunLog(config)
        log_file.setFormatter(logging.Formatter("%(asctime)-15s %(levelname)s  %(message)s", "%a %d %b %Y %H:%M:%S"))
        log_file.addFilter(logger.RemoveColorFilter())
        handlers.append(log_file)
    logging.basicConfig(level=level, handlers=handlers)


def place_curves(utils: ModuleType) -> None:
    """Put Tensorboard's curves beside a `RunLog` (utils/utils.py:208); processes but the main one draw none."""

    def nothing(*args: Any) -> None:
        pass

    @replace(utils)
    def get_tensorboard(stock: Any, logger: Any) -> Any:
        if not distributed.is_main():
            return SimpleNamespace(add_scalar=nothing, add_hparams=nothing)
        log = next((handler for handler in logger.handlers if isinstance(handler, RunLog)), None)
        if log is None:
            return stock(logger)
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(log.place / "log_tensorboard" / Path(log.baseFilename).stem)
