"""Puts our model, dataset, trainer, settings and candidates where stock RecBole looks for them.

Nothing is imported before RecBole asks: what stands above this module is named by text.
"""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from recbole_mllm.common.files import CONVERTED, recover
from recbole_mllm.common.model_names import TINY
from recbole_mllm.common.resources import MLLM, PROPERTIES, resource
from recbole_mllm.recbole_patches.hooks import replace

MODELS = {MLLM: "recbole_mllm.model.sequential_recommender.mllmmsr"}
_EVERY_TIME = {"inter": ["user_id", "item_id", "timestamp"]}
_GIVEN: dict[str, type] = {}  # classes that a Config was given instead of a name


def find_models(utils: ModuleType) -> None:
    """Let ``get_model`` and ``get_trainer`` (utils/utils.py:55-110) know what is ours, and classes that were given.

    An unknown name is named: looking for it ends in exlib_recommender, whose ``__init__`` imports lightgbm and xgboost,
    and their absence hid the ValueError of :80. And quick_start.py:137, :216, :262 ask by name for a class that Config
    took as a class.
    """

    @replace(utils)
    def get_model(stock: Any, model_name: str) -> Any:
        if model_name in _GIVEN:
            return _GIVEN[model_name]
        if model_name in MODELS:
            return getattr(importlib.import_module(MODELS[model_name]), model_name)
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

    @replace(utils)
    def get_trainer(stock: Any, model_type: Any, model_name: str) -> Any:
        if model_name == MLLM:
            return importlib.import_module("recbole_mllm.trainer").MLLMMSRTrainer
        return stock(model_type, model_name)


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
        if ours:  # what nobody reads is refused where the user wrote it for us; a script's own words are not judged
            values = importlib.import_module("recbole_mllm.common.config")
            values.check_files(self.config_files, model)
            values.check_keys(self.variable_config_dict, "config_dict")
            values.check_values(self.variable_config_dict)
            given = {*self.variable_config_dict, *self.cmd_config_dict}
            for name in (kind.__name__ for kind in reversed(model_class.__mro__) if resource("model", kind.__name__)):
                own = values.per_model(self.config_files, name)
                self.external_config_dict.update({key: value for key, value in own.items() if key not in given})
            # again after quick_start_config/sequential.yaml, which RecBole reads last (:307-317): it says for every
            # sequential model to rank all items, and our model's own protocol must stand
            of_dataset = Path(configurator.__file__ or "").parent.parent / "properties/dataset" / f"{dataset}.yaml"
            ours += [of_dataset] * of_dataset.is_file()
        for path in (*ours, *_dataset_files(self, dataset)):
            self._update_internal_config_dict(path)
        if ours and importlib.import_module("recbole_mllm.demo.builtin").is_demo(dataset):
            self.internal_config_dict["mllm"] = self.internal_config_dict["mllm"] or TINY
        known = {**self.internal_config_dict, **self.external_config_dict}
        if ours:
            importlib.import_module("recbole_mllm.common.settings").check_models(known)
        if known.get("load_col") == _EVERY_TIME:  # nobody says which columns to load: the dataset's own fields
            names = [known.get(key) for key in ("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD")]
            self.internal_config_dict["load_col"] = {"inter": [name for name in names if name]}


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
    from recbole_mllm.data import checking
    from recbole_mllm.recbole_patches import behaviour

    @replace(utils)
    def create_dataset(stock: Any, config: Any) -> Any:
        _build(Path(config["data_path"]))
        importlib.import_module("recbole_mllm.common.config").tell_missing_gpus(config)
        if config["item_features"]:
            importlib.import_module("recbole_mllm.features.item_vectors").offer_features(config)
        if config["model"] == MLLM:  # :41-42 looks for a dataset of the model's name in this package
            ours = importlib.import_module("recbole_mllm.data.dataset").MLLMMSRDataset
            importlib.import_module("recbole.data.dataset").MLLMMSRDataset = ours  # type: ignore[attr-defined]
        with checking.explain_what_is_left(config):
            dataset = stock(config)
        behaviour.reuse_saved_dataset(dataset, config)
        behaviour.log_order(dataset)
        return dataset

    @replace(utils)
    def data_preparation(stock: Any, config: Any, dataset: Any) -> Any:
        return importlib.import_module("recbole_mllm.evaluation.candidates").prepare_loaders(config, dataset)[:3]
