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
        if key not in every_key():
            near = difflib.get_close_matches(key, every_key(), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see properties/ for the keys there are"
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

    A model with a cross-entropy loss gets the ``train_neg_sample_args: null`` that RecBole demands of it and does not
    set itself (configurator.py:343-352).
    """
    from recbole.config import Config

    parts: dict[str, Any] = {"model": model, "dataset": dataset, "config_file_list": files}
    try:
        return Config(config_dict=keys, **parts)
    except ValueError as error:
        if "should be None when the loss_type is CE" not in str(error):
            raise
        return Config(config_dict={**keys, "train_neg_sample_args": None}, **parts)


def benchmark_defaults() -> dict[str, Any]:
    """Return what every model of a benchmark is evaluated with unless the user says otherwise."""
    return dict(_mapping(PROPERTIES / "overall.yaml")["benchmark_defaults"])
