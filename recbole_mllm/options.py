"""What every command is given, and the configuration that it makes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from recbole_mllm.errors import UserError

OURS = "MLLMMSR"


@dataclass(frozen=True, slots=True)
class Options:
    """What every command takes: configuration keys, config files or presets, a seed.

    Of a benchmark also whether its report shows images, and whether its baselines train for a few epochs alone.
    """

    overrides: Mapping[str, Any] = field(default_factory=dict)
    config_files: tuple[str, ...] = ()
    seed: int | None = None
    embed_images: bool = True
    quick: bool = False

    def keys(self) -> dict[str, Any]:
        """Return the overrides with the seed among them."""
        return {**self.overrides, **({"seed": self.seed} if self.seed is not None else {})}


def config_of(model: str, dataset: str, options: Options) -> Any:
    """Return RecBole's Config of one run, with the process's own arguments out of its sight.

    Raises:
        UserError: A key, a value, the model or the dataset is not what it should be; nothing has run yet.
    """
    from recbole_mllm.config import check_keys, config_paths
    from recbole_mllm.quick_start import make_config
    from recbole_mllm.settings import EvaluationSettings, Settings

    check_keys(options.overrides, "the command line")
    sys.argv = sys.argv[:1]
    files = config_paths(with_preset(dataset, options.config_files))
    try:
        config = make_config(model, dataset, files, {"frozen_candidates": True, **options.keys()})
    except ValueError as error:  # RecBole's word for a model, mode or metric it does not know
        raise UserError(f"{error}".strip().replace("\n", " ") + _nearest_model(model)) from error
    EvaluationSettings.from_config(config)
    if model == OURS:
        Settings.from_config(config)
    _check_dataset(Path(config["data_path"]), config)
    return config


def _nearest_model(name: str) -> str:
    """Return a hint where RecBole has no model `name`; its models are the files of its properties/model."""
    import recbole

    from recbole_mllm.benchmark.field import SETS

    files = (Path(recbole.__file__).parent / "properties" / "model").glob("*.yaml")
    names = sorted({path.stem for path in files} | {"Random", "MLLMMSR", "TALLRec", *SETS})
    small = {known.lower(): known for known in names}
    near = get_close_matches(name.lower(), small, n=1, cutoff=0.5)
    return f" Did you mean {small[near[0]]}?" if near and name not in names else ""


def _check_dataset(folder: Path, config: Any) -> None:
    """Refuse a dataset that is not there; one that RecBole knows how to download is RecBole's business."""
    import recbole

    urls = yaml.safe_load((Path(recbole.__file__).parent / "properties" / "dataset" / "url.yaml").read_text())
    if folder.is_dir() or config["dataset"] in urls:
        return
    near = sorted(path.name for path in folder.parent.glob("*") if path.is_dir() and not path.name.startswith("."))
    there = f"there are {', '.join(near)}" if near else "there is none yet"
    raise UserError(
        f"no dataset {folder.name!r} in {folder.parent} ({there}); give its folder's name, or --data_path=DIR"
    )


def with_preset(dataset: str, files: tuple[str, ...]) -> list[str]:
    """Return `files` behind the preset of a built-in dataset, whose settings they may change."""
    from recbole_mllm.demo.builtin import preset_of

    preset = preset_of(dataset)
    return [*([preset] if preset and preset not in files else []), *files]
