"""Vectors of texts and images from a model as it is, without training: what feature baselines are fed with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from recbole_mllm.common.errors import UserError, first_line
from recbole_mllm.common.model_names import revision_of, source_of
from recbole_mllm.common.progress import Progress
from recbole_mllm.mllm.encoder import Encoded
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.loading import dtype_of

_BATCH = 64


@torch.inference_mode()
def text_vectors(model: HFModel, texts: Sequence[str]) -> Any:
    """Return ``[N, D]`` float32: the mean of the language model's last hidden states over each text's tokens.

    A batch holds texts of one length alone, so no vector depends on the company it was made in; "" gives zeros.
    """
    ids = [model.encoder.text_ids(text) if text else [] for text in texts]
    by_length: dict[int, list[int]] = defaultdict(list)
    for place, tokens in enumerate(ids):
        by_length[len(tokens)].append(place)
    made: dict[int, Any] = {}
    with Progress(len(texts), "reading texts", "text") as progress:
        progress.update(len(by_length.pop(0, [])))
        for length in sorted(by_length):
            for low in range(0, len(by_length[length]), _BATCH):
                places = by_length[length][low : low + _BATCH]
                rows = [Encoded(tuple(ids[place])) for place in places]
                states = model.backbone.hidden(rows, 0, [length] * len(rows), None)
                made |= zip(places, states.float().mean(1).cpu().numpy(), strict=True)
                progress.update(len(places))
    return _stacked(made, len(texts))


@torch.inference_mode()
def image_vectors(model: HFModel, paths: Sequence[Path | None]) -> Any:
    """Return ``[N, D]`` float32: the mean of the vision tower's features, as the language model reads them.

    One image at a time, so no vector depends on another; None gives zeros.

    Raises:
        UserError: The model reads no images.
    """
    if model.encoder.processor is None:
        raise UserError("image features need a model that reads images; set mllm, or item_features: [text]")
    made: dict[int, Any] = {}
    with Progress(len(paths), "reading images", "image") as progress:
        for place, path in enumerate(paths):
            if path is not None:
                (found,) = model.backbone.features([model.encoder.image(path)])
                made[place] = _tokens(found.pooler_output).float().mean(0).cpu().numpy()
                model.backbone.forget_features()
            progress.update(1)
    return _stacked(made, len(paths))


@torch.inference_mode()
def sentence_vectors(name: str, texts: Sequence[str], device: torch.device, *, trust_remote_code: bool = False) -> Any:
    """Return ``[N, D]`` float32 of a sentence encoder: the mean of its last hidden states over each text's tokens.

    Raises:
        UserError: No such model can be had.
    """
    source, dtype = source_of(name), dtype_of("auto", device)
    options = {"trust_remote_code": trust_remote_code, "revision": revision_of(name)}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = AutoModel.from_pretrained(source, dtype=dtype, **options).eval().to(device)
    except (ImportError, OSError, ValueError) as error:
        raise UserError(
            f"feature_encoder {name!r} cannot be loaded: {first_line(error)}; give a hub id or a folder"
        ) from error
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or 512)
    made: dict[int, Any] = {}
    with Progress(len(texts), "reading texts", "text") as progress:
        for place, text in enumerate(texts):
            if text:
                batch = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt").to(device)
                made[place] = model(**batch).last_hidden_state[0].float().mean(0).cpu().numpy()
            progress.update(1)
    return _stacked(made, len(texts))


def _tokens(features: Any) -> Tensor:
    parts = [features] if isinstance(features, Tensor) else list(features)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def _stacked(made: dict[int, Any], count: int) -> Any:
    width = len(next(iter(made.values()))) if made else 1
    out = np.zeros((count, width), np.float32)
    for place, vector in made.items():
        out[place] = vector
    return out
