"""Item features for RecBole's feature models: made by an MLLM once, cached beside the dataset, read by a patched layer.

They are RecBole's pretrained features (``additional_feat_suffix``, ``preload_weight``): a file ``X.<tag>`` of one
vector an item. A tag is a readable name and a digest of everything that changes the vectors, so all seeds and models
share one file, and another MLLM makes another.

RecBole 1.2.1's ``FeatureSeqEmbLayer`` cannot read them: a ``float_seq`` feature that is not among
``numerical_features`` is skipped (model/layers.py:923), one that is has all its numbers share one embedding
(data/dataset/dataset.py:804-815), so that nothing but their sum counts, and SASRecF then expects more features than
there are (sasrecf.py:48-55) and stops.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.files import make_once, write_text
from recbole_mllm.common.model_names import TINY, identity_of, pinned, source_of
from recbole_mllm.common.resources import PROPERTIES
from recbole_mllm.common.settings import FeatureSettings, Settings, check_models, known_keys
from recbole_mllm.common.yaml_files import read_mapping
from recbole_mllm.data.atomic import read_columns, read_values, write_atomic
from recbole_mllm.data.images import image_digest
from recbole_mllm.data.item_table import read_items
from recbole_mllm.demo.builtin import is_demo
from recbole_mllm.recbole_patches.hooks import wrap

_EDITION = 1  # of how vectors are made


# ---- the layer that reads them


class ProjectedVectors(nn.Module):
    """Items' `vectors` ``[items, D]``, frozen, behind one trained linear map to `size` dimensions."""

    def __init__(self, vectors: Any, size: int) -> None:
        super().__init__()
        self.vectors: Tensor
        self.register_buffer("vectors", torch.as_tensor(vectors, dtype=torch.float32), persistent=False)
        self.linear = nn.Linear(vectors.shape[1], size, bias=False)

    def forward(self, items: Tensor) -> Tensor:
        """Return ``[..., size]`` of internal item ids ``[...]``."""
        found: Tensor = self.linear(self.vectors[items])
        return found


def read_vectors(layers: ModuleType) -> None:
    """Let every model with a ``FeatureSeqEmbLayer`` read selected features that ``preload_weight`` has vectors for."""

    def make_init(stock: Callable[..., None]) -> Callable[..., None]:
        def __init__(
            self: Any, dataset: Any, embedding_size: int, selected_features: Any, pooling_mode: str, device: Any
        ) -> None:
            loaded = dataset.config["preload_weight"] or {}
            plain = [name for name in selected_features if name not in loaded]
            stock(self, dataset, embedding_size, plain, pooling_mode, device)
            given = [name for name in selected_features if name in loaded]
            self.projected = nn.ModuleList(
                ProjectedVectors(dataset.get_preload_weight(name), embedding_size) for name in given
            ).to(device)

        return __init__

    def make_forward(stock: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: Any, user_idx: Any, item_idx: Tensor) -> Any:
            sparse, dense = stock(self, user_idx, item_idx)
            if getattr(self, "projected", None):
                made = torch.stack([one(item_idx) for one in self.projected], -2)
                before = dense["item"]
                dense["item"] = made if before is None else torch.cat([before, made], -2)
            return sparse, dense

        return forward

    wrap(layers.FeatureSeqEmbLayer, "__init__", make_init)
    wrap(layers.ContextSeqEmbAbstractLayer, "forward", make_forward)


# ---- the vectors


@dataclass(frozen=True, slots=True)
class ItemFeature:
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
    columns: dict[str, tuple[str, str]] = {}
    for kind in chosen.kinds:
        started = time.perf_counter()
        feature = _feature(kind, config, chosen, folder, wanted)
        columns[feature.tag] = feature.columns
        _ensure(feature, folder, wanted, chosen.feature_size, time.perf_counter() - started)
    # the files, their columns, and that the model is to read nothing else
    config["additional_feat_suffix"] = list(columns)
    if config["load_col"] is not None:
        config["load_col"] = {**config["load_col"], **{tag: list(both) for tag, both in columns.items()}}
    aliases = [name for name in config["alias_of_item_id"] or [] if name not in ("text_id", "image_id")]
    config["alias_of_item_id"] = [*aliases, *(alias for alias, _ in columns.values())]
    config["preload_weight"] = dict(columns.values())
    config["selected_features"] = [alias for alias, _ in columns.values()]
    for key, revision in settings_of(config).mllm.revisions().items():
        if revision is not None:
            config[key] = revision  # as the record keeps it


def seconds_of(config: Any) -> float | None:
    """Return what making the features that `config` names took, texts included, whichever run made them.

    None where it names none, or where the files of some do not say.
    """
    folder, kinds = Path(config["data_path"]), FeatureSettings.from_config(config).kinds
    files = [_seconds_file(folder / f"{folder.name}.{tag}") for tag in config["additional_feat_suffix"] or []]
    try:
        return sum(float(path.read_text(encoding="utf-8")) for path in files) if kinds else None
    except (OSError, ValueError):
        return None


def _seconds_file(features: Path) -> Path:
    return features.with_name(f".{features.name}.seconds")


def _items_of(folder: Path, config: Any) -> list[str]:
    """Return the raw ids of all items in the interactions, in the order of their ids."""
    name = str(config["ITEM_ID_FIELD"])
    lists = name + str(config["LIST_SUFFIX"])
    found: set[str] = set()
    for path in sorted(folder.glob(f"{escape(folder.name)}*.inter")):
        columns = list(read_columns(path))
        one, many = (columns.index(field) if field in columns else None for field in (name, lists))
        for _, values in read_values(path):
            if one is not None:
                found.add(values[one])
            if many is not None:
                found.update(values[many].split(" "))
    return sorted(found - {""})


def settings_of(config: Any) -> Settings:
    """Return MLLMMSR's settings as a run of it would have them here: its own file's, then the dataset's and the user's.

    So both read the same summaries.

    Raises:
        UserError: No model is set, or a value is wrong.
    """
    ours = read_mapping(PROPERTIES / "model" / "MLLMMSR.yaml")
    ours["mllm"] = TINY if is_demo(str(config["dataset"])) else None
    said = config.final_config_dict
    keys = {**ours, **{key: said[key] for key in known_keys() if key in said}, "finetune": "none"}
    alone = FeatureSettings.from_config(config).kinds == ("text",) and keys.get("feature_encoder")
    if alone and (keys["item_summarizer"] or keys["item_summary"] == "none"):
        keys["mllm"] = keys["mllm"] or keys["item_summarizer"] or alone  # texts that `mllm` has no part in
    check_models(keys, recommender=True)
    return Settings.from_config(keys)


def _feature(kind: str, config: Any, chosen: FeatureSettings, folder: Path, wanted: list[str]) -> ItemFeature:
    """Return the feature of a `kind` (``text`` or ``image``) of the `wanted` raw ids, in their order."""
    from recbole_mllm.mllm import embedding  # here, as whoever reads no features waits for no transformers
    from recbole_mllm.mllm.hf import HFModel
    from recbole_mllm.model.summarizers import make_summary_setup, without_refused
    from recbole_mllm.summaries.generator import item_generator
    from recbole_mllm.summaries.preferences import export_item_summaries
    from recbole_mllm.summaries.store import opened_store

    settings, device = settings_of(config), config["device"]
    mllm = settings.mllm.source("mllm")
    place, trusted = settings.recommend.image_dir, settings.mllm.trust_remote_code
    items = read_items(folder, Path(place) if place else None, config["ITEM_ID_FIELD"])

    def loaded() -> HFModel:
        return HFModel(mllm, settings.mllm, device)

    if kind == "image":
        items = without_refused(items, folder, [mllm], trust_remote_code=trusted)
        paths = [items.image(item) for item in wanted]
        if not any(paths):
            raise UserError("no item has an image; give --image_dir, or set item_features: [text]")
        tag = _tag(kind, mllm, settings, chosen, [image_digest(path) if path else "" for path in paths])
        known = np.array([path is not None for path in paths])
        return ItemFeature(kind, tag, lambda: (embedding.image_vectors(loaded(), paths), known))
    summaries: dict[str, str] = {}
    if settings.summary.item_summary != "none" and (items.images or settings.summary.item_summary == "text"):
        setup = make_summary_setup({**config.final_config_dict, "data_path": str(folder)}, settings, device)
        with closing(opened_store(folder)) as store:
            summaries = export_item_summaries(setup, item_generator(setup, store), store, wanted)
    texts = [". ".join(filter(None, (items.title(item), summaries.get(item, "")))) for item in wanted]
    encoder = chosen.feature_encoder and pinned(chosen.feature_encoder)

    def of_texts() -> tuple[Any, Any]:
        known = np.array([bool(text) for text in texts])
        if encoder:
            return embedding.sentence_vectors(encoder, texts, device, trust_remote_code=trusted), known
        return embedding.text_vectors(loaded(), texts), known

    return ItemFeature(kind, _tag(kind, encoder or mllm, settings, chosen, texts), of_texts)


def _tag(kind: str, encoder: str, settings: Settings, chosen: FeatureSettings, content: Sequence[str]) -> str:
    from recbole_mllm.mllm.loading import dtype_of

    dtype = dtype_of(settings.mllm.dtype, torch.device("cpu"))
    known = [_EDITION, kind, identity_of(encoder), str(dtype), settings.mllm.max_text_tokens, chosen.feature_size]
    digest = hashlib.sha256(repr(known).encode())
    for each in content:
        digest.update(each.encode() + b"\0")
    name = re.sub(r"[^a-z0-9]+", "-", Path(source_of(encoder)).name.lower()).strip("-")
    return f"{name}-{kind}-{digest.hexdigest()[:8]}"


def _ensure(feature: ItemFeature, folder: Path, wanted: list[str], size: int | None, spent: float) -> None:
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
        vectors = scaled_vectors(vectors, known, size)
        write_text(_seconds_file(path), f"{spent + time.perf_counter() - begun:.3f}\n")
        # five digits of each number, as RecBole reads it
        rows = ([item, " ".join(f"{n:.5g}" for n in vector)] for item, vector in zip(wanted, vectors, strict=True))
        write_atomic(scratch, dict(zip(feature.columns, ("token", "float_seq"), strict=True)), rows)

    if make_once(path, make):
        lack = f"; {missing} items have no {feature.kind}, zeros stand for it" if missing else ""
        log.info(f"{path}: {len(wanted)} vectors{lack}")


def scaled_vectors(vectors: Any, known: Any, size: int | None) -> Any:
    """Return ``[N, D']`` float64, of the `known` rows centred, cut to `size` directions and of unit variance together.

    Hidden states of language models share a large mean, and a few directions dwarf the rest: as they are, all items
    look alike to a linear layer. The directions are the first principal ones; all other rows are zeros, which is the
    mean.

    Args:
        vectors: ``[N, D]``.
        known: ``[N]`` which rows say something.
        size: How many directions are kept; None keeps all, as they are.
    """
    out = np.asarray(vectors, float)
    centred = np.where(known[:, None], out - out[known].mean(0) if known.any() else out, 0.0)
    if size is not None and centred.shape[1] > size:
        directions = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :size]
        largest = directions[np.abs(directions).argmax(0), np.arange(size)]
        centred = centred @ (directions * np.sign(largest))  # the same on every machine
    spread = np.sqrt((centred[known] ** 2).mean()) if known.any() else 0.0
    return centred / spread if spread > 0 else centred
