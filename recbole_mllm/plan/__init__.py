"""What a run would cost, counted before anything runs: prompts, tokens, FLOPs, bytes, memory, hours (docs/plan.md)."""

from __future__ import annotations

import math
from typing import Any

import torch

from recbole_mllm.common.settings import Count as AtLeastOne
from recbole_mllm.common.settings import checked
from recbole_mllm.mllm.generation import READ_TOKENS
from recbole_mllm.model.summarizers import SLOTS
from recbole_mllm.plan.cost import Count, Device, flops, pass_bytes, training_bytes
from recbole_mllm.plan.counting import (
    CHARACTERS,
    LIMIT,
    STAGES,
    CountedSummaries,
    PlannedModel,
    PlannedRun,
    count_scoring,
    count_summaries,
    count_training,
)
from recbole_mllm.summaries.preferences import Preferences

SCHEMA = 1
_SHOWN = ("prompts", "known", "text_tokens", "image_tokens", "new_tokens", "computed", "images")
_ANSWER_BYTES, _SCORE_BYTES = 200, 37  # of an answer's row in the store beside its text, and of a cached score
_CHECKPOINT, _ADAPTER = 60_000, 10_000  # bytes of settings in RecBole's checkpoint, and beside PEFT's adapter


def make_plan(
    config: Any, device: str | None = None, nodes: int = 1, devices_per_node: int | None = None, limit: int = LIMIT
) -> dict[str, Any]:
    """Return what a run of `config` would cost; docs/plan.md says what each entry is. Nothing is written.

    Args:
        config: RecBole's Config of the run.
        device: A name in properties/devices.yaml, for which hours are given; None gives none.
        nodes: Over how many nodes of `devices_per_node` each (8, on one node 1) the work is split.
        devices_per_node: See `nodes`.
        limit: Prompts of a stage above which a sample is counted.

    Raises:
        UserError: The configuration, the device or a model is not what it should be.
    """
    for key, value in {"nodes": nodes, "devices_per_node": devices_per_node}.items():
        if value is not None:
            checked(f"--{key}", value, AtLeastOne)
    workers = nodes * (devices_per_node or (8 if nodes > 1 else 1))
    named = Device.called(device) if device else None
    run = PlannedRun(config, torch.device(named.kind) if named else config["device"], limit)
    texts = count_summaries(run)
    read = Preferences(texts["users"].texts, run.requests, run.setup.items, run.setup.style, run.settings.summary)
    counts = {stage: found.count for stage, found in texts.items()} | {"sft": count_training(run, read)}
    counts |= {phase: count_scoring(run, read, phase) for phase in ("valid", "test")}
    models = {stage: model for stage in STAGES if (model := run.model(stage)) is not None}
    slots = run.settings.summary.summarize_batch_size or SLOTS["cpu" if run.device.type == "cpu" else "gpu"]
    lora, item = run.settings.lora, run.item_bytes
    how = {"full": lora.finetune == "full", "checkpointing": run.settings.train.gradient_checkpointing}
    operations = {
        stage: flops(model.sizes, counts[stage], run.trained if stage == "sft" else 0, **how)
        for stage, model in models.items()
    }
    seconds = {
        stage: named.seconds(model.sizes, counts[stage], operations[stage], item, slots)
        for stage, model in models.items()
        if named
    }
    memory = {
        stage: _memory(run, stage, model, counts[stage], slots)
        for stage, model in models.items()
        if counts[stage].prompts
    }
    # what FSDP can split: nothing of what `full` and `qlora` train
    whole = STAGES[2:] if lora.finetune in ("full", "qlora") else ()
    split = {stage: 0.0 if stage in whole else models[stage].sizes.split_bytes(item) for stage in memory}
    none = dict.fromkeys(("vision", "prompt", "decode", "head", "backward"), 0.0)
    return {
        "schema": SCHEMA,
        "dataset": str(config["dataset"]),
        "models": {model.name: _model(run, model) for model in models.values()},
        "stages": {
            stage: {
                "model": run.names[stage],
                **{key: round(getattr(counts[stage], key)) for key in _SHOWN},
                "longest_prompt": counts[stage].longest,
                "flops": (found := operations.get(stage, none)) | {"total": sum(found.values())},
                "seconds": seconds.get(stage),
                "sampled": counts[stage].sampled,
            }
            for stage in STAGES
        },
        "sharing": {
            stage: {
                "alone": round(counts[stage].tokens),
                "shared": round(counts[stage].computed),
                "saving": counts[stage].tokens / max(1, counts[stage].computed),
            }
            for stage in STAGES[2:]
        },
        "disk_bytes": _disk(run, texts, counts["test"]),
        "memory_bytes": memory,
        "fits": named and {stage: named.fits(parts["total"], split[stage]) for stage, parts in memory.items()},
        "device": named and named.name,
        "bill": named and _bill(run, named, counts, seconds, texts["users"].chain, workers),
        "probe": None,
        "assumptions": _assumptions(run, texts, counts, named, workers),
    }


def _model(run: PlannedRun, model: PlannedModel) -> dict[str, Any]:
    parts = {name: getattr(model.sizes, name) for name in ("vision", "projector", "language", "embedding", "head")}
    trained = run.trained if model is run.model("sft") else 0
    return {"family": model.sizes.family, "parameters": model.sizes.parameters, **parts, "trained": trained}


def _disk(run: PlannedRun, texts: dict[str, CountedSummaries], test: Count) -> dict[str, float]:
    """Return the bytes of a run's files; the checkpoint holds parameters and AdamW's two moments, in float32."""
    items, users = texts["items"], texts["users"]
    trained = run.trained
    copies = 2 if trained and run.settings.train.checkpoint_every_steps else 1
    return {
        "store": sum(one.count.prompts * (_ANSWER_BYTES + one.text_bytes) for one in texts.values()),
        "isum": items.asked * (items.text_bytes + items.name_bytes + 2),
        "usum": users.asked * (users.text_bytes + users.name_bytes + 22),  # with `seen` and `history`
        "checkpoints": copies * (12.0 * trained + _CHECKPOINT) + (4.0 * trained + _ADAPTER if trained else 0),
        "score_cache": _SCORE_BYTES * test.prompts if run.model("test") is not None else 0,
    }


def _memory(run: PlannedRun, stage: str, model: PlannedModel, count: Count, slots: int) -> dict[str, float]:
    """Return the bytes on one device by part."""
    sizes, item, train = model.sizes, run.item_bytes, run.settings.train
    lora, cache = run.settings.lora, sizes.cache_bytes(run.item_bytes)
    writes = stage in ("items", "users")
    parts = {"weights": sizes.weight_bytes(item, four_bit=not writes and lora.finetune == "qlora")}
    if writes:
        rows = min(slots, count.prompts)
        parts["generation_cache"] = rows * (count.longest + count.new_tokens / count.prompts) * cache
        parts["activations"] = pass_bytes(sizes, item, min(max(READ_TOKENS, count.longest), rows * count.longest), rows)
    elif stage == "sft":
        rows = min(train.micro_batch_size or int(run.config["train_batch_size"]), count.widest)
        # parameters, gradients and AdamW's two moments, in float32; in place of those a whole model was loaded with
        parts["training_state"] = run.trained * (16.0 - (item if lora.finetune == "full" else 0))
        parts["activations"] = training_bytes(
            sizes, item, lora, count.widest, rows, checkpointing=train.gradient_checkpointing
        )
    else:
        parts |= {"prefix_cache": count.prefix * cache, "batch_cache": count.widest * cache}
        parts["activations"] = pass_bytes(sizes, item, count.at_once)
    return parts | {"total": sum(parts.values())}


def _bill(
    run: PlannedRun, device: Device, counts: dict[str, Count], seconds: dict[str, float], chain: int, workers: int
) -> dict[str, Any]:
    """Return hours by stage over all workers, the whole wall time and the price.

    Work is split evenly; what cannot be: a user's chain is written one state after the other, a step's rows go to no
    more workers than there are rows, and an adapter's gradients travel after each step, in a ring and in float32.
    """
    wall = {stage: spent / workers for stage, spent in seconds.items()}
    if (model := run.model("users")) is not None and workers > 1:
        serial = device.chain_seconds(model.sizes, counts["users"], run.item_bytes, chain)
        wall["users"] = max(wall["users"], serial)
    if "sft" in wall:
        rows = int(run.config["train_batch_size"]) * run.settings.train.gradient_accumulation_steps
        split, steps = min(workers, rows), math.ceil(counts["sft"].prompts / rows)
        travelled = steps * 2 * (split - 1) / split * run.trained * 4
        wall["sft"] = seconds["sft"] / split + travelled / (device.assumed_network_gb_s * 1e9)
    total = sum(wall.values()) / 3600
    return {
        "workers": workers,
        "hours": {stage: spent / 3600 for stage, spent in wall.items()},
        "wall_hours": total,
        "device_hours": total * workers,
        "price": device.price_per_hour and device.price_per_hour * total * workers,
    }


def _assumptions(
    run: PlannedRun, texts: dict[str, CountedSummaries], counts: dict[str, Count], device: Device | None, workers: int
) -> list[str]:
    """Return a line for each thing that is assumed."""
    out = []
    for stage, found in texts.items():
        if found.count.prompts:
            limit = f"{found.writer.decoding.max_new_tokens} tokens long, their limit, as none is written"
            length = limit if found.assumed else "as long as those in the store"
            out.append(f"{stage.removesuffix('s')} summaries not yet written are {length}")
    if sampled := ", ".join(stage for stage in STAGES if counts[stage].sampled):
        out.append(f"tokens of {sampled} are those of a sample, scaled by prompts")
    if run.epochs > 1:
        out.append("every epoch costs what the first does, and none is saved by early stopping")
    if "full" in run.config["eval_args"]["mode"].values() and run.settings.ranking.full_sort != "brute":
        out.append("popular items stand for those the retriever will put first; what it costs itself is left out")
    if served := ", ".join(stage for stage in STAGES if run.model(stage) is None and counts[stage].prompts):
        guess = f"{CHARACTERS} characters are a token, and images' tokens are not known; hours depend on the servers"
        out.append(f"{served} ask servers: {guess}")
    if device:
        peak, bandwidth = device.assumed_share_of_peak, device.assumed_share_of_bandwidth
        out.append(f"{device.name} reaches {peak:.0%} of its peak arithmetic and {bandwidth:.0%} of its bandwidth")
    if workers > 1:
        out.append(f"work is split evenly over {workers} devices; loading and validation's metrics are left out")
    if run.trained:
        out.append("memory of activations is an estimate by formula (docs/plan.md)")
    models = [model for name in dict.fromkeys(STAGES) if (model := run.model(name)) is not None]
    unknown = sorted({model.sizes.family for model in models if not model.body.architecture.known})
    return out + [
        f"{name} is no family of docs/backbones.md: it is counted without shared prefixes" for name in unknown
    ]
