"""The border to RecBole's Config: keys and values are checked before RecBole reads them, with file and line.

RecBole answers None for a misspelt key, so whatever a user has written is compared with the keys that somebody reads.
RecBole's own are read off its files: nothing here imports it before a Config is made.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

from recbole_mllm.common import distributed
from recbole_mllm.common.errors import UserError, as_user_error, did_you_mean
from recbole_mllm.common.progress import warn_once
from recbole_mllm.common.resources import MLLM, PROPERTIES, named, resource
from recbole_mllm.common.settings import (
    Count,
    Positive,
    Range,
    RankingSettings,
    Rule,
    Seed,
    Whole,
    WrongValue,
    check_models,
    checked,
    filters_of,
    known_keys,
    own_types,
)
from recbole_mllm.common.yaml_files import line_of, read_mapping

_OF_A_RUN = "scores are cached for as long as an evaluation runs, so that a killed one resumes"
WITHDRAWN: dict[str, str] = {"score_cache": _OF_A_RUN, "score_cache_mb": _OF_A_RUN}
"""Keys of earlier versions, with why they have no effect: old files and records may hold one, and get one warning."""

# Fields of RecBole's command line, and what its Config keeps beside what it is given
_UNLISTED = {
    "model", "dataset", "config_files", "data_path", "device", "single_spec", "MODEL_TYPE", "eval_type", "local_rank",
}  # fmt: skip
_READ = re.compile(r"""config\[\s*["'](\w+)["']\s*\]|config\.get\(\s*["'](\w+)["']""")
_WITHOUT_FILE = {"Random", MLLM}  # models for which RecBole has no YAML file


def recbole_home() -> Path:
    """Return the folder of the installed RecBole, which is not imported."""
    spec = importlib.util.find_spec("recbole")
    if spec is None or spec.origin is None:
        raise UserError("RecBole is not installed; install it with `pip install --no-deps recbole==1.2.1`")
    return Path(spec.origin).parent


@cache
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
            raise distributed.two_launchers(where)
        if key in WITHDRAWN:
            warn_once(f"{key} is ignored: {WITHDRAWN[key]}")
        else:
            check_known(str(key), every_key(), where, "see properties/ for the keys there are")


def check_known(key: str, known: Iterable[str], where: str, otherwise: str) -> None:
    """Refuse a `key` that is none of `known`, and name the nearest or say what there is `otherwise`."""
    if key not in (known := list(known)):
        raise UserError(f"unknown key {key!r} in {where}; {did_you_mean(key, known, otherwise)}")


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
        _check_key(path, key)
        if key == "benchmark_defaults":
            raise UserError(f"{_at(path, key)}: {key} is not read here; write its keys as they are: they win over it")
        if key == "per_model" and of_dataset:
            raise UserError(f"{_at(path, key)}: {key} is not read here; put it into a file for --config_files")
        if key == "per_model" and value is not None:
            _check_sections(path, value)
    return found


def _check_sections(path: Path, sections: Any) -> None:
    if not isinstance(sections, dict) or not all(isinstance(keys, dict) for keys in sections.values()):
        raise UserError(
            f"{_at(path, 'per_model')}: per_model must hold a model's name, and below it `key: value` lines"
        )
    for model, keys in sections.items():
        if not is_model(str(model)):
            at = _at(path, "per_model", str(model))
            raise UserError(f"{at}: per_model names {str(model)!r}, which is no model{nearest_model(str(model))}")
        for key in keys:
            _check_key(path, "per_model", str(model), str(key), said=f", per_model, {model}")


def _check_key(path: Path, *keys: str, said: str = "") -> None:
    """Refuse the last of nested `keys` as `check_keys` does; its line, for which YAML is parsed, is found only then."""
    if keys[-1] in WITHDRAWN or keys[-1] == "nproc" or keys[-1] not in every_key():
        check_keys(keys[-1:], f"{_at(path, *keys)}{said}")


def _at(path: Path, *keys: str) -> str:
    line = line_of(path, *keys)
    return str(path) if line is None else f"{path}:{line}"


def model_names() -> set[str]:
    """Return the names of RecBole's models and ours."""
    return {path.stem for path in (recbole_home() / "properties" / "model").glob("*.yaml")} | _WITHOUT_FILE


def is_model(name: str) -> bool:
    """Return whether `name` is a model's, in RecBole's own spelling."""
    return name in model_names()


def nearest_model(name: str, others: Iterable[str] = ()) -> str:
    """Return a hint of which model, or which of `others`, `name` may mean, "" where nothing is near."""
    near = did_you_mean(name, sorted({*model_names(), *others} - {name}))
    return f"; {near}" if near else ""


# Values

_LEARNERS = ("adam", "adamw", "sgd", "adagrad", "rmsprop", "sparse_adam")
_WITHOUT_PLACES = ("gauc", "auc", "mae", "rmse", "logloss")
_SHARE = Range(float, least=0)
_NotNegative = Annotated[float, _SHARE]
# Keys within keys that RecBole passes over in silence where it does not know them, and their types
_INNER: dict[str, dict[str, Any]] = {
    "eval_args": {"split": Any, "order": Literal["TO", "RO"], "group_by": Any, "mode": Any},
    "train_neg_sample_args": {
        "distribution": Any, "sample_num": Count, "alpha": _NotNegative, "dynamic": Any, "candidate_num": Whole,
    },
    "clip_grad_norm": {"max_norm": Positive, "norm_type": _NotNegative, "error_if_nonfinite": Any, "foreach": Any},
}  # fmt: skip
_MODE = re.compile(r"full|labeled|(uni|pop)0*[1-9][0-9]*")
_INTERVAL = re.compile(r"\s*[(\[]\s*([^,;\s]+)\s*,\s*([^,;\s]+)\s*[)\]]\s*")


def _are_intervals(value: Any) -> bool:
    """Whether RecBole reads `value` as intervals; it passes over what it cannot read, and so does not filter.

    It reads an unquoted ``[0, 5]``, a list to YAML, as the interval that it looks like (data/dataset/dataset.py:994).
    """
    parts = str(value).split(";") if isinstance(value, str | list | tuple) else [""]
    try:  # no match is an AttributeError
        ends = [tuple(map(float, _INTERVAL.fullmatch(part).groups())) for part in parts]  # type: ignore[union-attr]
    except (AttributeError, ValueError):
        return False
    return all(low <= high for low, high in ends)


def _are_filters(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(one, list) or _are_intervals(one) for one in value.values())


def _are_columns(value: Any) -> bool:
    return isinstance(value, dict) and all(
        columns == "*" or (isinstance(columns, list) and all(isinstance(name, str) for name in columns))
        for columns in value.values()
    )


_EXAMPLE = "such as {inter: [user_id, item_id, timestamp]}"
_Intervals = Annotated[Any, Rule(_are_intervals, "intervals, such as '[5,inf)' or '[0,1];(3,4]'")]
_Filters = Annotated[
    Any,
    Rule(_are_filters, "the intervals of each field, such as {rating: '[3,inf)'}, or the tokens that stay, as a list"),
]
_Columns = Annotated[Any, Rule(_are_columns, f"the columns of each file, {_EXAMPLE}")]
_Loaded = Annotated[
    Any,  # RecBole loads no file that it does not name
    Rule(lambda value: _are_columns(value) and bool(value.get("inter")), f"the columns of inter, at least, {_EXAMPLE}"),
]
_Device = Annotated[
    Any, Rule(lambda value: bool(re.fullmatch(r"cpu|cuda(:[0-9]+)?", str(value))), "cpu, cuda or cuda:N")
]
_Separator = Annotated[Any, Rule(lambda value: isinstance(value, str) and value != "", "a text")]
# RecBole's own keys; it finds out late, or never
_TYPES: dict[str, Any] = {
    "learning_rate": Positive, "weight_decay": _NotNegative, "seed": Seed, "train_batch_size": Count,
    "eval_batch_size": Count, "metrics": str | list[str], "valid_metric": str,
    "rm_dup_inter": Literal["first", "last"] | None, "MAX_ITEM_LIST_LENGTH": Count | None,
    "benchmark_filename": list[str] | None, "checkpoint_dir": str, "data_path": str, "device": _Device | None,
    "topk": Count | list[Count] | None, "val_interval": _Filters | None, "load_col": _Loaded | None,
    "unload_col": _Columns | None,
    **dict.fromkeys((
        "epochs", "stopping_step", "eval_step", "metric_decimal_place", "loss_decimal_place", "worker"), Whole),
    **dict.fromkeys((
        "reproducibility", "show_progress", "use_gpu", "save_dataset", "save_dataloaders", "shuffle", "enable_amp",
        "enable_scaler", "normalize_all", "filter_inter_by_user_or_item"), bool | None),
    **dict.fromkeys((
        "user_inter_num_interval", "item_inter_num_interval", "entity_kg_num_interval", "relation_kg_num_interval"),
        _Intervals | None),
    **dict.fromkeys(("field_separator", "seq_separator"), _Separator | None), "LIST_SUFFIX": str | None,
}  # fmt: skip


def config_path(name: str) -> Path:
    """Return the file that `name` means: a path, or a preset's name.

    Raises:
        UserError: There is neither.
    """
    if Path(name).is_dir():
        raise UserError(f"config file {name!r} is a folder; give a YAML file in it")
    found = Path(name) if Path(name).is_file() else resource("quick_start_config", name.removesuffix(".yaml"))
    if found is None:
        presets = ", ".join(named("quick_start_config"))
        raise UserError(f"config file {name!r} does not exist and is no preset; presets: {presets}")
    return found


def config_paths(names: Sequence[str]) -> list[str]:
    """Return the files of `names` in order, each with keys that exist."""
    paths = [config_path(name) for name in names]
    for path in paths:
        checked_file(path)
    return [str(path) for path in paths]


def per_model(files: Sequence[str], model: str) -> dict[str, Any]:
    """Return the keys that the ``per_model`` sections of `files` set for `model`, as the files in order have them.

    A section wins over the plain keys of its own file and of those before it; a later file's plain key over both.
    """
    found: dict[str, Any] = {}
    for file in files:
        said = checked_file(Path(file))
        own = (said.get("per_model") or {}).get(model, {})
        found = {key: said.get(key, value) for key, value in found.items()} | own
    return found


def keys_for(files: Sequence[str], model: str) -> dict[str, Any]:
    """Return all that `files` say to `model`: plain keys, and those of its sections (see `per_model`)."""
    return {**file_keys(*files), **per_model(files, model)}


def file_keys(*names: str) -> dict[str, Any]:
    """Return the keys and values of config files or presets, a later one winning, without ``per_model`` sections."""
    found = {key: value for name in names for key, value in read_mapping(config_path(name)).items()}
    found.pop("per_model", None)
    return found


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
            raise UserError(f"{error} ({place})") if (place := where(key)) else error from None


def _check_value(key: str, value: Any) -> None:
    if key == "mllm" and value is None:
        return  # not set here; where a run needs it, its settings say so
    if key in _INNER:
        _check_inner(key, value)
    elif hint := _TYPES.get(key) or own_types().get(key):
        checked(key, value, hint)


def _check_inner(name: str, value: Any) -> None:
    """Check the keys within `name`."""
    known = _INNER[name]
    if value is None or value == "None":  # RecBole's words for none at all
        return
    if not isinstance(value, dict):
        raise WrongValue(name, value, f"{{key: value}} pairs; it takes {', '.join(known)}")
    drawn = name != "train_neg_sample_args" or value.get("distribution", "uniform") in ("uniform", "popularity")
    for key, inner in value.items():
        check_known(str(key), known, name, f"it takes {', '.join(known)}")
        if drawn:
            checked(f"{name}.{key}", inner, known[key])
    if name == "eval_args":
        modes = value.get("mode", "full")
        for mode in modes.values() if isinstance(modes, dict) else [modes]:
            if not isinstance(mode, str) or not _MODE.fullmatch(mode):
                wanted = "full, or uniN or popN with a number above 0, such as uni20 (labeled, with labels)"
                raise WrongValue("eval_args.mode", mode, wanted)
        if value.get("split") is not None and not _is_split(value["split"]):
            wanted = (
                "one of {LS: valid_and_test}, {RS: [0.8, 0.1, 0.1]} and {TS: [0.8, 0.1, 0.1]} (LS also valid_only or "
                "test_only; three shares, none below 0)"
            )
            raise WrongValue("eval_args.split", value["split"], wanted)


def _is_split(value: Any) -> bool:
    """Whether RecBole can split so (data/dataset/dataset.py:1835-1871) and its three parts have names."""
    if not isinstance(value, dict) or len(value) != 1:
        return False
    ((kind, how),) = value.items()
    if kind == "LS":
        return how in ("valid_and_test", "valid_only", "test_only")
    shares = how if kind in ("RS", "TS") and isinstance(how, list) else []
    return len(shares) == 3 and all(_SHARE.read(share) is not None for share in shares) and sum(shares) > 0


def check_files(files: Sequence[str | Path], model: str) -> None:
    """Refuse what `check_values` refuses, in what `files` say of `model`; the complaint names file and line."""
    for file in files:
        said = checked_file(Path(file))
        check_values((said.pop("per_model", None) or {}).get(model, {}), partial(_at, Path(file), "per_model", model))
        check_values(said, partial(_at, Path(file)))


def check_dataset_file(path: Path) -> None:
    """Refuse a key or value in a dataset's ``dataset.yaml`` that `check_files` would refuse."""
    check_values(checked_file(path, of_dataset=True), partial(_at, path))


def recbole_config(model: str, dataset: str, files: list[str], keys: dict[str, Any]) -> Any:
    """Return RecBole's Config, to which the command line of this process says nothing.

    Raises:
        UserError: RecBole refuses it, or would pass over a key in silence, or a value is none that a run could use.
    """
    from recbole.utils import ModelType

    check_files(files, model)
    # a text may become a number in RecBole's hands (configurator.py:124-147): it is checked behind them
    check_values({key: value for key, value in keys.items() if not isinstance(value, str)})
    with as_user_error("read the configuration"), _no_arguments():
        config = _config({"model": model, "dataset": dataset, "config_file_list": files}, keys)
    check_values(config.final_config_dict)
    for key in _TYPES.keys() & config.final_config_dict.keys():  # a whole 2.0 is a 2, which alone RecBole can count to
        if isinstance(value := config[key], float | list):
            config[key] = checked(key, value, _TYPES[key])
    if config["MAX_ITEM_LIST_LENGTH"] is None and config["MODEL_TYPE"] == ModelType.SEQUENTIAL:
        raise WrongValue("MAX_ITEM_LIST_LENGTH", None, f"a whole number, at least 1, for {model}")
    if config["benchmark_filename"] and (found := filters_of(config.final_config_dict)):
        raise UserError(
            f"{' and '.join(found)} would do nothing: the split of {dataset} stands in files, whose rows RecBole does "
            "not filter (dataset.py:161); set null, and filter before the split (`convert --k-core`, `--min-rating`)"
        )
    _take_device(config)
    return config


def _take_device(config: Any) -> None:
    """Obey `device` and ``use_gpu: false``, which RecBole passes over (configurator.py:477-492).

    Raises:
        UserError: The device is not there.
    """
    import torch

    given = config.external_config_dict
    if distributed.is_launched() or not (given.get("device") or given.get("use_gpu") is False):
        return
    check_values({"device": given.get("device") or "cpu"})
    wanted = torch.device(str(given.get("device") or "cpu"))
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise WrongValue("device", str(wanted), f"cpu here: torch sees {torch.cuda.device_count()} GPUs")
    config["device"] = wanted


def tell_missing_gpus(config: Any) -> None:
    """Say in the log that GPUs the user has named are not there, where RecBole quietly takes fewer, or the CPU."""
    import torch

    given = config.external_config_dict
    if distributed.is_launched() or given.get("device") or given.get("use_gpu") is False:
        return
    ids = [name for name in str(given.get("gpu_id", "")).split(",") if name.strip()]
    if (seen := torch.cuda.device_count()) < max(len(ids), given.get("use_gpu") is True):
        named = f"gpu_id {','.join(ids)}" if ids else "use_gpu"
        warn_once(f"{named}: torch sees {seen} such GPUs here, so this run is on {config['device']}")


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
        like = [m if m.lower() in _WITHOUT_PLACES else f"{m}@{places[-1]}" for m in config["metrics"] if places]
        raise UserError(
            f"valid_metric: {config['valid_metric']} is not measured (metrics: {', '.join(config['metrics'])}; topk: "
            f"{', '.join(places) or 'none'}); set valid_metric to one of these{f', such as {like[0]}' if like else ''}"
        )
    if str(config["learner"]).lower() not in _LEARNERS:
        raise UserError(f"learner: {config['learner']} is not known; take one of {', '.join(_LEARNERS)}")
    modes = config["eval_args"]["mode"]
    if config["model"] == MLLM:
        check_models(config, recommender=True)
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


def completed(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `defaults`, of which `given` keys win, and of ``eval_args`` each part that is given.

    RecBole would take its own split by shares, in random order, for the parts that are not.
    """
    found, parts = {**defaults, **given}, given.get("eval_args")
    return found | ({"eval_args": {**defaults["eval_args"], **parts}} if isinstance(parts, dict) else {})
