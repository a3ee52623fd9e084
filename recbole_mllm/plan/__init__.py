"""What a run would cost, counted before anything runs: prompts, tokens, FLOPs, bytes, memory, hours (docs/plan.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from recbole_mllm.common.settings import Count as AtLeastOne
from recbole_mllm.common.settings import checked
from recbole_mllm.mllm.generation import READ_TOKENS
from recbole_mllm.model.summarizers import SLOTS
from recbole_mllm.plan.cost import Count, Device, ModelSizes, flops, pass_bytes, training_bytes
from recbole_mllm.plan.counting import (
    CHARACTERS,
    FULL_RANKING,
    LIMIT,
    PlannedRun,
    StandInWriter,
    count_scoring,
    count_summaries,
    count_training,
)
from recbole_mllm.summaries.chains import steps
from recbole_mllm.summaries.preferences import Preferences

_SHOWN = ("prompts", "known", "text_tokens", "image_tokens", "new_tokens", "computed", "images")
_PARTS = ("vision", "projector", "language", "embedding", "head", "parameters")
_ANSWER_BYTES, _SCORE_BYTES = 310, 37  # of an answer's rows in the store beside its text, and of a cached score
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
    writers = count_summaries(run)
    read = Preferences(writers["users"].texts, run.requests, run.setup.items, run.setup.style, run.settings.summary)
    counts = {stage: writer.count for stage, writer in writers.items()} | {"sft": count_training(run, read)}
    phases = ("valid", "test", *([FULL_RANKING] if run.ranks_all else []))
    counts |= {phase: count_scoring(run, read, phase) for phase in phases}
    models = {run.names[stage]: model for stage in counts if (model := run.model(stage)) is not None}
    lora, item = run.settings.lora, run.item_bytes
    slots = run.settings.summary.summarize_batch_size or SLOTS["cpu" if run.device.type == "cpu" else "gpu"]
    stages, memory, fits, seconds = {}, {}, {}, dict[str, float]()
    for stage, count in counts.items():
        operations = dict.fromkeys(("vision", "prompt", "decode", "head", "backward"), 0.0)
        if (model := run.model(stage)) is not None:
            how = {"full": lora.finetune == "full", "checkpointing": run.settings.train.gradient_checkpointing}
            operations = flops(model.sizes, count, run.trained if stage == "sft" else 0, **how)
            if named:
                seconds[stage] = named.seconds(model.sizes, count, operations, item, slots)
            if count.prompts:
                memory[stage] = _memory(run, stage, model.sizes, count, slots)
                # what FSDP can split: nothing of what `full` and `qlora` train
                whole = lora.finetune in ("full", "qlora") and stage not in writers
                split = 0.0 if whole else model.sizes.split_bytes(item)
                fits[stage] = named and named.fits(memory[stage]["total"], split)
        stages[stage] = {
            "model": run.names[stage],
            **{key: round(getattr(count, key)) for key in _SHOWN},
            "longest_prompt": count.longest,
            "flops": operations | {"total": sum(operations.values())},
            "seconds": seconds.get(stage),
            "sampled": count.sampled,
        }
    return {
        "schema": 1,
        "dataset": str(config["dataset"]),
        "models": {
            name: {
                "family": model.sizes.family,
                **{part: getattr(model.sizes, part) for part in _PARTS},
                "trained": run.trained if name == run.names["sft"] else 0,
            }
            for name, model in models.items()
        },
        "stages": stages,
        "sharing": {
            stage: {
                "alone": round(counts[stage].tokens),
                "shared": round(counts[stage].computed),
                "saving": counts[stage].tokens / max(1, counts[stage].computed),
            }
            for stage in counts
            if stage not in writers
        },
        "disk_bytes": _disk(run, writers, counts["test"]),
        "memory_bytes": memory,
        "fits": named and fits,
        "device": named and named.name,
        "bill": named and _bill(run, named, counts, seconds, workers),
        "probe": None,
        "assumptions": _assumptions(run, writers, counts, named, workers),
    }


def _disk(run: PlannedRun, writers: Mapping[str, StandInWriter], test: Count) -> dict[str, float]:
    """Return the bytes of a run's files; the checkpoint holds parameters and AdamW's two moments, in float32."""
    text = {stage: np.mean([len(t.encode()) for t in one.texts.values()] or [0]) for stage, one in writers.items()}
    name, trained = np.char.str_len(run.items).mean(), run.trained
    copies = 2 if trained and run.settings.train.checkpoint_every_steps else 1
    return {
        "store": sum(one.count.prompts * (_ANSWER_BYTES + text[stage]) for stage, one in writers.items()),
        "isum": writers["items"].asked * (text["items"] + name + 2),
        "usum": writers["users"].asked * (text["users"] + name + 22),  # with `seen` and `history`
        "checkpoints": copies * (12.0 * trained + _CHECKPOINT) + (4.0 * trained + _ADAPTER if trained else 0),
        "score_cache": _SCORE_BYTES * test.prompts if run.model("test") is not None else 0,
    }


def _memory(run: PlannedRun, stage: str, sizes: ModelSizes, count: Count, slots: int) -> dict[str, float]:
    """Return the bytes on one device by part."""
    item, train, lora = run.item_bytes, run.settings.train, run.settings.lora
    cache, writes = sizes.cache_bytes(item), stage in ("items", "users")
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
    run: PlannedRun, device: Device, counts: Mapping[str, Count], seconds: Mapping[str, float], workers: int
) -> dict[str, Any]:
    """Return hours by stage over all workers, the whole wall time and the price.

    Work is split evenly; what cannot be: a user's chain is written one state after the other, a step's rows go to no
    more workers than there are rows, and an adapter's gradients travel after each step, in a ring and in float32.
    """
    wall = {stage: spent / workers for stage, spent in seconds.items()}
    settings, users, sft = run.settings, counts["users"], counts["sft"]
    model = run.model("users")
    if model is not None and users.prompts and settings.summary.summary_mode == "recurrent" and workers > 1:
        states = run.requests.states(settings.summary).values()
        chain = users.times(max(len(steps(own, settings.summary)) for own in states) / users.prompts)
        operations = flops(model.sizes, chain)
        wall["users"] = max(wall["users"], device.seconds(model.sizes, chain, operations, run.item_bytes, 1))
    if "sft" in wall:
        rows = int(run.config["train_batch_size"]) * settings.train.gradient_accumulation_steps
        split, batches = min(workers, rows), math.ceil(sft.prompts / rows)
        travelled = batches * 2 * (split - 1) / split * run.trained * 4
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
    run: PlannedRun,
    writers: Mapping[str, StandInWriter],
    counts: Mapping[str, Count],
    device: Device | None,
    workers: int,
) -> list[str]:
    """Return a line for each thing that is assumed."""
    out = []
    for stage, writer in writers.items():
        if writer.count.prompts:
            limit = f"{writer.decoding.max_new_tokens} tokens long, their limit, as none is written"
            length = limit if writer.assumed else "as long as those in the store"
            out.append(f"{stage.removesuffix('s')} summaries not yet written are {length}")
    sampled = ", ".join(stage for stage in counts if counts[stage].sampled)
    served = ", ".join(stage for stage in counts if run.model(stage) is None and counts[stage].prompts)
    ranked = run.ranks_all or "full" in run.config["eval_args"]["mode"].values()
    retrieved = ranked and run.settings.ranking.full_sort != "brute"
    guess = f"{CHARACTERS} characters are a token, and images' tokens are not known; hours depend on the servers"
    holds = {
        f"tokens of {sampled} are those of a sample, scaled by prompts": sampled,
        "every epoch costs what the first does, and none is saved by early stopping": run.epochs > 1,
        "popular items stand for those the retriever will put first; what it costs itself is left out": retrieved,
        "a benchmark ranks all items beside the drawn candidates; a single run does not": run.ranks_all,
        f"{served} ask servers: {guess}": served,
        f"work is split evenly over {workers} devices; loading and validation's metrics are left out": workers > 1,
        "memory of activations is an estimate by formula (docs/plan.md)": run.trained,
    }
    if device:
        peak, bandwidth = device.assumed_share_of_peak, device.assumed_share_of_bandwidth
        out.append(f"{device.name} reaches {peak:.0%} of its peak arithmetic and {bandwidth:.0%} of its bandwidth")
    models = [model for stage in counts if (model := run.model(stage)) is not None]
    for family in sorted({model.sizes.family for model in models if not model.architecture.known}):
        out.append(f"{family} is no family of docs/backbones.md: it is counted without shared prefixes")
    return out + [line for line, true in holds.items() if true]
