"""A plan: what a run would cost, put together from the counts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from recbole_mllm.data.schema import ISUM_TYPES, USUM_TYPES
from recbole_mllm.mllm.generation import READ_TOKENS
from recbole_mllm.planning.assumptions import assumptions
from recbole_mllm.planning.bill import bill
from recbole_mllm.planning.devices import device as device_called
from recbole_mllm.planning.disk import checkpoint_bytes, score_cache_bytes, store_bytes, table_bytes
from recbole_mllm.planning.fitting import fits, frozen_layers
from recbole_mllm.planning.hours import ByDevice, ByProbe, ByServer, Clock
from recbole_mllm.planning.memory import activations, generation_cache, in_passing, training_state, weights
from recbole_mllm.planning.models import STAGES, Models
from recbole_mllm.planning.pairs import pairs_of
from recbole_mllm.planning.prepared import Prepared, prepare
from recbole_mllm.planning.probe import Probed, probe_summaries
from recbole_mllm.planning.probe_asking import probe_asking
from recbole_mllm.planning.request import Request
from recbole_mllm.planning.stages import Counted, Summaries, asking_of, count, count_summaries

SCHEMA = 1


def make_plan(config: Any, request: Request) -> dict[str, Any]:
    """Return what a run of `config` would cost; docs/plan.md says what each entry is. Nothing is written.

    Raises:
        UserError: The configuration, the device or a model is not what it should be.
    """
    named = device_called(request.device) if request.device else None
    p = prepare(config, torch.device(named.kind) if named else config["device"])
    models = Models(p)
    if (found := models.blueprint("sft")) is not None and p.is_trained and p.settings.train.gradient_checkpointing:
        found.body.head_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    probed = Probed() if request.probe else None
    summaries = _summaries(p, models, probed, request.limit)
    asking = asking_of(p, models, summaries, request.limit)
    if probed and found is not None:
        probe_asking(p, asking, models.name("test"), pairs_of(p, "test"), probed)
    counted = count(p, summaries, asking)
    clock = _clock(request, models, probed)
    memory = _memory(p, models, counted)
    return {
        "schema": SCHEMA,
        "dataset": str(p.config["dataset"]),
        "models": _models(models),
        "stages": {name: _stage(name, counted, clock, request, models) for name in STAGES},
        "sharing": {name: _sharing(counted, name) for name in ("sft", "valid", "test")},
        "disk_bytes": _disk(p, models, counted),
        "memory_bytes": memory,
        "fits": named and fits(memory, _frozen(models), named),
        "device": request.device and named and named.name,
        "bill": bill(p, models, counted, clock, named, request),
        "probe": probed and _probed(probed),
        "assumptions": assumptions(p, models, counted, request, named),
    }


def _summaries(p: Prepared, models: Models, probed: Probed | None, limit: int) -> Summaries:
    """Count the summaries; with a probe, once more where some are missing, on what it has written."""
    found = count_summaries(p, models, {}, limit)
    missing = [name for name, one in (("items", found.items), ("users", found.users)) if one.count.prompts]
    if not probed or not missing:
        return found
    probe_summaries(p, models, probed, stages=missing)
    return count_summaries(p, models, probed.samples, limit)


def _clock(request: Request, models: Models, probed: Probed | None) -> Clock | None:
    if probed:
        return ByProbe(probed.measured, probed.image_s)
    if request.device:
        return ByDevice(device_called(request.device), models.anatomies(), models.item_bytes, models.slots)
    return None


def _stage(name: str, counted: Counted, clock: Clock | None, request: Request, models: Models) -> dict[str, Any]:
    one = counted.counts[name]
    server = models.blueprint(name) is None
    by: Clock | None = ByServer(request.requests_per_s) if server and request.requests_per_s else clock
    if server and not request.requests_per_s:
        by = None
    names = ("prompts", "known", "text_tokens", "image_tokens", "new_tokens", "computed", "images")
    return {
        "model": models.name(name),
        **{key: round(getattr(one, key)) for key in names},
        "longest_prompt": one.longest,
        "flops": {
            "vision": one.vision_flops,
            "prompt": one.prompt_flops,
            "decode": one.decode_flops,
            "head": one.head_flops,
            "backward": one.backward_flops,
            "total": one.flops,
        },
        "seconds": by.seconds(name, one) if by else None,
        "sampled": name in counted.sampled,
    }


def _probed(probed: Probed) -> dict[str, Any]:
    times = {name: asdict(one) for name, one in probed.measured.items()}
    return {"load_s": probed.load_s, "image_s": probed.image_s, "stages": times}


def _models(models: Models) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for stage, anatomy in models.anatomies().items():
        out[models.name(stage)] = {
            "family": anatomy.family,
            "parameters": anatomy.parameters,
            "vision": anatomy.vision.parameters,
            "projector": anatomy.projector.parameters,
            "language": anatomy.language.parameters,
            "embedding": anatomy.embedding,
            "head": anatomy.head if anatomy.head_is_own else 0,
            "trained": models.trained if models.name(stage) == models.name("sft") else 0,
        }
    return out


def _sharing(counted: Counted, name: str) -> dict[str, float]:
    """Return the tokens that pass through the language model without and with shared prefixes."""
    one = counted.counts[name]
    return {"alone": round(one.tokens), "shared": round(one.computed), "saving": one.tokens / max(1.0, one.computed)}


def _disk(p: Prepared, models: Models, counted: Counted) -> dict[str, float]:
    items, users, test = counted.summaries.items, counted.summaries.users, counted.counts["test"]
    who = p.stage.who
    kept = test.prompts + (counted.counts["valid"].prompts if not p.is_trained else 0)
    kept = kept if models.blueprint("test") is not None else 0
    kinds = [
        ("item", who.item_identity, items.answers, items.count.prompts),
        ("user", who.user_identity, users.answers, users.count.prompts),
    ]
    return {
        "store": store_bytes(kinds),
        "isum": table_bytes(ISUM_TYPES, items.rows, items.row_bytes),
        "usum": table_bytes(USUM_TYPES, users.rows, users.row_bytes),
        "checkpoints": checkpoint_bytes(models.trained, newest=bool(p.settings.train.checkpoint_every_steps)),
        "score_cache": score_cache_bytes(kept),
    }


def _frozen(models: Models) -> dict[str, float]:
    lora = models.p.settings.lora
    return {
        name: frozen_layers(name, anatomy, models.precision(name), lora) for name, anatomy in models.anatomies().items()
    }


def _memory(p: Prepared, models: Models, counted: Counted) -> dict[str, dict[str, float]]:
    """Return the bytes on one device by stage and part."""
    out: dict[str, dict[str, float]] = {}
    settings = p.settings
    for name, anatomy in models.anatomies().items():
        one, precision = counted.counts[name], models.precision(name)
        parts = {"weights": weights(anatomy, precision)}
        if name in ("items", "users"):
            new = one.new_tokens / max(1.0, one.prompts)
            rows = min(models.slots, one.prompts)
            parts["generation_cache"] = generation_cache(anatomy, precision, rows, one.longest + new)
            read = min(max(READ_TOKENS, one.longest), rows * one.longest)
            parts["activations"] = in_passing(anatomy, precision, read, rows)
        elif name == "sft":
            parts["training_state"] = training_state(anatomy, precision, settings.lora, models.trained)
            rows = settings.train.micro_batch_size or int(p.config["train_batch_size"])
            parts["activations"] = activations(
                anatomy, precision, settings.lora, settings.train, one.widest, min(rows, one.widest)
            )
        else:
            parts["prefix_cache"] = generation_cache(anatomy, precision, 1, one.prefix)
            parts["batch_cache"] = generation_cache(anatomy, precision, 1, one.widest)
            parts["activations"] = in_passing(anatomy, precision, one.at_once)
        if one.prompts:
            out[name] = parts | {"total": sum(parts.values())}
    return out
