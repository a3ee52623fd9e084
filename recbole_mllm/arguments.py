"""What every command is given, and the configuration that it makes."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from recbole_mllm.benchmark.variants import ALONE, SETS
from recbole_mllm.common.config import check_keys, check_values, config_paths, is_model, nearest_model, recbole_home
from recbole_mllm.common.errors import UserError, did_you_mean
from recbole_mllm.common.files import CONVERTED, recover
from recbole_mllm.common.prompts import read_style
from recbole_mllm.common.resources import MLLM
from recbole_mllm.common.settings import EvaluationSettings, FeatureSettings, Settings, WrongValue, check_models
from recbole_mllm.common.yaml_files import read_mapping
from recbole_mllm.demo.builtin import ensure_builtin, preset_of


@dataclass(frozen=True, slots=True)
class Options:
    """What every command takes: configuration keys, config files or presets, a seed."""

    overrides: Mapping[str, Any] = field(default_factory=dict)
    config_files: tuple[str, ...] = ()
    seed: int | None = None

    def keys(self) -> dict[str, Any]:
        """Return the overrides with the seed among them."""
        return {**self.overrides, **({"seed": self.seed} if self.seed is not None else {})}


def check_takes(options: Options, command: str, names: Sequence[str] = ("data_path",)) -> None:
    """Refuse configuration keys that a `command` does not read: all but `names`."""
    if unknown := set(options.overrides) - set(names):
        takes = ", ".join(f"--{name}" for name in names)
        raise UserError(f"{command} takes no --{min(unknown)}; of configuration keys it takes {takes}")


def dataset_of(args: Namespace) -> str:
    """Return the name of the dataset that was given.

    Raises:
        UserError: None was.
    """
    if not args.dataset:
        raise UserError("--dataset is missing: give the name of a folder under data_path, or demo, or ml-100k-posters")
    return str(args.dataset)


def read_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Read ``--key=value`` words; values are YAML, so 5 is a number, [1,2] a list and null nothing."""
    out: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not equals or not key:
            raise UserError(f"cannot read {word!r}; keys are written --key=value, options are in --help")
        try:
            out[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):  # YAML reads 2026-02-30 as a date, and is surprised
            raise UserError(f"cannot read the value of --{key}: {value[:80]!r} is no valid YAML") from None
    return out


def config_of(model: str, dataset: str, options: Options, *, recommends: bool = True) -> Any:
    """Return RecBole's Config of one run; without `recommends`, of one that writes texts alone.

    Raises:
        UserError: A key, a value, the model or the dataset is not what it should be; nothing has run yet.
    """
    from recbole_mllm.quick_start import make_config

    check_given(dataset, options)
    check_model(model)
    files = config_files(dataset, options)
    config = make_config(model, dataset, files, {"frozen_candidates": True, **options.keys()})
    check_config(config, recommends=recommends)
    return config


def config_files(dataset: str, options: Options) -> list[str]:
    """Return the paths of the config files, behind the preset of a built-in dataset, whose settings they may change."""
    preset, files = preset_of(dataset), options.config_files
    return config_paths([*([preset] if preset and preset not in files else []), *files])


def check_given(dataset: str, options: Options) -> None:
    """Refuse keys and values of the command line, or a dataset's name, that no run could use.

    Raises:
        UserError: Says which.
    """
    if not isinstance(dataset, str):
        raise WrongValue("dataset", dataset, "the name of a folder under data_path")
    check_keys(options.overrides, "the command line")
    given = {key: value for key, value in options.keys().items() if not isinstance(value, str)}
    check_values(given, lambda key: f"--{key}")
    if not dataset.strip() or dataset in (".", "..") or any(sign in dataset for sign in "/\\"):
        folder, home = Path(dataset).resolve(), str(options.overrides.get("data_path") or "dataset")
        place = "" if folder.parent == Path(home).resolve() else f" --data_path={folder.parent}"
        hint = f"for that folder write --dataset {folder.name}{place}" if folder.is_dir() else "it is no folder either"
        raise UserError(
            f"--dataset {dataset!r}: give the name of a folder under data_path ({home}), not a path; {hint}"
        )


def check_model(name: str) -> None:
    """Refuse a name that is no model's.

    Raises:
        UserError: Names the nearest one, or says what is meant.
    """
    if is_model(name):
        return
    if name.startswith((f"{MLLM}:", f"{MLLM}+")) or name in ALONE or name in SETS:
        raise UserError(f"--model {name}: variants and sets of models are for `benchmark --models {name}`")
    hint = nearest_model(name, (*ALONE, *SETS)) or f"; give RecBole's name of one, such as SASRec, or {MLLM}"
    is_path = any(sign in name for sign in "/\\") or name.endswith(".pth")
    what = "is a path where a model's name is wanted" if is_path else "is not the name of an existing model"
    raise UserError(f"--model [{name}] {what}{hint}")


def check_config(config: Any, *, recommends: bool = True) -> None:
    """Refuse settings of this project, or files and a dataset they name, that a run could not use.

    Raises:
        UserError: Says which.
    """
    EvaluationSettings.from_config(config)
    if config["model"] == MLLM:
        check_models(config, recommender=recommends)
        if (style := Settings.from_config(config).recommend.prompt_style) != "auto":
            read_style(style)
    if FeatureSettings.from_config(config).kinds:
        from recbole_mllm.features.item_vectors import settings_of  # loads torch

        settings_of(config)
    for key in ("image_dir", "candidates_file", "retriever_checkpoint"):
        if (path := config[key]) and not Path(str(path)).exists():
            raise UserError(f"{key} {str(path)!r} does not exist")
    folder = Path(config["data_path"])
    if folder.is_dir() or config["dataset"] in read_mapping(recbole_home() / "properties" / "dataset" / "url.yaml"):
        return  # RecBole downloads what it has an address of
    if folder.exists():
        raise UserError(f"{folder} is a file; a dataset is a folder that holds {folder.name}.inter")
    raise no_dataset(folder.name, folder.parent)


def dataset_folder(given: str, home: Path) -> Path:
    """Return the folder that `given` is, or names under `home`; a built-in dataset is built there.

    Raises:
        UserError: There is none.
    """
    if Path(given).name == given and not any(Path(given).glob("*.inter")):
        ensure_builtin(home / given)
    folder = named_folder(given, home)
    with suppress(OSError):  # a folder that is only read
        recover(folder, CONVERTED)
    return folder


def inspected_folder(given: str, keys: Mapping[str, Any], command: str) -> Path:
    """Return `dataset_folder` of a command that takes no keys but those that say where a dataset is and how it reads.

    Raises:
        UserError: There is none, or a key is another one.
    """
    from recbole_mllm.inspect.measure import LAYOUT_KEYS  # loads numpy

    check_takes(Options(keys), command, ("data_path", *LAYOUT_KEYS))
    return dataset_folder(given, Path(str(keys.get("data_path") or "dataset")))


def named_folder(given: str, home: Path = Path("dataset")) -> Path:
    """Return the dataset's folder that `given` is, or names under `home`; raw files may lie in one of the same name."""
    there = [folder for folder in (Path(given), home / given) if folder.is_dir()]
    if not there:
        raise no_dataset(given, home)
    return next((folder for folder in there if any(folder.glob("*.inter"))), there[0])


def no_dataset(name: str, home: Path) -> UserError:
    """Return the error that `home` holds no folder of this name, with the nearest or those it holds."""
    there = sorted(path.name for path in home.glob("*") if path.is_dir() and not path.name.startswith("."))
    hint = did_you_mean(name, there, f"there are {', '.join(there)}" if there else "there is none yet")
    return UserError(f"no dataset {name!r} in {home} ({hint}); give its folder's name, or --data_path=DIR")
