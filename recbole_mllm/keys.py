"""Which keys and models there are, and a clear word about one that does not exist.

RecBole answers None for a misspelt key, so whatever a user has written is held against the keys that somebody reads.
RecBole's own are read off its files: nothing here imports it.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import logging
import re
from collections.abc import Iterable, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from recbole_mllm.compat.ranked import two_launchers
from recbole_mllm.errors import UserError
from recbole_mllm.resources import PROPERTIES
from recbole_mllm.settings import known_keys
from recbole_mllm.yamlfile import line_of, read_mapping

WITHDRAWN: dict[str, str] = {
    "score_cache": "scores are cached for as long as an evaluation runs, so that a killed one resumes",
    "score_cache_mb": "scores are cached for as long as an evaluation runs, so that a killed one resumes",
}
"""Keys of earlier versions -> why they have no effect; a file or record that holds one is read, with one warning."""

# Fields of RecBole's command line, and what its Config keeps beside what it is given
_UNLISTED = {
    "model", "dataset", "config_files", "data_path", "device", "single_spec", "MODEL_TYPE", "eval_type", "local_rank",
}  # fmt: skip
_READ = re.compile(r"""config\[\s*["'](\w+)["']\s*\]|config\.get\(\s*["'](\w+)["']""")
_PACKAGES = ("general", "context_aware", "sequential", "knowledge_aware", "exlib")
_WITHOUT_FILE = {"Random", "MLLMMSR"}  # models for which RecBole has no YAML file
_MODEL_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def recbole_home() -> Path:
    """Return the folder of the installed RecBole, which is not imported."""
    spec = importlib.util.find_spec("recbole")
    if spec is None or spec.origin is None:
        raise UserError("RecBole is not installed; install it with `pip install --no-deps recbole==1.2.1`")
    return Path(spec.origin).parent


@lru_cache(maxsize=1)
def every_key() -> frozenset[str]:
    """Return all keys that RecBole or this project knows: argument tables, YAML files, settings, what models read."""
    home = recbole_home()
    tables = ast.parse((home / "utils" / "argument_list.py").read_text(encoding="utf-8")).body
    keys = {str(key) for table in tables if isinstance(table, ast.Assign) for key in ast.literal_eval(table.value)}
    keys |= known_keys() | _UNLISTED
    for path in sorted(home.rglob("*.py")):
        keys |= {one or other for one, other in _READ.findall(path.read_text(encoding="utf-8"))}
    files = (path for folder in (home / "properties", PROPERTIES) for path in sorted(folder.rglob("*.yaml")))
    for path in files:
        if path.parent.name not in ("prompt", "accelerate") and path.name not in ("baselines.yaml", "devices.yaml"):
            keys |= set(read_mapping(path))
    return frozenset(keys)


def check_keys(keys: Iterable[str], where: str) -> None:
    """Refuse a key nobody reads; RecBole would pass it over in silence.

    Raises:
        UserError: Names the key, where it stands, and the nearest key there is.
    """
    for key in keys:
        if key == "nproc":
            raise two_launchers(where)
        if key in WITHDRAWN:
            _warn_withdrawn(str(key))
            continue
        check_known(str(key), every_key(), where, "see properties/ for the keys there are")


@cache
def _warn_withdrawn(key: str) -> None:
    logging.getLogger().warning(f"{key} is ignored: {WITHDRAWN[key]}")


def check_known(key: str, known: Iterable[str], where: str, otherwise: str) -> None:
    """Refuse a `key` that is none of `known`, and name the nearest or say what there is `otherwise`."""
    known = list(known)
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else otherwise
        raise UserError(f"unknown key {key!r} in {where}; {hint}")


def checked_file(path: Path, *, of_dataset: bool = False) -> dict[str, Any]:
    """Return what the config file at `path` says; every key in it, and below ``per_model``, is one that is read.

    Args:
        path: A YAML file.
        of_dataset: It is a dataset's own ``dataset.yaml``, which has no sections.

    Raises:
        UserError: It cannot be read, or a key or a model's name is none; the line says where.
    """
    found = read_mapping(path)
    for key, value in found.items():
        check_keys([key], _at(path, key))
        if key == "benchmark_defaults":
            if isinstance(value, Mapping):
                for inner in value:
                    check_keys([str(inner)], f"{_at(path, key, str(inner))}, {key}")
            raise UserError(
                f"{_at(path, key)}: {key} is read from properties/overall.yaml alone; write its keys as they are: they "
                "win over it"
            )
        if key == "per_model":
            if of_dataset:
                raise UserError(f"{_at(path, key)}: {key} is not read here; put it into a file for --config_files")
            _check_sections(path, value)
    return found


def _check_sections(path: Path, sections: Any) -> None:
    if sections is None:
        return
    if not isinstance(sections, dict) or not all(isinstance(keys, dict) for keys in sections.values()):
        raise UserError(
            f"{_at(path, 'per_model')}: per_model must hold a model's name, and below it `key: value` lines"
        )
    for model, keys in sections.items():
        at = _at(path, "per_model", str(model))
        if ":" in str(model):
            raise UserError(f"{at}: per_model names models, not variants such as {model}; write {model.split(':')[0]}")
        if not is_model(str(model)):
            raise UserError(f"{at}: per_model names {str(model)!r}, which is no model{nearest_model(str(model))}")
        for key in keys:
            check_keys([str(key)], f"{_at(path, 'per_model', str(model), str(key))}, per_model, {model}")


def _at(path: Path, *keys: str) -> str:
    line = line_of(path, *keys)
    return str(path) if line is None else f"{path}:{line}"


def model_names() -> set[str]:
    """Return the names of RecBole's models and ours."""
    return {path.stem for path in (recbole_home() / "properties" / "model").glob("*.yaml")} | _WITHOUT_FILE


def is_model(name: str) -> bool:
    """Return whether `name` is a model's: one that is known, or that has a module where RecBole looks for models."""
    if name in model_names():
        return True
    small, known = name.lower(), {known.lower() for known in model_names()}
    if not _MODEL_NAME.fullmatch(name) or small in known:  # written in another case, RecBole does not find it
        return False
    folders = (recbole_home() / "model" / f"{kind}_recommender" for kind in _PACKAGES)
    return any((folder / f"{small}.py").is_file() for folder in folders)


def nearest_model(name: str, others: Iterable[str] = ()) -> str:
    """Return a hint of which model, or which of `others`, `name` may mean, "" where nothing is near."""
    small = {known.lower(): known for known in sorted({*model_names(), *others})}
    near = difflib.get_close_matches(name.lower(), small, n=1, cutoff=0.5)
    return f"; did you mean {small[near[0]]}?" if near and small[near[0]] != name else ""
