"""The border to RecBole's Config: what it reads is held against the keys and values there are before it does."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from recbole_mllm import ranks
from recbole_mllm.errors import UserError
from recbole_mllm.keys import check_known, checked_file, is_model, nearest_model
from recbole_mllm.progress import tell_once
from recbole_mllm.ranges import COUNT, SEED, Range, WrongValue
from recbole_mllm.refusals import told_in_a_line
from recbole_mllm.resources import PROPERTIES, named, resource
from recbole_mllm.settings import RankingSettings, check_value
from recbole_mllm.yamlfile import line_of, read_mapping

_LEARNERS = ("adam", "adamw", "sgd", "adagrad", "rmsprop", "sparse_adam")
_WHOLE, _FROM_0, _POSITIVE = Range(int, least=0), Range(float, least=0), Range(float, above=0)
# RecBole's own numbers; it finds out late, or never
_NUMBERS = {
    "epochs": _WHOLE, "stopping_step": _WHOLE, "eval_step": _WHOLE, "train_batch_size": COUNT, "eval_batch_size": COUNT,
    "learning_rate": _POSITIVE, "weight_decay": _FROM_0, "metric_decimal_place": _WHOLE,
    "loss_decimal_place": _WHOLE, "worker": _WHOLE, "seed": SEED,
}  # fmt: skip
_OF_SOME = {"MAX_ITEM_LIST_LENGTH": COUNT}  # only some models have it
_SWITCHES = {
    "reproducibility", "show_progress", "use_gpu", "save_dataset", "save_dataloaders", "shuffle", "enable_amp",
    "enable_scaler", "normalize_all", "filter_inter_by_user_or_item",
}  # fmt: skip
_TEXTS = {"checkpoint_dir", "data_path", "field_separator", "seq_separator"}
_INTERVALS = re.compile(r"\s*[(\[]\s*([^,;\s]+)\s*,\s*([^,;\s]+)\s*[)\]]\s*")
_OF_INTERVALS = {
    "user_inter_num_interval", "item_inter_num_interval", "entity_kg_num_interval", "relation_kg_num_interval",
}  # fmt: skip
# Keys within keys that RecBole passes over in silence where it does not know them, and the ranges of their numbers
_INNER: dict[str, dict[str, Range | None]] = {
    "eval_args": dict.fromkeys(("split", "order", "group_by", "mode")),
    "train_neg_sample_args": {
        "distribution": None, "sample_num": COUNT, "alpha": _FROM_0, "dynamic": None,
        "candidate_num": _WHOLE,
    },
    "clip_grad_norm": {
        "max_norm": _POSITIVE, "norm_type": _FROM_0, "error_if_nonfinite": None, "foreach": None,
    },
}  # fmt: skip
_MODE = re.compile(r"full|labeled|(uni|pop)0*[1-9][0-9]*")
_DEVICE = re.compile(r"cpu|cuda(:[0-9]+)?")
_WITHOUT_PLACES = ("gauc", "auc", "mae", "rmse", "logloss")


def config_path(name: str) -> Path:
    """Return the file that `name` means: a path, or a preset's name.

    Raises:
        UserError: There is neither.
    """
    if Path(name).is_file():
        return Path(name)
    if Path(name).is_dir():
        raise UserError(f"config file {name!r} is a folder; give a YAML file in it")
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
        checked_file(path)
    return [str(path) for path in paths]


def per_model(files: Sequence[str], model: str) -> dict[str, Any]:
    """Return what the ``per_model`` sections of `files` say of `model`; a later file wins.

    Raises:
        UserError: A section is no mapping of models to known keys.
    """
    return sections(files).get(model, {})


def file_keys(name: str) -> dict[str, Any]:
    """Return the keys and values of a config file or preset, but for its ``per_model`` sections."""
    return {key: value for key, value in read_mapping(config_path(name)).items() if key != "per_model"}


def keys_for(name: str, model: str) -> set[str]:
    """Return the keys that the config file or preset `name` sets for `model`."""
    path = config_path(name)
    return set(read_mapping(path)) | set(per_model([str(path)], model))


def sections(files: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the ``per_model`` sections of all `files`, a later file's keys winning.

    Raises:
        UserError: A section is no mapping of models to known keys.
    """
    out: dict[str, dict[str, Any]] = {}
    for file in files:
        for model, keys in (checked_file(Path(file)).get("per_model") or {}).items():
            out[model] = out.get(model, {}) | keys
    return out


def check_values(values: Mapping[str, Any], where: Callable[[str], str] = lambda key: "") -> None:
    """Refuse a value that no run could use, or that would do something else than it says.

    Args:
        values: Keys of RecBole's and of this project, any of them.
        where: Says where a key's value was given, for the complaint.

    Raises:
        UserError: Names the key, the value, and what it takes.
    """
    for key, value in values.items():
        try:
            _check_value(key, value)
        except WrongValue as error:
            raise (error.at(place) if (place := where(key)) else error) from None


def _check_value(key: str, value: Any) -> None:
    if key in _NUMBERS:
        _NUMBERS[key].checked(key, value)
    elif key in _OF_SOME and value is not None:
        _OF_SOME[key].checked(key, value)
    elif key in _INNER:
        _check_inner(key, value)
    elif key == "topk" and value is not None:
        places = value if isinstance(value, list) else [value]
        if not places or any(COUNT.read(place) is None for place in places):
            raise WrongValue(key, value, "whole numbers, at least 1, such as [5, 10]")
    elif key == "metrics":
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise WrongValue(key, value, "a list of metrics, such as [Hit, NDCG]")
    elif key == "valid_metric" and not isinstance(value, str):
        raise WrongValue(key, value, "a metric, such as NDCG@10")
    elif key == "device" and not _DEVICE.fullmatch(str(value)):
        raise WrongValue(key, value, "cpu, cuda or cuda:N")
    elif key in _SWITCHES and not isinstance(value, bool | None):
        raise WrongValue(key, value, "true or false")
    elif key in _TEXTS and not (isinstance(value, str) and value):
        raise WrongValue(key, value, "a text")
    elif key in _OF_INTERVALS and not _are_intervals(value):
        raise WrongValue(key, value, "intervals, such as '[5,inf)' or '[0,1];(3,4]'")
    elif key == "val_interval" and value is not None:
        wanted = list(value.values()) if isinstance(value, dict) else [None]
        if not all(isinstance(one, list) or (one and _are_intervals(one)) for one in wanted):
            told = "the intervals of each field, such as {rating: '[3,inf)'}, or the tokens that stay, as a list"
            raise WrongValue(key, value, told)
    elif key == "rm_dup_inter" and value not in (None, "first", "last"):
        raise WrongValue(key, value, "first, last or null")
    elif key in ("load_col", "unload_col") and value is not None:
        _check_columns(key, value)
    elif key == "benchmark_filename" and not (value is None or (value and _are_names(value))):
        raise WrongValue(key, value, "a list of parts, such as [train, valid, test]")
    else:
        check_value(key, value)


def _are_intervals(value: Any) -> bool:
    """Whether RecBole reads `value` as intervals; it passes over what it cannot read, and so does not filter.

    It reads an unquoted ``[0, 5]``, a list to YAML, as the interval that it looks like (data/dataset/dataset.py:994).
    """
    parts = str(value).split(";") if isinstance(value, str | list | tuple) else []
    found = [_INTERVALS.fullmatch(part) for part in parts]
    return value is None or (bool(found) and all(one is not None and _are_ends(*one.groups()) for one in found))


def _are_ends(low: str, high: str) -> bool:
    try:
        return float(low) <= float(high)
    except ValueError:
        return False


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _check_columns(key: str, value: Any) -> None:
    """Check which columns of which files are loaded; RecBole loads nothing of a file that `load_col` does not name."""
    if not isinstance(value, dict) or not all(columns == "*" or _are_names(columns) for columns in value.values()):
        raise WrongValue(key, value, "the columns of each file, such as {inter: [user_id, item_id, timestamp]}")
    if key == "load_col" and not value.get("inter"):
        raise WrongValue(key, value, "columns of inter, at least, such as {inter: [user_id, item_id, timestamp]}")


def _check_inner(name: str, value: Any) -> None:
    """Check the keys within `name`, some of which take numbers."""
    known = _INNER[name]
    if value is None or value == "None":  # RecBole's words for none at all
        return
    if not isinstance(value, dict):
        raise WrongValue(name, value, f"{{key: value}} pairs; it takes {', '.join(known)}")
    drawn = name != "train_neg_sample_args" or value.get("distribution", "uniform") in ("uniform", "popularity")
    for key, inner in value.items():
        check_known(str(key), known, name, f"it takes {', '.join(known)}")
        if (limits := known[key]) is not None and drawn:
            limits.checked(f"{name}.{key}", inner)
    if name == "eval_args":
        modes = value.get("mode", "full")
        for mode in modes.values() if isinstance(modes, dict) else [modes]:
            if not isinstance(mode, str) or not _MODE.fullmatch(mode):
                wanted = "full, or uniN or popN with a number above 0, such as uni20 (labeled, with labels)"
                raise WrongValue("eval_args.mode", mode, wanted)
        parts = (value.get("split") or {}).get("RS") if isinstance(value.get("split"), dict) else None
        if isinstance(parts, list) and (any(_FROM_0.read(part) is None for part in parts) or not sum(parts)):
            raise WrongValue("eval_args.split.RS", parts, "shares of the rows, none below 0, such as [0.8, 0.1, 0.1]")


def check_files(files: Sequence[str | Path], model: str) -> None:
    """Refuse what `check_values` refuses, in what `files` say of `model`; the complaint names file and line."""
    for file in files:
        said = checked_file(Path(file))
        check_values((said.pop("per_model", None) or {}).get(model, {}), partial(_place, file, "per_model", model))
        check_values(said, partial(_place, file))


def check_dataset_file(path: Path) -> None:
    """Refuse a key or value in a dataset's ``dataset.yaml`` that `check_files` would refuse."""
    check_values(checked_file(path, of_dataset=True), partial(_place, path))


def _place(file: str | Path, *keys: str) -> str:
    return f"{file}:{line_of(Path(file), *keys) or 1}"


def recbole_config(model: str, dataset: str, files: list[str], keys: dict[str, Any]) -> Any:
    """Return RecBole's Config, to which the command line of this process says nothing.

    Raises:
        UserError: RecBole refuses it, or would pass over a key in silence, or a value is none that a run could use.
    """
    check_files(files, model)
    # a text may become a number in RecBole's hands (configurator.py:124-147): it is checked behind them
    check_values({key: value for key, value in keys.items() if not isinstance(value, str)})
    with told_in_a_line("read the configuration"), _no_arguments():
        made = _config({"model": model, "dataset": dataset, "config_file_list": files}, keys)
    check_values(made.final_config_dict)
    _take_device(made)
    return made


def _take_device(config: Any) -> None:
    """Obey `device` and ``use_gpu: false``, which RecBole passes over (configurator.py:477-492).

    Raises:
        UserError: The device is not there.
    """
    import torch

    given = config.external_config_dict
    if ranks.is_launched() or not (given.get("device") or given.get("use_gpu") is False):
        return
    check_values({"device": given.get("device") or "cpu"})
    wanted = torch.device(str(given.get("device") or "cpu"))
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise WrongValue("device", str(wanted), f"cpu here: torch sees {torch.cuda.device_count()} GPUs")
    config["device"] = wanted


def tell_missing_gpus(config: Any) -> None:
    """Say in the log that GPUs the user has named are not there, where RecBole quietly takes fewer, or the CPU."""
    import torch

    given, device = config.external_config_dict, str(config["device"])
    ids = [name for name in str(given.get("gpu_id", "")).split(",") if name.strip()]
    if ranks.is_launched() or given.get("device") or given.get("use_gpu") is False:
        return
    if device == "cpu" and (ids or given.get("use_gpu") is True):
        told = f"gpu_id {','.join(ids)}" if ids else "use_gpu"
        tell_once(f"{told}: torch sees no such GPU here, so this run is on the CPU")
    elif len(ids) > (seen := torch.cuda.device_count()):
        tell_once(f"gpu_id {','.join(ids)}: torch sees {seen} of these GPUs here")


@contextmanager
def _no_arguments() -> Iterator[None]:
    """Hide ``sys.argv``, which RecBole's Config would let win over everything (configurator.py:165-193)."""
    words, sys.argv = sys.argv, sys.argv[:1]
    try:
        yield
    finally:
        sys.argv = words


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
        UserError: `valid_metric` is not measured, `learner` is not known (trainer.py:177-201), or a value is none that
            a run could use.
    """
    check_values(config.final_config_dict)
    name, at, k = str(config["valid_metric"]).lower().partition("@")
    measured, places = [metric.lower() for metric in config["metrics"]], [str(place) for place in config["topk"]]
    if name not in measured or (k not in places if at else name not in _WITHOUT_PLACES):
        raise UserError(
            f"valid_metric: {config['valid_metric']} is not measured (metrics: {', '.join(config['metrics'])}; topk: "
            f"{', '.join(places) or 'none'}); set valid_metric to one of these, such as NDCG@10"
        )
    if str(config["learner"]).lower() not in _LEARNERS:
        raise UserError(f"learner: {config['learner']} is not known; take one of {', '.join(_LEARNERS)}")
    modes = config["eval_args"]["mode"]
    if config["model"] == "MLLMMSR":
        ranking = RankingSettings.from_config(config)
        ranking.check_modes(modes)
        if ranking.retriever and not is_model(ranking.retriever):
            hint = nearest_model(ranking.retriever)
            raise UserError(f"retriever {ranking.retriever!r} cannot be had: it is no model of RecBole's{hint}")
        if (config["train_neg_sample_args"] or {}).get("dynamic"):
            raise UserError("train_neg_sample_args.dynamic asks an MLLM about every candidate; set it to false")
    if config["frozen_candidates"] is True and "labeled" in modes.values():
        raise UserError(
            f"eval_args.mode {modes} has no candidates to freeze; use uniN or popN, e.g. uni20, or full (a model by "
            "itself is also evaluated on labels, with frozen_candidates: false)"
        )


def benchmark_defaults() -> dict[str, Any]:
    """Return what every model of a benchmark is evaluated with unless the user says otherwise."""
    return dict(read_mapping(PROPERTIES / "overall.yaml")["benchmark_defaults"])
