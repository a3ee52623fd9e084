"""Spreads each family over pretended cards, and compares scores, texts and gradients with those of one place.

``python tests/spread_over_cards.py OUT.json [FAMILY …]``, in a process of its own, as torch keeps what it is told of
devices.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tiny_models
import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from PIL import Image
from pretend_devices import cards
from stock_forward import CPU, SETTINGS, STYLE

from recbole_mllm.mllm import scoring
from recbole_mllm.mllm.architectures import language_part
from recbole_mllm.mllm.base import Decoding, answers_of
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.sft import example_loss
from recbole_mllm.mllm.tuning import tune
from recbole_mllm.prompts import recommend_prompt

FAMILIES = {build.__name__: build for build in tiny_models.FAMILIES}
LABELS = torch.tensor([1.0, 0.0, 1.0, 0.0])


def spread(model: Any, here: str, there: str) -> None:
    """Put the last two layers of `model` with its norm and head `there`, the rest `here`, as Accelerate does it."""
    name, language = language_part(model)
    layers = max(
        (n for n, m in language.named_modules() if isinstance(m, torch.nn.ModuleList)),
        key=lambda n: len(language.get_submodule(n)),
    )
    way = f"{name}.{layers}".split(".")
    above = {".".join(way[:n]) for n in range(len(way) + 1)}
    found = [n for n, _ in model.named_modules() if n not in above and n.rpartition(".")[0] in above]
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    late = {f"{name}.{layers}.1", f"{name}.{layers}.2", f"{name}.norm", "" if tied else "lm_head"}
    places = {n: there if n in late else here for n in found}
    attach_align_device_hook_on_blocks(
        model, {**places, "": here}, dict.fromkeys(places, False), skip_keys=model._skip_keys_device_placement
    )
    if tied:  # they stay together, as Accelerate keeps them
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    for holder in map(model.get_submodule, above):  # LLaVA-NeXT's `image_newline`
        for key, value in holder.named_parameters(recurse=False):
            holder._parameters[key] = torch.nn.Parameter(value.detach().to(here), requires_grad=value.requires_grad)
    model.hf_device_map = places


def loaded(folder: Path, places: tuple[str, str] | None) -> HFModel:
    """Return the model of `folder`, in one place or in two."""
    made = HFModel(str(folder), SETTINGS.mllm, CPU)
    made.model.set_attn_implementation("eager")  # fused kernels are a device's own
    if places:
        spread(made.model, *places)
        made.replace_model(made.model)
    return made


def gradients(folder: Path, prompts: Any, places: tuple[str, str] | None, finetune: str) -> dict[str, torch.Tensor]:
    """Return the loss and the gradients of a batch, prefixes shared and not."""
    made = loaded(folder, places)
    made.replace_model(tune(made.model, replace(SETTINGS.lora, finetune=finetune, lora_dropout=0.0), 1))  # type: ignore[arg-type]
    made.model.train()
    examples, out = made.examples(prompts, LABELS, made.answers(STYLE)), {}
    for share in (False, True):
        made.model.zero_grad()
        loss = example_loss(made.body, examples, share=share)
        loss.backward()  # type: ignore[no-untyped-call]
        own = {n: p.grad.cpu() for n, p in made.model.named_parameters() if p.grad is not None}
        out |= {f"{share} {n}": g for n, g in own.items()} | {f"{share} loss": loss.detach().cpu()}
    return out


def compared(folder: Path, picture: Path) -> dict[str, Any]:
    """Return how far the model in two places is from itself in one."""
    one = loaded(folder, None)
    image = picture if one.encoder.processor is not None else None
    likes = ("likes cats", "likes a very long list of dogs")
    prompts = [recommend_prompt(STYLE, like, title, image) for like in likes for title in ("the red mug", "socks")]
    answers = one.answers(STYLE)
    two = loaded(folder, ("card:0", "card:1"))
    wanted = one.yes_scores(prompts, answers)
    apart = [(two.yes_scores(prompts, answers, share_prefix=s) - wanted).abs().max().item() for s in (True, False)]
    told: dict[str, Any] = {
        "devices": sorted({str(p.device) for p in two.model.parameters()}),
        "scores": max(apart),
        "texts": answers_of(two, prompts, Decoding(5)) == answers_of(one, prompts, Decoding(5)),
    }
    # gradients flow between a card and the CPU: torch knows of one pretended card alone on the way back
    for finetune in ("lora", "full"):
        own = gradients(folder, prompts, None, finetune)
        most = max(float(gradient.abs().max()) for name, gradient in own.items() if "loss" not in name)
        told["flat"] = told.get("flat", False) or most < 1e-4
        for places in (("card:0", "cpu"), ("cpu", "card:0")):
            found = gradients(folder, prompts, places, finetune)
            apart = [float((found[n] - g).abs().max() / g.abs().max().clamp(min=1e-3)) for n, g in own.items()]
            told[f"{finetune} {places[0]}"] = max(apart) if found.keys() == own.keys() else 1.0
    return told


if __name__ == "__main__":
    scoring._LEAST_GAIN = 1
    with TemporaryDirectory() as name, cards():
        red = Path(name, "red.png")
        Image.new("RGB", (40, 30), "red").save(red)
        chosen = {f: compared(FAMILIES[f](Path(name, f)), red) for f in sys.argv[2:] or FAMILIES}
    Path(sys.argv[1]).write_text(json.dumps(chosen))
