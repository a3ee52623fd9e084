"""Puts our model, dataset, trainer, settings and candidates where stock RecBole looks for them.

Nothing is imported before RecBole asks: what stands above this module is named by text.
"""

from __future__ import annotations

import copy
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from recbole_mllm.common.files import CONVERTED, recover
from recbole_mllm.common.resources import PROPERTIES, resource
from recbole_mllm.recbole_patches.hooks import replace

if TYPE_CHECKING:
    from importlib.abc import Loader
else:  # importlib.abc alone would take half of `import recbole_mllm`'s time
    Loader = object

# utils/utils.py:64-77 looks for a module named like the model, in lower case
MODELS = {
    "recbole.model.sequential_recommender.mllmmsr": ("MLLMMSR", "recbole_mllm.model.sequential_recommender.mllmmsr"),
}
# data/utils.py:41-42 and utils/utils.py:98-101 look for these names in two packages
DATASETS = {"MLLMMSRDataset": "recbole_mllm.data.dataset"}
TRAINERS = {"MLLMMSRTrainer": "recbole_mllm.trainer"}

_EVERY_TIME = {"inter": ["user_id", "item_id", "timestamp"]}


class _ModelFinder(Loader):
    """Finds modules that hold one model each, under the names by which RecBole asks for them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of one of `MODELS`."""
        return ModuleSpec(fullname, self) if fullname in MODELS else None

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave it to Python to create the module."""

    def exec_module(self, module: ModuleType) -> None:
        """Put the model's class into `module`; here it is imported."""
        name, source = MODELS[module.__name__]
        setattr(module, name, getattr(importlib.import_module(source), name))


def register_models() -> None:
    """Let RecBole import our models under its own package's name."""
    if not any(isinstance(finder, _ModelFinder) for finder in sys.meta_path):
        sys.meta_path.append(_ModelFinder())


def offer_dataset(package: ModuleType) -> None:
    """Let ``create_dataset`` find our dataset in ``recbole.data.dataset`` (data/utils.py:41-42)."""
    _offer(package, DATASETS)


def offer_trainer(package: ModuleType) -> None:
    """Let ``get_trainer`` find our trainer in ``recbole.trainer`` (utils/utils.py:98-101)."""
    _offer(package, TRAINERS)


def _offer(package: ModuleType, sources: dict[str, str]) -> None:
    def lazy(name: str) -> Any:
        if name not in sources:
            raise AttributeError(f"module {package.__name__!r} has no attribute {name!r}")
        try:
            found = getattr(importlib.import_module(sources[name]), name)
        except AttributeError as error:
            # RecBole takes an AttributeError to mean that there is none, and uses its own class
            raise ImportError(f"{sources[name]} cannot be imported: {error}", name=sources[name]) from error
        setattr(package, name, found)
        return found

    package.__getattr__ = lazy  # type: ignore[method-assign]


def read_our_files(configurator: ModuleType) -> None:
    """Let Config read this project's YAML files as it reads RecBole's own (config/configurator.py:238-317).

    The user's files, dictionary and command line win over all of them (:319-323).
    """

    @replace(configurator.Config)
    def _load_config_files(stock: Any, self: Any, file_list: Sequence[Any] | None) -> Any:
        readable = importlib.import_module("recbole_mllm.common.yaml_files").check_readable
        self.config_files = [str(file) for file in file_list or ()]
        return stock(self, [file for file in self.config_files if readable(Path(file))])

    @replace(configurator.Config)
    def _load_internal_config_dict(stock: Any, self: Any, model: str, model_class: Any, dataset: str) -> None:
        stock(self, model, model_class, dataset)
        recbole_says = dict(self.internal_config_dict)
        self._update_internal_config_dict(PROPERTIES / "overall.yaml")
        self.internal_config_dict.update(recbole_says)
        if self.internal_config_dict.get("load_col") == {"inter": ["user_id", "item_id"]}:
            # RecBole's sample.yaml, for datasets without a file of their own, leaves the times out
            self.internal_config_dict["load_col"] = copy.deepcopy(_EVERY_TIME)  # what a run changes is its own
        ours = [path for kind in reversed(model_class.__mro__) if (path := resource("model", kind.__name__))]
        if ours:
            _check(self, model)
        home = Path(configurator.__file__ or "").parent.parent / "properties"
        for path in (*_model_files(ours, home, dataset), *_dataset_files(self, dataset)):
            self._update_internal_config_dict(path)
        _load_own_fields(self)


def _load_own_fields(config: Any) -> None:
    """Where nobody says which columns to load, load those that the dataset's own field names say."""
    known = {**config.internal_config_dict, **config.external_config_dict}
    if known.get("load_col") == _EVERY_TIME:
        names = [known.get(key) for key in ("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD")]
        config.internal_config_dict["load_col"] = {"inter": [name for name in names if name]}


def _check(config: Any, model: str) -> None:
    """Refuse what nobody reads, where the user wrote it for us; a script's own ``--words`` are not ours to judge."""
    values = importlib.import_module("recbole_mllm.common.config")
    values.check_files(config.config_files, model)
    importlib.import_module("recbole_mllm.common.config").check_keys(config.variable_config_dict, "config_dict")
    values.check_values(config.variable_config_dict)


def _model_files(ours: Sequence[Path], home: Path, dataset: str) -> Iterator[Path]:
    """Yield the YAML files of a model of ours, a parent's first, and RecBole's own for the dataset, which wins.

    They come after quick_start_config/sequential.yaml, which RecBole reads last (:307-317): it says for every
    sequential model to rank all items, and our model's own protocol must stand.
    """
    yield from ours
    of_dataset = home / "dataset" / f"{dataset}.yaml"
    if ours and of_dataset.is_file():
        yield of_dataset


def _dataset_files(config: Any, dataset: str) -> Iterator[Path]:
    """Yield the dataset's YAML in properties/ and the one in its own folder, for any model; the folder's wins.

    They too win over sequential.yaml, since a dataset that says how it is to be split says so for every kind of model.
    A built-in dataset is built first, for its folder to have one.
    """
    shipped = resource("dataset", dataset)
    if shipped:
        yield shipped
    if dataset == "ml-100k":  # always RecBole's own copy (:330-334)
        return
    known = {**config.internal_config_dict, **config.external_config_dict}
    folder = Path(known["data_path"]) / dataset
    _build(folder)
    if os.path.lexists(folder / "dataset.yaml"):
        importlib.import_module("recbole_mllm.common.config").check_dataset_file(folder / "dataset.yaml")
        yield folder / "dataset.yaml"


def _build(folder: Path) -> None:
    with suppress(OSError):  # a folder that is only read
        recover(folder, CONVERTED)
    importlib.import_module("recbole_mllm.demo.builtin").ensure_builtin(folder)


def prepare_data(utils: ModuleType) -> None:
    """Build a built-in dataset before ``create_dataset`` reads it; seed negatives and candidates after the split.

    They are ``create_dataset`` and ``data_preparation``, data/utils.py:31 and :140, wherever they have been imported to
    (quick_start/quick_start.py:24-25).
    """
    from recbole_mllm.recbole_patches import behaviour, exact_order, file_checks

    @replace(utils)
    def create_dataset(stock: Any, config: Any) -> Any:
        _build(Path(config["data_path"]))
        importlib.import_module("recbole_mllm.common.config").tell_missing_gpus(config)
        if config["item_features"]:
            importlib.import_module("recbole_mllm.features.item_vectors").offer_features(config)
        with file_checks.explain_what_is_left(config):
            dataset = stock(config)
        behaviour.reuse_saved_dataset(dataset, config)
        exact_order.log_order(dataset)
        return dataset

    @replace(utils)
    def data_preparation(stock: Any, config: Any, dataset: Any) -> Any:
        with file_checks.explain_what_is_left(config, dataset):
            train, *rest = stock(config, dataset)
        if hasattr(getattr(train, "_dataset", None), "histories"):  # our dataset, whose rows know their places
            train = importlib.import_module("recbole_mllm.data.dataloader").SeededTrainDataLoader.of(train)
        loaders = (train, *rest)
        if config["frozen_candidates"] is True:
            candidates = importlib.import_module("recbole_mllm.evaluation.candidates")
            loaders, dataset.candidates_digest = candidates.freeze(config, dataset, *loaders)
        file_checks.check_parts(config, dataset, *loaders)
        return loaders
