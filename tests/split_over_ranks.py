"""Splits each family among the processes of a launcher, and compares its scores and gradients with the whole model's.

``torchrun --nproc_per_node N tests/split_over_distributed.py OUT.json [FAMILY …]``, with FSDP asked for.
Each process takes another number of prompts, so that some make passes without any of their own.
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
from launched_runs import held_here
from PIL import Image
from stock_forward import CPU, SETTINGS, STYLE

from recbole_mllm.common import distributed
from recbole_mllm.mllm import scoring
from recbole_mllm.mllm.base import Answer, Batch, Decoding
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.sft import example_loss
from recbole_mllm.mllm.tuning import tune
from recbole_mllm.prompts import Prompt, recommend_prompt

FAMILIES = {build.__name__: build for build in (*tiny_models.FAMILIES, *tiny_models.PAIRS, *tiny_models.TEXT_FAMILIES)}
LABELS = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
LORA = replace(SETTINGS.lora, finetune="lora", lora_dropout=0.0)


def made(folder: Path, *, split: bool, dtype: str = "float32") -> HFModel:
    """Return the model of `folder` with an adapter that does something."""
    mllm = HFModel(str(folder), replace(SETTINGS.mllm, dtype=dtype), CPU, to_split=split)
    mllm.replace_model(tune(mllm.model, LORA, 1))
    torch.manual_seed(1)
    for name, parameter in mllm.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    if split:
        mllm.split()
    return mllm


def asked(mllm: HFModel, picture: Path) -> list[Prompt]:
    """Return prompts with parts in common, fewer for later processes, none for the fourth."""
    image = picture if mllm.encoder.processor is not None else None
    likes = ("likes cats", "likes a very long list of dogs")
    every = [recommend_prompt(STYLE, like, title, image) for like in likes for title in ("the red mug", "socks")]
    every.append(recommend_prompt(STYLE, likes[0], "a hat", None))
    return every[: max(0, 5 - 2 * distributed.process_index())]


def scores(mllm: HFModel, prompts: list[Prompt]) -> torch.Tensor:
    """Return the scores with shared prefixes and without, one below the other."""
    answers = mllm.answers(STYLE)
    return torch.stack([mllm.yes_scores(prompts, answers, share_prefix=share) for share in (True, False)])


def gradients(mllm: HFModel, prompts: list[Prompt]) -> dict[str, torch.Tensor]:
    """Return the loss of the right answers and the adapter's gradients, an example at a time."""
    mllm.model.zero_grad()
    out = {"loss": torch.zeros(())}
    for example in mllm.examples(prompts, LABELS[: len(prompts)], mllm.answers(STYLE)) if prompts else ():
        loss = example_loss(mllm.body, [example], share=False)
        loss.backward()  # type: ignore[no-untyped-call]
        out["loss"] += loss.detach()
    return out | {name: p.grad.clone() for name, p in mllm.model.named_parameters() if p.grad is not None}


def written(mllm: HFModel, prompts: list[Prompt]) -> list[Answer]:
    """Return what the model writes behind each prompt, of lengths of their own, two at a time."""
    mllm.slots, learns = 2, mllm.model.training
    mllm.model.eval()
    work = Batch(prompts, Decoding(6 + 2 * distributed.process_index()))
    mllm.write(work)
    mllm.model.train(learns)
    return [work.answers[place] for place in range(len(prompts))]


def apart(one: dict[str, torch.Tensor], many: dict[str, torch.Tensor]) -> float:
    """Return the largest difference, beside the largest number of each gradient."""
    if one.keys() != many.keys():
        return 1.0
    return max(float((many[n] - g).abs().max() / g.abs().max().clamp(min=1e-3)) for n, g in one.items())


def compared(folder: Path, picture: Path) -> dict[str, Any]:
    """Return how far the split model is from the whole one, and how much of it is here."""
    whole = made(folder, split=False)
    split = made(folder, split=True)
    prompts = asked(whole, picture)
    told: dict[str, Any] = {"prompts": len(prompts), "moved": 0.0, "gradients": 0.0, "scores": 0.0, "written": []}
    for _ in range(2):  # scoring, then learning, then both once more: what splits it learns the order of its layers
        if prompts:
            wanted, found = scores(whole, prompts), scores(split, prompts)
            told["scores"] = max(told["scores"], float((wanted - found).abs().max()))
        distributed.arrive()
        told["written"] += [written(whole, prompts) == (by_parts := written(split, prompts))]
        told["tokens"] = sum(answer.new_tokens for answer in by_parts)
        distributed.arrive()
        one, many = gradients(whole, prompts), gradients(split, prompts)
        distributed.arrive()
        told["gradients"] = max(told["gradients"], apart(one, many))
        told["moved"] = max(0.0, *(float(g.abs().max()) for n, g in one.items() if n != "loss")) if prompts else 1.0
    split.checkpoint_gradients()
    split.model.train()  # layers are computed again in training alone
    told["recomputed"] = apart(one, gradients(split, prompts))
    distributed.arrive()
    told["held"] = sum(held_here(p) for p in split.model.parameters())
    told["whole"] = sum(p.numel() for p in whole.model.parameters())
    return told | {"half": half(folder, prompts)}


def half(folder: Path, prompts: list[Prompt]) -> float:
    """Return how far scores are apart in bfloat16, where both compute the same numbers in the same order."""
    whole, split = made(folder, split=False, dtype="bfloat16"), made(folder, split=True, dtype="bfloat16")
    found = float((scores(whole, prompts) - scores(split, prompts)).abs().max()) if prompts else 0.0
    distributed.arrive()
    return found


if __name__ == "__main__":
    scoring._LEAST_GAIN = 1
    out, names = Path(sys.argv[1]), sys.argv[2:] or list(FAMILIES)
    with TemporaryDirectory() as scratch:
        picture = Path(scratch) / "red.png"
        Image.new("RGB", (40, 30), "red").save(picture)
        folders = {name: FAMILIES[name](Path(scratch) / name) for name in names}  # later, process 0 alone would save
        told = {name: compared(folder, picture) for name, folder in folders.items()}
    every = distributed.gather_objects(told)
    if distributed.is_main():
        out.write_text(json.dumps(every))
    distributed.stop()
