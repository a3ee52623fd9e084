"""Item features for RecBole's feature models: made once, kept beside the dataset, named in the run's configuration.

They are RecBole's pretrained features (``additional_feat_suffix``, ``preload_weight``): a file ``X.<tag>`` of one
vector an item. A tag is a readable name and a digest of everything that changes the vectors, so all seeds and models
share one file, and another MLLM makes another.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recbole_mllm.data.atomic import read_columns, read_values, write_atomic
from recbole_mllm.data.images import image_digest
from recbole_mllm.data.texts import Items, read_items
from recbole_mllm.errors import UserError
from recbole_mllm.features.vectors import prepared
from recbole_mllm.files import made_once, write_text
from recbole_mllm.mllm.embedding import image_vectors, sentence_vectors, text_vectors
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.loading import dtype_of, identity_of, source_of
from recbole_mllm.model.stages import make_stage, without_refused
from recbole_mllm.resources import PROPERTIES
from recbole_mllm.settings import FeatureSettings, Settings, known_keys
from recbole_mllm.summaries.prepare import export_item_summaries
from recbole_mllm.summaries.shards import opened_store
from recbole_mllm.yamlfile import read_mapping

_EDITION = 1  # of how vectors are made


@dataclass(frozen=True, slots=True)
class Feature:
    """One kind of feature: its file's tag, and what makes ``[items, D]`` vectors and which of them say something."""

    kind: str
    tag: str
    make: Callable[[], tuple[Any, Any]]

    @property
    def columns(self) -> tuple[str, str]:
        """The file's columns: an alias of the item id, by which the models select the feature, and the vector."""
        return f"{self.kind}_id", f"{self.kind}_vector"


def offer_features(config: Any) -> None:
    """Make the features that ``item_features`` of `config` names, unless they are there, and let RecBole load them.

    Raises:
        UserError: The model reads no features, or there is nothing to make them of.
    """
    chosen = FeatureSettings.from_config(config)
    if not chosen.kinds:
        return
    if "selected_features" not in config:
        raise UserError(
            f"{config['model']} reads no item features; set item_features: null, or take SASRecF or GRU4RecF"
        )
    folder = Path(config["data_path"])
    wanted = _items_of(folder, config)
    made = []
    for kind in chosen.kinds:
        started = time.perf_counter()
        made.append(_feature(kind, config, chosen, folder, wanted))
        _ensure(made[-1], folder, wanted, chosen.feature_size, time.perf_counter() - started)
    _name_in(config, made)


def seconds_of(config: Any) -> float | None:
    """Return what making the features that `config` names took, texts included, whichever run made them.

    None where it names none, or where the files of some do not say.
    """
    folder, kinds = Path(config["data_path"]), FeatureSettings.from_config(config).kinds
    told = [_seconds_file(folder / f"{folder.name}.{tag}") for tag in config["additional_feat_suffix"] or []]
    if not kinds or not all(path.is_file() for path in told):
        return None
    try:
        return sum(float(path.read_text(encoding="utf-8")) for path in told)
    except ValueError:  # a file that was cut says as little as none
        return None


def _seconds_file(features: Path) -> Path:
    return features.with_name(f".{features.name}.seconds")


def _name_in(config: Any, made: Sequence[Feature]) -> None:
    """Say in `config` what RecBole reads: the files, their columns, and that the model is to read nothing else."""
    columns = {feature.tag: list(feature.columns) for feature in made}
    config["additional_feat_suffix"] = list(columns)
    if config["load_col"] is not None:
        config["load_col"] = {**config["load_col"], **columns}
    aliases = [name for name in config["alias_of_item_id"] or [] if name not in ("text_id", "image_id")]
    config["alias_of_item_id"] = [*aliases, *(alias for alias, _ in columns.values())]
    config["preload_weight"] = dict(columns.values())
    config["selected_features"] = [alias for alias, _ in columns.values()]


def _items_of(folder: Path, config: Any) -> list[str]:
    """Return the raw ids of all items in the interactions, in the order of their ids."""
    name = str(config["ITEM_ID_FIELD"])
    lists = name + str(config["LIST_SUFFIX"])
    found: set[str] = set()
    for path in sorted(folder.glob(f"{folder.name}*.inter")):
        columns = list(read_columns(path))
        one, many = (columns.index(field) if field in columns else None for field in (name, lists))
        for _, values in read_values(path):
            if one is not None:
                found.add(values[one])
            if many is not None:
                found.update(values[many].split(" "))
    return sorted(found - {""})


def _feature(kind: str, config: Any, chosen: FeatureSettings, folder: Path, wanted: list[str]) -> Feature:
    settings = _settings(config)
    place = settings.recommend.image_dir
    items = read_items(folder, Path(place) if place else None, config["ITEM_ID_FIELD"])
    encoder = chosen.feature_encoder if kind == "text" and chosen.feature_encoder else settings.mllm.mllm
    if kind == "image":
        items = without_refused(items, folder, [encoder], trust_remote_code=settings.mllm.trust_remote_code)
        paths = [items.image(item) for item in wanted]
        if not any(paths):
            raise UserError("no item has an image; give --image_dir, or set item_features: [text]")
        content = [image_digest(path) if path else "" for path in paths]
        return Feature(
            kind, _tag(kind, encoder, settings, chosen, content), lambda: _of_images(paths, config, settings)
        )
    texts = _texts(config, settings, folder, items, wanted)

    def of_texts() -> tuple[Any, Any]:
        if encoder == chosen.feature_encoder:
            trusted = settings.mllm.trust_remote_code
            vectors = sentence_vectors(encoder, texts, config["device"], trust_remote_code=trusted)
        else:
            vectors = text_vectors(_loaded(settings, config), texts)
        return vectors, np.array([bool(text) for text in texts])

    return Feature(kind, _tag(kind, encoder, settings, chosen, texts), of_texts)


def _of_images(paths: list[Path | None], config: Any, settings: Settings) -> tuple[Any, Any]:
    return image_vectors(_loaded(settings, config), paths), np.array([path is not None for path in paths])


def _loaded(settings: Settings, config: Any) -> HFModel:
    return HFModel(settings.mllm.mllm, settings.mllm, config["device"])


def _settings(config: Any) -> Settings:
    """Return MLLMMSR's settings as a run of it would have them here: its own file's, then the dataset's and the user's.

    So both read the same summaries.
    """
    ours = read_mapping(PROPERTIES / "model" / "MLLMMSR.yaml")
    said = config.final_config_dict
    return Settings.from_config({**ours, **{key: said[key] for key in known_keys() if key in said}, "finetune": "none"})


def _texts(config: Any, settings: Settings, folder: Path, items: Items, wanted: list[str]) -> list[str]:
    """Return what is read of each item: its title and, where there are images to tell of, its summary."""
    summaries: dict[str, str] = {}
    if settings.summary.item_summary != "none" and (items.images or settings.summary.item_summary == "text"):
        stage = make_stage({**config.final_config_dict, "data_path": str(folder)}, settings, config["device"])
        with closing(opened_store(folder)) as store:
            summaries = export_item_summaries(stage, store, wanted)
    parts = [(items.title(item), summaries.get(item, "")) for item in wanted]
    return [". ".join(filter(None, pair)) for pair in parts]


def _tag(kind: str, encoder: str, settings: Settings, chosen: FeatureSettings, content: Sequence[str]) -> str:
    dtype = dtype_of(settings.mllm.dtype, _cpu())
    known = [_EDITION, kind, identity_of(encoder, None), str(dtype), settings.mllm.max_text_tokens, chosen.feature_size]
    digest = hashlib.sha256(repr(known).encode())
    for each in content:
        digest.update(each.encode() + b"\0")
    name = re.sub(r"[^a-z0-9]+", "-", Path(source_of(encoder)).name.lower()).strip("-")
    return f"{name}-{kind}-{digest.hexdigest()[:8]}"


def _cpu() -> Any:
    import torch

    return torch.device("cpu")


def _ensure(feature: Feature, folder: Path, wanted: list[str], size: int | None, spent: float) -> None:
    """Make the file unless it is there; whoever comes while it is being made waits.

    Beside it stands what it took: `spent` seconds on what it is made of, and those of the vectors.
    """
    log, path = logging.getLogger(), folder / f"{folder.name}.{feature.tag}"
    missing = 0

    def make(scratch: Path) -> None:
        nonlocal missing
        log.info(f"making {feature.kind} features of {len(wanted)} items")
        begun = time.perf_counter()
        vectors, known = feature.make()
        missing = int((~known).sum())
        vectors = prepared(vectors, known, size)
        write_text(_seconds_file(path), f"{spent + time.perf_counter() - begun:.3f}\n")
        write_features(scratch, feature.columns, wanted, vectors)

    if made_once(path, make):
        lack = f"; {missing} items have no {feature.kind}, zeros stand for it" if missing else ""
        log.info(f"{path}: {len(wanted)} vectors{lack}")


def write_features(path: Path, columns: tuple[str, str], items: Sequence[str], vectors: Any) -> None:
    """Write one vector an item, five digits of each number, as RecBole reads it."""
    rows = ([item, " ".join(f"{value:.5g}" for value in vector)] for item, vector in zip(items, vectors, strict=True))
    write_atomic(path, {columns[0]: "token", columns[1]: "float_seq"}, rows)
