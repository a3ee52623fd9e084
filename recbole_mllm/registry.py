"""Puts our model, dataset, trainer, settings and candidates where stock RecBole looks for them.

Nothing is imported before RecBole asks: what stands above this module is named by text.
"""

from __future__ import annotations

import copy
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from recbole_mllm._importhook import after_import
from recbole_mllm.compat.patching import wrap
from recbole_mllm.files import CONVERTED, recover
from recbole_mllm.resources import PROPERTIES, resource

if TYPE_CHECKING:
    from importlib.abc import Loader
else:  # as in _importhook
    Loader = object

# utils/utils.py:64-77 looks for a module named like the model, in lower case
MODELS = {
    "recbole.model.sequential_recommender.mllmmsr": ("MLLMMSR", "recbole_mllm.model.sequential_recommender.mllmmsr"),
}
# data/utils.py:41-42 and utils/utils.py:98-101 look for these names in two packages
DATASETS = {"MLLMMSRDataset": "recbole_mllm.data.dataset"}
TRAINERS = {"MLLMMSRTrainer": "recbole_mllm.trainer"}


def register() -> None:
    """Register with RecBole: at once where it has been imported, else as soon as it is."""
    if not any(isinstance(finder, _ModelFinder) for finder in sys.meta_path):
        sys.meta_path.append(_ModelFinder())
    after_import("recbole.config.configurator", read_our_files)
    after_import("recbole.data.dataset", offer_dataset)
    after_import("recbole.data.dataset.dataset", _listed("ask_for_lists"))
    after_import("recbole.data.dataset.dataset", keep_facts)
    after_import("recbole.data.dataset.dataset", _listed("learn_from_histories"))
    after_import("recbole.data.dataset.dataset", check_files)
    after_import("recbole.data.dataset.sequential_dataset", _listed("show_latest_items"))
    after_import("recbole.data.utils", prepare_our_way)
    after_import("recbole.evaluator.collector", count_training)
    after_import("recbole.model.general_recommender.pop", count_popularity)
    after_import("recbole.model.general_recommender.random", score_by_pair)
    after_import("recbole.model.layers", read_vectors)
    after_import("recbole.trainer", offer_trainer)
    after_import("recbole.utils.case_study", check_users)
    after_import("recbole.trainer.trainer", break_ties)


def keep_facts(dataset_module: ModuleType) -> None:
    """Let a dataset keep what candidates are drawn from, and stand in exact order (data/dataset/dataset.py:159-178)."""
    importlib.import_module("recbole_mllm.data.facts").keep_facts(dataset_module)


def _listed(name: str) -> Callable[[ModuleType], None]:
    def arm(module: ModuleType) -> None:
        getattr(importlib.import_module("recbole_mllm.data.listed"), name)(module)

    return arm


def check_files(module: ModuleType) -> None:
    """Let a damaged atomic file be one line before RecBole reads it (data/dataset/dataset.py:427)."""
    importlib.import_module("recbole_mllm.data.checking").check_as_read(module)


class _ModelFinder(Loader):
    """Finds modules that hold one model each, under the names by which RecBole asks for them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of one of `MODELS`."""
        return ModuleSpec(fullname, self) if fullname in MODELS else None

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave it to Python to make the module."""

    def exec_module(self, module: ModuleType) -> None:
        """Put the model's class into `module`; here it is imported."""
        name, source = MODELS[module.__name__]
        setattr(module, name, getattr(importlib.import_module(source), name))


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
            # RecBole takes an AttributeError to mean that there is none, and goes on with its own class
            raise ImportError(f"{sources[name]} cannot be imported: {error}", name=sources[name]) from error
        setattr(package, name, found)
        return found

    package.__getattr__ = lazy  # type: ignore[method-assign]


def read_our_files(configurator: ModuleType) -> None:
    """Let Config read this project's YAML files as it reads RecBole's own (config/configurator.py:238-317).

    The user's files, dictionary and command line win over all of them (:319-323).
    """

    def make_files(stock: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        def _load_config_files(self: Any, file_list: Sequence[Any] | None) -> dict[str, Any]:
            readable = importlib.import_module("recbole_mllm.yamlfile").check_readable
            self.config_files = [str(file) for file in file_list or ()]
            return stock(self, [file for file in self.config_files if readable(Path(file))])

        return _load_config_files

    def make(stock: Callable[..., None]) -> Callable[..., None]:
        def _load_internal_config_dict(self: Any, model: str, model_class: Any, dataset: str) -> None:
            stock(self, model, model_class, dataset)
            recbole_says = dict(self.internal_config_dict)
            self._update_internal_config_dict(PROPERTIES / "overall.yaml")
            self.internal_config_dict.update(recbole_says)
            _load_times(self)
            if any(resource("model", kind.__name__) for kind in model_class.__mro__):
                _check(self, model)
            home = Path(configurator.__file__ or "").parent.parent / "properties"
            for path in (*_model_files(model_class, home, dataset), *_dataset_files(self, dataset)):
                self._update_internal_config_dict(path)
            _load_own_fields(self)

        return _load_internal_config_dict

    wrap(configurator.Config, "_load_config_files", make_files)
    wrap(configurator.Config, "_load_internal_config_dict", make)


_EVERY_TIME = {"inter": ["user_id", "item_id", "timestamp"]}


def _load_times(config: Any) -> None:
    """Load a dataset's times where nobody says which columns to load.

    RecBole's sample.yaml, which stands in for datasets without a file of their own, leaves them out, and then no split
    in time order can be made.
    """
    if config.internal_config_dict.get("load_col") == {"inter": ["user_id", "item_id"]}:
        config.internal_config_dict["load_col"] = copy.deepcopy(_EVERY_TIME)  # what a run changes is its own


def _load_own_fields(config: Any) -> None:
    """Where nobody says which columns to load, load those that the dataset's own field names say."""
    known = {**config.internal_config_dict, **config.external_config_dict}
    if known.get("load_col") == _EVERY_TIME:
        names = [known.get(key) for key in ("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD")]
        config.internal_config_dict["load_col"] = {"inter": [name for name in names if name]}


def _check(config: Any, model: str) -> None:
    """Refuse what nobody reads, where the user wrote it for us; a script's own ``--words`` are not ours to judge."""
    values = importlib.import_module("recbole_mllm.config")
    values.check_files(config.config_files, model)
    importlib.import_module("recbole_mllm.keys").check_keys(config.variable_config_dict, "config_dict")
    values.check_values(config.variable_config_dict)


def _model_files(model_class: Any, home: Path, dataset: str) -> Iterator[Path]:
    """Yield the YAML files of a model of ours, a parent's first, and RecBole's own for the dataset, which wins.

    They come after quick_start_config/sequential.yaml, which RecBole reads last (:307-317): it says for every
    sequential model to rank all items, and our model's own protocol must stand.
    """
    own = [path for kind in reversed(model_class.__mro__) if (path := resource("model", kind.__name__))]
    yield from own
    of_dataset = home / "dataset" / f"{dataset}.yaml"
    if own and of_dataset.is_file():
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
        importlib.import_module("recbole_mllm.config").check_dataset_file(folder / "dataset.yaml")
        yield folder / "dataset.yaml"


def _build(folder: Path) -> None:
    with suppress(OSError):  # a folder that is only read
        recover(folder, CONVERTED)
    importlib.import_module("recbole_mllm.demo.builtin").ensure_builtin(folder)


def prepare_our_way(utils: ModuleType) -> None:
    """Build a built-in dataset before ``create_dataset`` reads it; seed negatives and candidates after the split.

    They are ``create_dataset`` and ``data_preparation``, data/utils.py:31 and :140, wherever they have been imported to
    (quick_start/quick_start.py:24-25).
    """

    def make_create(stock: Callable[..., Any]) -> Callable[..., Any]:
        def create_dataset(config: Any) -> Any:
            _build(Path(config["data_path"]))
            importlib.import_module("recbole_mllm.config").tell_missing_gpus(config)
            if config["item_features"]:
                importlib.import_module("recbole_mllm.features.prepare").offer_features(config)
            with importlib.import_module("recbole_mllm.data.checking").told_what_is_left(config):
                dataset = stock(config)
            importlib.import_module("recbole_mllm.data.saved").use_now(dataset, config)
            importlib.import_module("recbole_mllm.data.facts").tell(dataset)
            return dataset

        return create_dataset

    def make_prepare(stock: Callable[..., Any]) -> Callable[..., Any]:
        def data_preparation(config: Any, dataset: Any) -> Any:
            checking = importlib.import_module("recbole_mllm.data.checking")
            with checking.told_what_is_left(config, dataset):
                train, *rest = stock(config, dataset)
            if hasattr(getattr(train, "_dataset", None), "histories"):  # our dataset, whose rows know their places
                train = importlib.import_module("recbole_mllm.data.training").SeededTrainDataLoader.of(train)
            loaders = (train, *rest)
            if config["frozen_candidates"] is True:
                candidates = importlib.import_module("recbole_mllm.evaluation.candidates")
                loaders = candidates.freeze(config, dataset, *loaders)
            checking.check_parts(config, dataset, *loaders)
            return loaders

        return data_preparation

    wrap(utils, "create_dataset", make_create)
    wrap(utils, "data_preparation", make_prepare)


def read_vectors(layers: ModuleType) -> None:
    """Let RecBole's feature models read vectors of items (model/layers.py:1246-1270)."""
    importlib.import_module("recbole_mllm.features.layer").read_vectors(layers)


def count_popularity(pop: ModuleType) -> None:
    """Let Pop count every interaction of a batch (model/general_recommender/pop.py:47)."""
    importlib.import_module("recbole_mllm.evaluation.counting").count_all(pop)


def count_training(collector: ModuleType) -> None:
    """Let metrics of popularity count the training split alike for every model (evaluator/collector.py:79-94)."""
    importlib.import_module("recbole_mllm.evaluation.counting").count_training(collector)


def score_by_pair(module: ModuleType) -> None:
    """Give ``Random`` scores that belong to the pair; RecBole's change with the batch (random.py:38-45)."""
    importlib.import_module("recbole_mllm.model.random_model").score_by_pair(module.Random)


def check_users(case_study: ModuleType) -> None:
    """Name the users whom ``full_sort_topk`` cannot rank for (utils/case_study.py:19-83)."""
    importlib.import_module("recbole_mllm.evaluation.loader").refuse_users_without_rows(case_study)


def break_ties(trainer: ModuleType) -> None:
    """Rank frozen candidates without ties, before RecBole's collector sees the scores (trainer/trainer.py:463-524)."""
    for name in ("ties", "allitems"):
        importlib.import_module(f"recbole_mllm.evaluation.{name}").install(trainer.Trainer)
