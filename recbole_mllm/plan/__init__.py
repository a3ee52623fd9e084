"""What a run would cost, counted before anything runs: prompts, tokens, FLOPs, bytes, memory, hours (docs/plan.md)."""

from __future__ import annotations

import math
from typing import Any

import torch

from recbole_mllm.common.settings import COUNT
from recbole_mllm.data.schema import ISUM_TYPES, USUM_TYPES
from recbole_mllm.mllm.generation import READ_TOKENS
from recbole_mllm.model.summarizers import SLOTS
from recbole_mllm.plan.cost import Count, Device, activations, backward_flops, fits, flops, pass_bytes
from recbole_mllm.plan.counting import (
    CHARACTERS,
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
LIMIT = 20_000  # prompts of a stage that are all counted; beyond, a sample stands for them
_SHOWN = ("prompts", "known", "text_tokens", "image_tokens", "new_tokens", "computed", "images")
_ANSWER_BYTES, _SCORE_BYTES = 200, 37  # of an answer's row in the store beside its text, and of a cached score
_CHECKPOINT, _ADAPTER_FOLDER = 60_000, 10_000  # bytes of settings in RecBole's checkpoint, and of PEFT's and its README


def make_plan(
    config: Any, device: str | None = None, nodes: int = 1, devices_per_node: int | None = None, limit: int = LIMIT
) -> dict[str, Any]:
    """Return what a run of `config` would cost; docs/plan.md says what each entry is. Nothing is written.

    Args:
        config: RecBole's Config of the run.
        device: A name in properties/devices.yaml, whose hours are told; None tells none.
        nodes: Over how many nodes of `devices_per_node` each (8, on one node 1) the work is split.
        devices_per_node: See `nodes`.
        limit: Prompts of a stage above which a sample is counted.

    Raises:
        UserError: The configuration, the device or a model is not what it should be.
    """
    for key, value in {"nodes": nodes, "devices_per_node": devices_per_node}.items():
        if value is not None:
            COUNT.checked(f"--{key}", value)
    workers = nodes * (devices_per_node or (8 if nodes > 1 else 1))
    named = Device.called(device) if device else None
    run = PlannedRun.of(config, torch.device(named.kind) if named else config["device"], limit)
    items, users = count_summaries(run)
    read = Preferences(users.texts, run.requests, run.setup.items, run.setup.style, run.settings.summary)
    counts = {"items": items.count, "users": users.count, "sft": count_training(run, read)}
    counts |= {phase: count_scoring(run, read, phase) for phase in ("valid", "test")}
    here = {stage: model for stage, model in run.models.items() if model is not None}
    slots = run.settings.summary.summarize_batch_size or SLOTS["cpu" if run.device.type == "cpu" else "gpu"]
    operations = {stage: _operations(run, stage, counts[stage]) for stage in STAGES}
    seconds = {
        stage: named.seconds(model.sizes, counts[stage], operations[stage], run.item_bytes, slots)
        for stage, model in here.items()
        if named
    }
    memory = {
        stage: _memory(run, stage, model, counts[stage], slots)
        for stage, model in here.items()
        if counts[stage].prompts
    }
    return {
        "schema": SCHEMA,
        "dataset": str(config["dataset"]),
        "models": {model.name: _model(run, model) for model in here.values()},
        "stages": {
            stage: {
                "model": run.names[stage],
                **{key: round(getattr(counts[stage], key)) for key in _SHOWN},
                "longest_prompt": counts[stage].longest,
                "flops": operations[stage] | {"total": sum(operations[stage].values())},
                "seconds": seconds.get(stage),
                "sampled": stage in run.sampled,
            }
            for stage in STAGES
        },
        "sharing": {
            stage: {
                "alone": round(one.tokens),
                "shared": round(one.computed),
                "saving": one.tokens / max(1, one.computed),
            }
            for stage, one in list(counts.items())[2:]
        },
        "disk_bytes": _disk(run, items, users, counts),
        "memory_bytes": memory,
        "fits": named and {stage: fits(parts, _split(run, stage), named) for stage, parts in memory.items()},
        "device": named and named.name,
        "bill": named and _bill(run, named, counts, seconds, users.longest_chain, workers),
        "probe": None,
        "assumptions": _assumptions(run, counts, {"item": items.assumed, "user": users.assumed}, named, workers),
    }


def _operations(run: PlannedRun, stage: str, count: Count) -> dict[str, float]:
    if (model := run.models[stage]) is None:
        return dict.fromkeys(("vision", "prompt", "decode", "head", "backward"), 0.0)
    settings, out = run.settings, flops(model.sizes, count)
    if stage == "sft":
        out["backward"] = backward_flops(model.sizes, count, run.trained, settings.lora, settings.train)
    return out


def _model(run: PlannedRun, model: PlannedModel) -> dict[str, Any]:
    sizes = model.sizes
    parts = {name: getattr(sizes, name) for name in ("vision", "projector", "language", "embedding")}
    parts |= {
        "head": sizes.head if sizes.head_is_own else 0,
        "trained": run.trained if model is run.models["sft"] else 0,
    }
    return {"family": sizes.family, "parameters": sizes.parameters} | parts


def _disk(
    run: PlannedRun, items: CountedSummaries, users: CountedSummaries, counts: dict[str, Count]
) -> dict[str, float]:
    """Return the bytes of a run's files; the checkpoint holds parameters and AdamW's two moments, in float32."""
    headers = [
        len("\t".join(f"{name}:{kind}" for name, kind in types.items())) + 1 for types in (ISUM_TYPES, USUM_TYPES)
    ]
    files = [
        header + one.rows * one.row_bytes if one.rows else 0.0
        for header, one in zip(headers, (items, users), strict=True)
    ]
    copies = 1 + bool(run.settings.train.checkpoint_every_steps)
    adapter = 4.0 * run.trained + _ADAPTER_FOLDER if run.trained else 0.0
    return {
        "store": sum(one.count.prompts * (_ANSWER_BYTES + one.text_bytes) for one in (items, users)),
        "isum": files[0],
        "usum": files[1],
        "checkpoints": (copies if run.trained else 1) * (12.0 * run.trained + _CHECKPOINT) + adapter,
        "score_cache": _SCORE_BYTES * counts["test"].prompts if run.models["test"] is not None else 0,
    }


def _memory(run: PlannedRun, stage: str, model: PlannedModel, count: Count, slots: int) -> dict[str, float]:
    """Return the bytes on one device by part."""
    sizes, item, lora, train = model.sizes, run.item_bytes, run.settings.lora, run.settings.train
    writes, cache = stage in ("items", "users"), sizes.cache_bytes(run.item_bytes)
    parts = {"weights": sizes.weight_bytes(item, four_bit=not writes and lora.finetune == "qlora")}
    if writes:
        rows = min(slots, count.prompts)
        read = min(max(READ_TOKENS, count.longest), rows * count.longest)
        parts["generation_cache"] = rows * (count.longest + count.new_tokens / count.prompts) * cache
        parts["activations"] = pass_bytes(sizes, item, read, rows)
    elif stage == "sft":
        rows = train.micro_batch_size or int(run.config["train_batch_size"])
        # parameters, gradients and AdamW's two moments, in float32; in place of those a whole model was loaded with
        parts["training_state"] = run.trained * (16.0 - (item if lora.finetune == "full" else 0))
        parts["activations"] = activations(sizes, item, lora, train, count.widest, min(rows, count.widest))
    else:
        parts |= {"prefix_cache": count.prefix * cache, "batch_cache": count.widest * cache}
        parts["activations"] = pass_bytes(sizes, item, count.at_once)
    return parts | {"total": sum(parts.values())}


def _split(run: PlannedRun, stage: str) -> float:
    """Return the bytes of a stage's model that FSDP can split: nothing of what ``full`` and ``qlora`` train."""
    model, whole = run.models[stage], stage in STAGES[2:] and run.settings.lora.finetune in ("full", "qlora")
    return 0.0 if model is None or whole else model.sizes.split_bytes(run.item_bytes)


def _bill(
    run: PlannedRun, device: Device, counts: dict[str, Count], seconds: dict[str, float], chain: int, workers: int
) -> dict[str, Any]:
    """Return hours by stage over all workers, the whole wall time and the price.

    Work is split evenly; what cannot be: a user's chain is written one state after the other, a step's rows go to no
    more workers than there are rows, and an adapter's gradients travel after each step, in a ring and in float32.
    """
    wall = {stage: spent / workers for stage, spent in seconds.items()}
    if (model := run.models["users"]) is not None and workers > 1:
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
    run: PlannedRun, counts: dict[str, Count], assumed: dict[str, bool], device: Device | None, workers: int
) -> list[str]:
    """Return a line for each thing that is assumed."""
    out, settings = [], run.settings
    for kind, guessed in assumed.items():
        if counts[f"{kind}s"].prompts:
            most = getattr(settings.summary, f"{kind}_summary_tokens")
            long = (
                f"{most} tokens long, their limit, as none is written" if guessed else "as long as those in the store"
            )
            out.append(f"{kind} summaries not yet written are {long}")
    if run.sampled:
        sampled = ", ".join(stage for stage in STAGES if stage in run.sampled)
        out.append(f"tokens of {sampled} are those of a sample, scaled by prompts")
    if run.rounds[0] > 1:
        out.append("every epoch costs what the first does, and none is saved by early stopping")
    if "full" in run.config["eval_args"]["mode"].values() and settings.ranking.full_sort != "brute":
        out.append("popular items stand for those the retriever will put first; what it costs itself is left out")
    if served := ", ".join(stage for stage in STAGES if run.models[stage] is None and counts[stage].prompts):
        guess = f"{CHARACTERS} characters are a token, and images' tokens are not known; hours depend on the servers"
        out.append(f"{served} ask servers: {guess}")
    if device:
        peak, bandwidth = device.assumed_share_of_peak, device.assumed_share_of_bandwidth
        out.append(f"{device.name} reaches {peak:.0%} of its peak arithmetic and {bandwidth:.0%} of its bandwidth")
    if workers > 1:
        out.append(f"work is split evenly over {workers} devices; loading and validation's metrics are left out")
    if run.trained:
        out.append("memory of activations is an estimate by formula (docs/plan.md)")
    models = {model.name: model for model in run.models.values() if model is not None}.values()
    unknown = sorted(model.sizes.family for model in models if not model.body.architecture.known)
    return out + [
        f"{family} is no family of docs/backbones.md: it is counted without shared prefixes" for family in unknown
    ]
