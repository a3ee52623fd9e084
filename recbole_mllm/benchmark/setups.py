"""What a row is: its backbone, wording, summaries and fine-tuning, from the record of a run of any version."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import PurePath
from typing import Any

from recbole_mllm.benchmark.records import RunRecord
from recbole_mllm.common.model_names import PREFIX, TINY
from recbole_mllm.common.resources import MLLM

_FINETUNE = {"lora": "LoRA r={}", "qlora": "QLoRA r={}", "full": "full fine-tuning", "none": "zero-shot"}


@dataclass(frozen=True, slots=True)
class ModelSetup:
    """The models of a row and how they are used; None where the record does not say, or where it is no question.

    Args:
        backbone: Hub id, folder name, or a server's name of the model that ranks or, with `item_features`, that encodes
            what a feature model reads of an item.
        revision: Of the backbone, a commit where one is known.
        item_summarizer: Only where another model than the backbone writes the item summaries; with its revision.
        user_summarizer: The same of the user summaries.
        prompt_style: Name of the wording.
        summary_mode: recurrent, direct or none.
        block_size: Items of a recurrent step.
        finetune: lora, qlora, full or none.
        lora_r: Rank of the adapter.
        text_only: Whether no image was read.
        item_features: What of an item a feature model reads: text, image, or text and image.
    """

    backbone: str
    revision: str | None = None
    item_summarizer: str | None = None
    user_summarizer: str | None = None
    prompt_style: str | None = None
    summary_mode: str | None = None
    block_size: int | None = None
    finetune: str | None = None
    lora_r: int | None = None
    text_only: bool | None = None
    item_features: str | None = None

    @property
    def short(self) -> list[str]:
        """What a paper's table has room for, in words: backbone, fine-tuning, blocks."""
        if self.item_features:
            return [f"{self.item_features} features of {self.backbone}"]
        summaries = {"recurrent": f"blocks of {self.block_size}", "direct": "one summary of the whole history",
                     "none": "no user summary"}  # fmt: skip
        tuned = _FINETUNE.get(self.finetune or "", "").format(self.lora_r)
        return [part for part in (self.backbone, tuned, summaries.get(self.summary_mode or "")) if part]

    @property
    def rest(self) -> list[str]:
        """What `short` leaves out, in words."""
        named = {"prompt style": self.prompt_style, "revision": _shortened(self.revision),
                 "item summaries by": _shortened(self.item_summarizer),
                 "user summaries by": _shortened(self.user_summarizer)}  # fmt: skip
        return ["text only"] * bool(self.text_only) + [f"{name} {value}" for name, value in named.items() if value]

    @property
    def described(self) -> str:
        """All of it in words."""
        return ", ".join([*self.short, *self.rest])

    @property
    def is_tiny(self) -> bool:
        """Whether one of its models is the bundled `tiny`."""
        return TINY in (self.backbone, self.item_summarizer, self.user_summarizer)

    def to_json(self) -> dict[str, Any]:
        """Return every field by name, and the description."""
        return asdict(self) | {"description": self.described}


SETUP = (*(f.name for f in fields(ModelSetup)), "description")
"""Names of what `ModelSetup.to_json` says."""


def setup_of(runs: Iterable[RunRecord]) -> ModelSetup | None:
    """Return what the records of a row say of its models: of a row ``A+B`` the MLLM's, of a plain baseline None."""
    run = max(runs, key=lambda run: "provenance" in run.config)  # an earlier version recorded less
    config = run.config
    if run.fusion:
        config = {**config, **config.get("per_model", {}).get(MLLM, {})}
    recorded = config.get("provenance", {})
    weights = recorded.get("weights", {})
    if run.model != MLLM and config.get("item_features"):
        encoder = config.get("feature_encoder")
        model = _model({"mllm": encoder}, {}, "mllm") if encoder else _model(config, weights, "mllm")
        return ModelSetup(*model, item_features=" and ".join(config["item_features"]))
    if run.model != MLLM or not config.get("mllm"):
        return None
    models = {key: _model(config, weights, key) for key in ("mllm", "item_summarizer", "user_summarizer")}
    mode, summarised = config.get("summary_mode"), config.get("item_summary")
    others = {key: None if models[key] == models["mllm"] else "@".join(filter(None, models[key])) for key in models}
    style = recorded.get("prompts", {}).get("name") or config.get("prompt_style")
    if style == "auto":  # in records of 0.1.0, which keep no prompts
        style = "demo" if config["mllm"] == TINY else config.get("item_kind")
    finetune = "none" if config.get("epochs") == 0 else config.get("finetune")
    return ModelSetup(
        *models["mllm"],
        item_summarizer=others["item_summarizer"] if summarised in ("image", "text", "fused") else None,
        user_summarizer=others["user_summarizer"] if mode in ("recurrent", "direct") else None,
        prompt_style=PurePath(style).name.removesuffix(".yaml") if style else None,
        summary_mode=mode,
        block_size=config.get("block_size") if mode == "recurrent" else None,
        finetune=finetune,
        lora_r=config.get("lora_r") if finetune in ("lora", "qlora") else None,
        text_only=config.get("use_image") is False and summarised in ("text", "none"),
    )


def _shortened(revision: str | None) -> str | None:
    """Return a text with the first eight digits of each commit in it."""
    return revision and re.sub(r"\b([0-9a-f]{8})[0-9a-f]{32}\b", r"\1", revision)


def _model(config: Mapping[str, Any], weights: Mapping[str, str], key: str) -> tuple[str, str | None]:
    """Return the name of the model of `key`, without the folders and hosts of a machine, and its revision if known."""
    known = weights.get(key) or ("" if config.get(key) else weights.get("mllm", ""))
    name = str(config.get(key) or config.get("mllm") or known.partition("#")[0])
    if name.startswith(PREFIX):  # server:MODEL@http://host, server:MODEL@REVISION in `weights`
        known = known or name.partition("://")[0].rpartition("@")[0]
        name, _, revision = known.removeprefix(PREFIX).partition("@")
        return f"{name} (server)", revision or None
    if name == TINY or "#" in known or PurePath(name).is_absolute():  # a folder or file, which has no revision
        return PurePath(name).name, None
    name, _, revision = (known or name).partition("@")
    return name, revision if revision not in ("", "main") else None
