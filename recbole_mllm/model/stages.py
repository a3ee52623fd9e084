"""From RecBole's Config to what the summaries are made of."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from recbole_mllm.data.texts import read_items
from recbole_mllm.endpoints import is_server, parse_endpoint
from recbole_mllm.errors import UserError
from recbole_mllm.mllm import splitting
from recbole_mllm.mllm.base import Writer
from recbole_mllm.mllm.dispatching import check_dispatch
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.loading import TINY, dtype_of, identity_of, source_of
from recbole_mllm.mllm.server import ServerModel
from recbole_mllm.prompts import Style
from recbole_mllm.resources import named, resource
from recbole_mllm.settings import Settings
from recbole_mllm.summaries.prepare import Stage, Summarizers

_NO_TEXT_CHANGE = {"summarize", "summarize_batch_size", "history_titles"}
_SLOTS = {"cpu": 64, "gpu": 256}
_SAMPLING = {"summary_temperature", "summary_top_p", "summary_seed"}


def load_style(settings: Settings) -> Style:
    """Return the wording ``prompt_style`` names; `auto` is what the model knows (tiny) or what the items are.

    Raises:
        UserError: No such style, or it is not complete.
    """
    name = settings.recommend.prompt_style
    if name == "auto":
        name = "demo" if settings.mllm.mllm == TINY else settings.recommend.item_kind
    path = Path(name) if name.endswith((".yaml", ".yml")) else resource("prompt", name)
    if path is None or not path.is_file():
        raise UserError(f"prompt_style {name!r} is unknown; give a YAML file or one of {', '.join(named('prompt'))}")
    return Style.from_mapping(path.stem, yaml.safe_load(path.read_text(encoding="utf-8")))


def make_stage(config: Mapping[str, Any], settings: Settings, device: torch.device) -> Stage:
    """Read titles and images, and say who writes the summaries and under which tag they are exported."""
    check_dispatch(settings.mllm)
    folder = Path(config["data_path"])
    image_dir = settings.recommend.image_dir
    items = read_items(folder, Path(image_dir) if image_dir else None, config["ITEM_ID_FIELD"])
    if not items.images and (settings.recommend.use_image or settings.summary.item_summary in ("image", "fused")):
        raise UserError(
            "no item has an image; give --image_dir, or set use_image: false and item_summary: text to go without"
        )
    style = load_style(settings)
    who = _summarizers(settings, device)
    return Stage(folder, _tag(settings, style, who), style, items, settings.summary, who)


def _summarizers(settings: Settings, device: torch.device) -> Summarizers:
    item = settings.mllm.item_summarizer or settings.mllm.mllm
    user = settings.mllm.user_summarizer or settings.mllm.mllm
    asked = {"item": settings.summary.item_summary != "none", "user": settings.summary.summary_mode != "none"}
    for name, kind in ((item, "item"), (user, "user")):
        if asked[kind] and not is_server(name) and (why := splitting.why_not(name, settings.mllm)):
            logging.getLogger().warning(f"{kind}_summarizer: {why}; only summaries that are there already will do")
    return Summarizers(
        _identity(item, settings, device),
        _identity(user, settings, device),
        partial(_writer, item, "item_summarizer", settings, device),
        partial(_writer, user, "user_summarizer", settings, device),
        *(splitting.wanted() is not None and not is_server(name) for name in (item, user)),
    )


def _identity(name: str, settings: Settings, device: torch.device) -> str:
    if is_server(name):
        quiet = " (no thinking)" if settings.server.server_thinking == "off" else ""
        return parse_endpoint(name, "summarizer").identity + quiet
    dtype = str(dtype_of(settings.mllm.dtype, device)).removeprefix("torch.")
    return f"{identity_of(name, None)}:{dtype}"


def _writer(name: str, key: str, settings: Settings, device: torch.device) -> Writer:
    if is_server(name):
        return ServerModel(parse_endpoint(name, key), settings.server)
    slots = settings.summary.summarize_batch_size or _SLOTS["cpu" if device.type == "cpu" else "gpu"]
    split = splitting.wanted() is not None
    mllm = HFModel(name, settings.mllm, device, slots, to_split=split)
    if split:
        mllm.split()
    return mllm


def _tag(settings: Settings, style: Style, who: Summarizers) -> str:
    """Return a readable name and 8 hex digits of everything that changes the summaries' text."""
    unread = _NO_TEXT_CHANGE if settings.summary.summary_temperature else _NO_TEXT_CHANGE | _SAMPLING
    kept = {key: value for key, value in asdict(settings.summary).items() if key not in unread}
    parts = [kept, asdict(style), who.item_identity, who.user_identity, settings.mllm.max_text_tokens]
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:8]
    writer = settings.mllm.user_summarizer or settings.mllm.mllm
    model = Path(parse_endpoint(writer, "user_summarizer").model if is_server(writer) else source_of(writer)).name
    name = f"{model}-{settings.summary.summary_mode}-b{settings.summary.block_size}-{settings.summary.item_summary}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + f"-{digest}"
