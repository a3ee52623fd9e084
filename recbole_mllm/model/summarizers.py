"""From RecBole's Config to what the summaries are generated from, and the step that generates them."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from recbole_mllm.common import distributed
from recbole_mllm.common.config import check_training
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.model_names import TINY, former_identity, is_server, source_of
from recbole_mllm.common.prompts import Style, read_style, recommend_prompt
from recbole_mllm.common.settings import MODELS, Settings
from recbole_mllm.data.dataloader import check_negatives
from recbole_mllm.data.images import write_report
from recbole_mllm.data.item_table import Items, read_items
from recbole_mllm.mllm import sharding
from recbole_mllm.mllm.generation import ignored_rules, own_rules, with_penalty
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.interface import Writer
from recbole_mllm.mllm.loading import Size, dtype_of, load_images_processor, refused_sizes
from recbole_mllm.mllm.lora import check_finetune
from recbole_mllm.mllm.placement import check_dispatch
from recbole_mllm.mllm.server import ServerModel
from recbole_mllm.mllm.server_messages import query_and_document
from recbole_mllm.mllm.server_scoring import IMAGES_LOST
from recbole_mllm.summaries.controls import controlled, other_images
from recbole_mllm.summaries.generator import Summarizer, SummarySetup, decodings
from recbole_mllm.summaries.preferences import Preferences, refresh
from recbole_mllm.summaries.user_summaries import SummaryRequests

REFUSED = "refused_images.tsv"
_NO_TEXT_CHANGE = {"summarize", "summarize_batch_size", "history_titles", "summary_repetition_penalty", "control"}
SLOTS = {"cpu": 64, "gpu": 256}
_SAMPLING = {"summary_temperature", "summary_top_p", "summary_seed"}


def prepare_summaries(config: Any, dataset: Any) -> Preferences:
    """Generate the summaries that the rows of `dataset` (the training part) read, unless the store has them.

    A step of its own: the result is handed to `MLLMMSR`, which calls this itself where it is given none. All that can
    be refused is, before a summary is paid for or a model is loaded.

    Raises:
        UserError: The configuration cannot be run here, or a summary is missing and may not be generated.
    """
    settings = Settings.from_config(config)
    check_recommender(config, settings, dataset)
    stage = make_summary_setup(config, settings, torch.device(config["device"]))
    return refresh(stage, summary_requests(dataset, settings, config["finetune"]))[0]


def summary_requests(dataset: Any, settings: Settings, finetune: str) -> SummaryRequests:
    """Return which summaries the rows of `dataset` (the training part) read; zero-shot reads none for training rows.

    `finetune` is the configuration's own: `settings` say none where no recommender is named, which may yet be trained.

    Raises:
        UserError: A control finds nothing to put in their place.
    """
    requests = SummaryRequests(dataset.histories, dataset.positions)
    if finetune == "none":
        requests = replace(requests, positions=dataset.evaluated, unread=dataset.positions)
    return controlled(requests, settings.summary)


def check_recommender(config: Any, settings: Settings, dataset: Any) -> None:
    """Refuse what the recommender cannot do here, before anything is trained, generated or loaded.

    Raises:
        UserError: With what to change.
    """
    check_training(config)
    style = load_style(settings)
    if is_server(settings.mllm.mllm) and settings.server.server_scoring == "rerank":
        query_and_document(recommend_prompt(style, "", "", None))
    if settings.lora.finetune != "none":
        check_negatives(config, dataset)
    check_finetune(settings.lora, torch.device(config["device"]))
    check_dispatch(settings.mllm)
    if not is_server(settings.mllm.mllm):
        sharding.check_supported(settings.mllm.source("mllm"), settings.mllm)


def provenance(settings: Settings, device: torch.device) -> dict[str, Any]:
    """Return what a record keeps of the models of a run: weights, precision, wording and decoding."""
    return {
        "weights": {key: settings.mllm.identity(key) for key in MODELS},
        "dtype": str(dtype_of(settings.mllm.dtype, device)).removeprefix("torch."),
        "prompts": asdict(load_style(settings)),
        "decoding": {
            kind: asdict(how) for kind, how in decodings(settings.summary, _summarizers(settings, device)).items()
        },
    }


def load_style(settings: Settings) -> Style:
    """Return the wording ``prompt_style`` names; `auto` is what the model knows (tiny) or what the items are.

    Raises:
        UserError: No such style, or it is not complete.
    """
    name = settings.recommend.prompt_style
    if name == "auto":
        name = "demo" if settings.mllm.mllm == TINY else settings.recommend.item_kind
    return read_style(name)


def make_summary_setup(config: Mapping[str, Any], settings: Settings, device: torch.device) -> SummarySetup:
    """Read titles and images, and find what writes the summaries and under which tag they are exported.

    Raises:
        UserError: A file, a style or a model's name cannot be used.
    """
    check_dispatch(settings.mllm)
    folder = Path(config["data_path"])
    image_dir, use_image = settings.recommend.image_dir, settings.recommend.use_image
    summarizes_images = settings.summary.item_summary in ("image", "fused")
    items = read_items(folder, Path(image_dir) if image_dir else None, config["ITEM_ID_FIELD"])
    keys = ["item_summarizer"] * summarizes_images + ["mllm"] * use_image
    readers = dict.fromkeys(map(settings.mllm.source, keys))
    items = without_refused(items, folder, list(readers), trust_remote_code=settings.mllm.trust_remote_code)
    if not items.images and (use_image or summarizes_images):
        raise UserError(
            "no item has an image; give --image_dir, or set use_image: false and item_summary: text to go without"
        )
    if items.images and use_image and is_server(settings.mllm.mllm) and settings.server.server_scoring == "score":
        raise UserError(IMAGES_LOST)
    if settings.summary.control == "wrong-image":
        items = replace(items, images=other_images(items.images, settings.summary.summary_seed))
    style = load_style(settings)
    summarizers = _summarizers(settings, device)
    tag, item_field = _tag(settings, style, summarizers), str(config["ITEM_ID_FIELD"])
    return SummarySetup(folder, tag, style, items, settings.summary, summarizers, item_field)


def without_refused(items: Items, folder: Path, models: Sequence[str], *, trust_remote_code: bool = False) -> Items:
    """Return `items` without the images that a processor of `models` refuses, however few prompts would show them.

    What a server's model refuses is not known. Refused images count as missing: one line in the log, and a list in
    ``refused_images.tsv``. Only those of odd sizes are checked, and without any no processor is loaded.
    """
    reasons: dict[Size, str] = {}
    for name in (name for name in models if items.extreme and not is_server(name)):
        processor = load_images_processor(name, trust_remote_code=trust_remote_code)
        found = refused_sizes(processor, sorted(set(items.extreme.values()))) if processor is not None else {}
        reasons |= {size: f"is refused by the image processor of {name}: {why}" for size, why in found.items()}
    refused = {item: reasons[size] for item, size in items.extreme.items() if size in reasons}
    if not refused:
        return items
    if distributed.is_main():
        rows = [(item, str(items.images[item]), reason) for item, reason in refused.items()]
        try:
            write_report(folder / REFUSED, rows)
            listed = f"{folder / REFUSED} lists them"
        except OSError as error:
            listed = f"they are not listed, as {folder / REFUSED} cannot be written ({error.strerror})"
        item, image, reason = rows[0]
        logging.getLogger().warning(
            f"{len(rows)} images count as missing, the first of item {item}: {image} {reason}; {listed}"
        )
    return replace(items, images={item: path for item, path in items.images.items() if item not in refused})


def _summarizers(settings: Settings, device: torch.device) -> dict[str, Summarizer]:
    models, own, split = settings.mllm, settings.summary.summary_repetition_penalty, sharding.wanted() is not None
    quiet = " (no thinking)" if settings.server.server_thinking == "off" else ""
    dtype = str(dtype_of(settings.mllm.dtype, device)).removeprefix("torch.")
    found: dict[str, Summarizer] = {}
    for kind, mode in (("item", settings.summary.item_summary), ("user", settings.summary.summary_mode)):
        key, rules, former = f"{kind}_summarizer", "", None
        name, identity = models.source(key), models.identity(key)
        if is_server(name):
            identity += quiet
            rules = with_penalty("", own, served=True)
        else:
            identity += f":{dtype}"
            former = (earlier := former_identity(name)) and f"{earlier}:{dtype}"
            if mode != "none":
                rules = with_penalty(own_rules(name, trust_remote_code=models.trust_remote_code), own)
                try:
                    sharding.check_supported(name, models)
                except UserError as why:
                    logging.getLogger().warning(f"{key}: {why}; only summaries that are there already will do")
        rules = rules if mode != "none" else ""
        load = partial(_writer, key, settings, device)
        limit = None if is_server(name) else models.max_text_tokens
        found[kind] = Summarizer(identity, load, split and not is_server(name), rules, former, limit)
    return found


def _writer(key: str, settings: Settings, device: torch.device) -> Writer:
    name = settings.mllm.source(key)
    if is_server(name):
        return ServerModel(settings.mllm.endpoint(key), settings.server)
    slots = settings.summary.summarize_batch_size or SLOTS["cpu" if device.type == "cpu" else "gpu"]
    split = sharding.wanted() is not None
    mllm = HFModel(name, settings.mllm, device, slots, to_split=split)
    if split:
        mllm.split()
    if left := ignored_rules(mllm.model.generation_config):
        logging.getLogger().warning(f"{key} {name}: its generation_config asks for {left}, which is not followed here")
    return mllm


def _tag(settings: Settings, style: Style, summarizers: Mapping[str, Summarizer]) -> str:
    """Return a readable name and 8 hex digits of everything that changes the summaries' text."""
    unread = _NO_TEXT_CHANGE if settings.summary.summary_temperature else _NO_TEXT_CHANGE | _SAMPLING
    fields = {key: value for key, value in asdict(settings.summary).items() if key not in unread}
    wording = {key: text for key, text in asdict(style).items() if key != "recommend_system"}  # of no summary
    item, user = summarizers["item"], summarizers["user"]
    parts = [fields, wording, item.identity, user.identity, settings.mllm.max_text_tokens]
    if item.rules or user.rules:
        parts.append([item.rules, user.rules])
    control = settings.summary.control if settings.summary.control != "wrong-summary" else None  # no other texts
    parts += [[control, settings.summary.summary_seed]] if control else []
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:8]
    key = "user_summarizer"
    source = settings.mllm.source(key)
    model = Path(settings.mllm.endpoint(key).model if is_server(source) else source_of(source)).name
    name = f"{model}-{settings.summary.summary_mode}-b{settings.summary.block_size}-{settings.summary.item_summary}"
    name += f"-{control}" if control else ""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + f"-{digest}"
