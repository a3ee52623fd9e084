"""What goes wrong between a model's name and its first epoch, and with datasets that were saved."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from recbole_mllm.common import distributed
from recbole_mllm.common.errors import UserError
from recbole_mllm.data.facts import wants_exact_order
from recbole_mllm.recbole_patches.hooks import replace

_ATOMIC = (".inter", ".item", ".user", ".kg", ".link", ".net")
_GIVEN: dict[str, type] = {}  # classes that a Config was given instead of a name


def find_models(utils: ModuleType) -> None:
    """Let ``get_model`` (utils/utils.py:55-85) name an unknown model, and know classes that ``run_recbole`` was given.

    Looking for an unknown name ends in exlib_recommender, whose ``__init__`` imports lightgbm and xgboost: their
    absence hid the ValueError of :80. And quick_start.py:137, :216, :262 ask by name for a class that Config took as
    a class.
    """

    @replace(utils)
    def get_model(stock: Any, model_name: str) -> Any:
        if model_name in _GIVEN:
            return _GIVEN[model_name]
        try:
            return stock(model_name)
        except ModuleNotFoundError as error:
            libraries = ("lightgbm", "xgboost")  # and the models of RecBole that need them
            if error.name not in libraries or model_name.lower() in libraries:
                raise
        except AttributeError as error:  # its file was found, as their names are in small letters
            if error.name != model_name:
                raise
        raise ValueError(f"`model_name` [{model_name}] is not the name of an existing model.")


def remember_model_classes(configurator: ModuleType) -> None:
    """Note the class that Config is given (config/configurator.py:211-213) for `find_models`; a name forgets it."""

    @replace(configurator.Config)
    def _get_model_and_dataset(stock: Any, self: Any, model: Any, dataset: Any) -> Any:
        asked = self.external_config_dict.get("model") if model is None else model
        if isinstance(asked, str):
            _GIVEN.pop(asked, None)
        elif isinstance(asked, type):
            _GIVEN[asked.__name__] = asked
        return stock(self, model, dataset)


def count_no_llm_flops(utils: ModuleType) -> None:
    """Answer 0 for MLLMMSR in ``get_flops`` (utils/utils.py:250), which deep-copies the model and predicts a row.

    quick_start.py:141 calls it for every model; a copy would double what an LLM takes. Other models are counted as
    before.
    """

    @replace(utils)
    def get_flops(stock: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if any(kind.__name__ == "MLLMMSR" for kind in type(model).__mro__):
            return 0
        return stock(model, *args, **kwargs)


def ask_for_nccl(quick_start: ModuleType) -> None:
    """Refuse ``run(nproc > 1)`` and ``run_recboles`` where there is no NCCL (config/configurator.py:495-505)."""

    @replace(quick_start)
    def run(stock: Any, *args: Any, **kwargs: Any) -> Any:
        nproc = kwargs.get("nproc", args[5] if len(args) > 5 else 1)
        world_size = kwargs.get("world_size", args[6] if len(args) > 6 else -1)
        if nproc != 1 and distributed.is_launched():
            raise distributed.two_launchers("run()")
        if nproc != 1 or world_size > 0:  # quick_start.py:53
            _require_nccl(nproc)
        return stock(*args, **kwargs)

    @replace(quick_start)
    def run_recboles(stock: Any, rank: int, *args: Any) -> Any:
        options = args[-1] if args and isinstance(args[-1], dict) else {}
        _require_nccl(options.get("config_dict", {}).get("nproc", 1))
        return stock(rank, *args)


def _require_nccl(nproc: int) -> None:
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_nccl_available() and torch.cuda.is_available()):
        raise UserError(
            "RecBole's run_recboles needs GPUs and a torch with NCCL; on CPU start "
            f"`ACCELERATE_USE_CPU=true torchrun --nproc_per_node {max(2, int(nproc))} run_recbole_mllm.py …` instead"
        )


def train_without_detector(sine: ModuleType) -> None:
    """Take back what importing sine.py:25 switches on for the whole process, whatever model is trained.

    The anomaly detector checks every gradient of every operation: on small models it doubles the time of an epoch.
    """
    import torch

    torch.autograd.set_detect_anomaly(False)


def collect_plain_numbers(collector: ModuleType) -> None:
    """Let evaluation/collector.py:226 pass over what is no tensor; ItemCoverage, GiniIndex and others need such.

    It asks everything collected for ``.cpu()``, also the number of items and the counts of interactions.
    """
    import torch

    @replace(collector.Collector)
    def get_data_struct(stock: Any, self: Any) -> Any:
        held = self.data_struct._data_dict
        plain = {key: held.pop(key) for key, value in tuple(held.items()) if not isinstance(value, torch.Tensor)}
        try:
            struct = stock(self)
        finally:
            held.update(plain)
        struct._data_dict.update(plain)
        return struct


def reuse_saved_dataset(dataset: Any, config: Any) -> None:
    """Let a `dataset` that RecBole had saved (data/utils.py:62-76) be split as `config` says, not as it was then.

    Raises:
        UserError: The dataset's files have changed since it was saved, which RecBole does not see, or what candidates
            and order are worked out from was not saved with it.
    """
    if dataset.config is config:
        return
    name = config["dataset"]
    default = Path(config["checkpoint_dir"]) / f"{name}-{type(dataset).__name__}.pth"
    file = Path(config["dataset_save_path"] or default)
    for path in sorted(Path(config["data_path"]).glob(f"{name}.*")):
        if path.suffix in _ATOMIC and path.stat().st_mtime > file.stat().st_mtime:
            raise UserError(f"{path} is newer than {file}, the dataset as RecBole saved it; delete that file")
    dataset.config = config
    if dataset.facts is None and wants_exact_order(dataset):
        raise UserError(f"{file}, the dataset as RecBole saved it, was saved by an older version; delete that file")
