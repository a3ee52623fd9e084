"""Families spread over two devices, which are pretended: scores, texts and gradients are those of one place.

A tensor on the wrong device raises there as on GPUs (see ``tests/pretend_devices.py``). No GPU was at hand for this.
Each family is tried in a process of its own, ``test_family_cards.py OUT.json FAMILY``, as torch keeps what it is told.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
from PIL import Image
from stock_forward import CPU, SETTINGS, STYLE

TESTS = Path(__file__).resolve().parents[1]
FAMILIES = {build.__name__: build for build in tiny_models.FAMILIES}
LABELS = torch.tensor([1.0, 0.0, 1.0, 0.0])


@pytest.mark.slow  # by default tests/pipeline/test_device_map.py has one model in two places
@pytest.mark.parametrize("family", list(FAMILIES))
def test_two_devices_are_one_model(family, tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    words = [sys.executable, __file__, str(tmp_path / "found.json"), family]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.pop("devices") == ["card:0", "card:1"] and found.pop("texts")
    assert not found.pop("flat")
    assert len(found) == 5 and max(found.values()) < 1e-5, found


def spread(model, here, there):
    """Put the last two layers of `model` with its norm and head `there`, the rest `here`, as Accelerate does it."""
    from accelerate.hooks import attach_align_device_hook_on_blocks

    from recbole_mllm.mllm.families import language_part

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


def loaded(folder, places):
    """Return the model of `folder`, in one place or in two."""
    from recbole_mllm.mllm.hf import HFModel

    made = HFModel(str(folder), SETTINGS.mllm, CPU)
    made.model.set_attn_implementation("eager")  # fused kernels are a device's own
    if places:
        spread(made.model, *places)
        made.replace_model(made.model)
    return made


def gradients(folder, prompts, places, finetune):
    """Return the loss and the gradients of a batch, prefixes shared and not."""
    from recbole_mllm.mllm.lora import tune
    from recbole_mllm.mllm.loss import example_loss

    made = loaded(folder, places)
    made.replace_model(tune(made.model, replace(SETTINGS.lora, finetune=finetune, lora_dropout=0.0), 1))
    made.model.train()
    examples, out = made.examples(prompts, LABELS, made.answers(STYLE)), {}
    for share in (False, True):
        made.model.zero_grad()
        loss = example_loss(made.backbone, examples, share=share)
        loss.backward()
        own = {n: p.grad.cpu() for n, p in made.model.named_parameters() if p.grad is not None}
        out |= {f"{share} {n}": g for n, g in own.items()} | {f"{share} loss": loss.detach().cpu()}
    return out


def compared(folder, picture):
    """Return how far the model in two places is from itself in one."""
    from planted_writers import answers_of

    from recbole_mllm.common.prompts import recommend_prompt
    from recbole_mllm.mllm.interface import Decoding

    one, two = loaded(folder, None), loaded(folder, ("card:0", "card:1"))
    image = picture if one.encoder.processor is not None else None
    likes = ("likes cats", "likes a very long list of dogs")
    prompts = [recommend_prompt(STYLE, like, title, image) for like in likes for title in ("the red mug", "socks")]
    answers = one.answers(STYLE)
    wanted = one.yes_scores(prompts, answers)
    apart = [(two.yes_scores(prompts, answers, share_prefix=s) - wanted).abs().max().item() for s in (True, False)]
    told = {
        "devices": sorted({str(p.device) for p in two.model.parameters()}),
        "scores": max(apart),
        "texts": answers_of(two, prompts, Decoding(5)) == answers_of(one, prompts, Decoding(5)),
        "flat": False,
    }
    # gradients flow between a card and the CPU: torch knows of one pretended card alone on the way back
    for finetune in ("lora", "full"):
        own = gradients(folder, prompts, None, finetune)
        told["flat"] |= max(float(gradient.abs().max()) for name, gradient in own.items() if "loss" not in name) < 1e-4
        for places in (("card:0", "cpu"), ("cpu", "card:0")):
            found = gradients(folder, prompts, places, finetune)
            apart = [float((found[n] - g).abs().max() / g.abs().max().clamp(min=1e-3)) for n, g in own.items()]
            told[f"{finetune} {places[0]}"] = max(apart) if found.keys() == own.keys() else 1.0
    return told


if __name__ == "__main__":
    # before what uses torch.inference_mode as a decorator is imported
    from pretend_devices import cards

    from recbole_mllm.mllm import scoring

    scoring.LEAST_GAIN = 1
    out, name = Path(sys.argv[1]), sys.argv[2]
    with cards():
        Image.new("RGB", (40, 30), "red").save(picture := out.with_name("red.png"))
        out.write_text(json.dumps(compared(FAMILIES[name](out.with_name(name)), picture)))
