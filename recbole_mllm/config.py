"""The border to RecBole's Config: which keys exist, and a clear word about one that does not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from recbole_mllm.compat.ranked import two_launchers
from recbole_mllm.errors import UserError
from recbole_mllm.refusals import told_in_a_line
from recbole_mllm.resources import PROPERTIES, named, resource
from recbole_mllm.settings import known_keys

# Keys RecBole reads but lists neither in its argument tables nor in a YAML file, and fields of its command line
_UNLISTED = {
    "model",
    "dataset",
    "config_files",
    "data_path",
    "device",
    "single_spec",
    "MODEL_TYPE",
    "eval_type",
    "local_rank",
}
_LEARNERS = ("adam", "adamw", "sgd", "adagrad", "rmsprop", "sparse_adam")
_NUMBERS: dict[str, tuple[Any, int]] = {
    "epochs": (int, 0), "stopping_step": (int, 0), "eval_step": (int, 0), "train_batch_size": (int, 1),
    "eval_batch_size": (int, 1), "MAX_ITEM_LIST_LENGTH": (int, 1), "learning_rate": (int | float, 0),
    "weight_decay": (int | float, 0), "metric_decimal_place": (int, 0),
}  # fmt: skip
# Keys within keys that RecBole passes over in silence where it does not know them
_INNER = {
    "eval_args": ("split", "order", "group_by", "mode"),
    "train_neg_sample_args": ("distribution", "sample_num", "alpha", "dynamic", "candidate_num"),
    "clip_grad_norm": ("max_norm", "norm_type", "error_if_nonfinite", "foreach"),
}
_WITHOUT_PLACES = ("gauc", "auc", "mae", "rmse", "logloss")


@lru_cache(maxsize=1)
def every_key() -> frozenset[str]:
    """Return all keys that RecBole or this project knows: argument tables, YAML files, settings."""
    import recbole
    from recbole.utils import argument_list

    tables = [getattr(argument_list, name) for name in dir(argument_list) if name.endswith("_arguments")]
    keys = {key for table in tables for key in table} | known_keys() | _UNLISTED
    folders = (Path(recbole.__file__).parent / "properties", PROPERTIES)
    for path in (path for folder in folders for path in sorted(folder.rglob("*.yaml"))):
        if path.parent.name not in ("prompt", "accelerate") and path.name not in ("baselines.yaml", "devices.yaml"):
            keys |= set(_mapping(path))
    return frozenset(keys)


def check_keys(keys: Iterable[str], where: str) -> None:
    """Refuse a key nobody reads; RecBole would pass it over in silence.

    Raises:
        UserError: Names the key, where it stands, and the nearest key there is.
    """
    for key in keys:
        if key == "nproc":
            raise two_launchers(where)
        _check_known(key, every_key(), where, "see properties/ for the keys there are")


def _check_known(key: str, known: Iterable[str], where: str, otherwise: str) -> None:
    known = list(known)
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else otherwise
        raise UserError(f"unknown key {key!r} in {where}; {hint}")


def config_path(name: str) -> Path:
    """Return the file that `name` means: a path, or a preset's name.

    Raises:
        UserError: There is neither.
    """
    if Path(name).is_file():
        return Path(name)
    found = resource("quick_start_config", name.removesuffix(".yaml"))
    if found is None:
        raise UserError(
            f"config file {name!r} does not exist and is no preset; presets: {', '.join(named('quick_start_config'))}"
        )
    return found


def config_paths(names: Sequence[str]) -> list[str]:
    """Return the files of `names` in order, each with keys that exist."""
    paths = [config_path(name) for name in names]
    for path in paths:
        check_keys(_mapping(path), str(path))
    return [str(path) for path in paths]


def _mapping(path: Path) -> Mapping[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no valid YAML: {str(error).splitlines()[0]}") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold `key: value` lines")
    return {str(key): value for key, value in found.items()}


def per_model(files: Sequence[str], model: str) -> dict[str, Any]:
    """Return what the ``per_model`` sections of `files` say of `model`; a later file wins.

    Raises:
        UserError: A section is no mapping of models to known keys.
    """
    out: dict[str, Any] = {}
    for file in files:
        own = _sections(file).get(model, {})
        check_keys(own, f"{file}, per_model, {model}")
        out |= own
    return out


def _sections(file: str) -> dict[str, dict[str, Any]]:
    found = _mapping(Path(file)).get("per_model") or {}
    if not isinstance(found, dict) or not all(isinstance(keys, dict) for keys in found.values()):
        raise UserError(f"per_model in {file} must hold a model's name, and below it `key: value` lines")
    return found


def file_keys(name: str) -> dict[str, Any]:
    """Return the keys and values of a config file or preset, but for its ``per_model`` sections."""
    return {key: value for key, value in _mapping(config_path(name)).items() if key != "per_model"}


def keys_for(name: str, model: str) -> set[str]:
    """Return the keys that the config file or preset `name` sets for `model`."""
    path = config_path(name)
    return set(_mapping(path)) | set(per_model([str(path)], model))


def sections(files: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the ``per_model`` sections of all `files`, a later file's keys winning; keys are checked when used.

    Raises:
        UserError: A section is no mapping.
    """
    out: dict[str, dict[str, Any]] = {}
    for file in files:
        for model, keys in _sections(file).items():
            out[model] = out.get(model, {}) | keys
    return out


def recbole_config(model: str, dataset: str, files: list[str], keys: dict[str, Any]) -> Any:
    """Return RecBole's Config; the caller sees to it that ``sys.argv`` holds nothing else.

    Raises:
        UserError: RecBole refuses it, or would pass over a key in silence.
    """
    with told_in_a_line("read the configuration"):
        try:
            made = _config({"model": model, "dataset": dataset, "config_file_list": files}, keys)
        except ValueError as error:
            if "invalid literal for int()" not in str(error):  # configurator.py:557
                raise
            raise UserError("eval_args.mode must be full, or uniN or popN with a number, such as uni20") from error
    for name, known in _INNER.items():
        if not isinstance(made[name] or {}, dict):
            raise UserError(f"{name}: {made[name]!r} must be {{key: value}} pairs; it takes {', '.join(known)}")
        for key in made[name] or ():
            _check_known(str(key), known, name, f"it takes {', '.join(known)}")
    return made


def _config(parts: dict[str, Any], keys: dict[str, Any]) -> Any:
    """Return the Config, with the ``train_neg_sample_args: null`` that RecBole demands where the loss is cross-entropy.

    It does not set it itself (configurator.py:343-352).
    """
    from recbole.config import Config

    try:
        return Config(config_dict=keys, **parts)
    except ValueError as error:
        if "should be None when the loss_type is CE" not in str(error):
            raise
    return Config(config_dict={**keys, "train_neg_sample_args": None}, **parts)


def check_training(config: Any) -> None:
    """Refuse what RecBole would only find out in training, once an epoch is over, or pass over with a warning.

    Raises:
        UserError: `valid_metric` is not measured, `learner` is not known (trainer.py:177-201), or what should be a
            number is none.
    """
    for key, (kind, least) in _NUMBERS.items():
        value = config[key]
        if value is None and key == "MAX_ITEM_LIST_LENGTH":  # only sequential models have it
            continue
        if not isinstance(value, kind) or isinstance(value, bool) or value < least:
            what = "a whole number" if kind is int else "a number"
            raise UserError(f"{key}: {value!r} must be {what}, at least {least}")
    drawn = config["train_neg_sample_args"] or {}
    if drawn.get("distribution", "none") != "none" and not (isinstance(n := drawn["sample_num"], int) and n >= 1):
        raise UserError(f"train_neg_sample_args.sample_num: {n!r} must be a whole number, at least 1")
    name, at, k = str(config["valid_metric"]).lower().partition("@")
    measured, places = [metric.lower() for metric in config["metrics"]], [str(place) for place in config["topk"]]
    if name not in measured or (k not in places if at else name not in _WITHOUT_PLACES):
        raise UserError(
            f"valid_metric: {config['valid_metric']} is not measured (metrics: {', '.join(config['metrics'])}; topk: "
            f"{', '.join(places) or 'none'}); set valid_metric to one of these, such as NDCG@10"
        )
    if str(config["learner"]).lower() not in _LEARNERS:
        raise UserError(f"learner: {config['learner']} is not known; take one of {', '.join(_LEARNERS)}")


def benchmark_defaults() -> dict[str, Any]:
    """Return what every model of a benchmark is evaluated with unless the user says otherwise."""
    return dict(_mapping(PROPERTIES / "overall.yaml")["benchmark_defaults"])
