"""A step of LoRA fine-tuning: this project's way beside the plain one, on the same examples of one model in one run.

The plain way takes padded batches through the processor, so that images are opened and the vision tower runs at every
step, labels the answer alone, and computes the logits of every token. The model is a tiny LLaVA-NeXT with random
weights and about 740 image tokens an image; its vocabulary is small, so that the head does not flatter. LoRA dropout is
0, so that both ways have one gradient. Ends with one JSON line; keys are users per item.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny_models
import torch
import yaml
from PIL import Image

from recbole_mllm.common.prompts import Prompt, Style, recommend_prompt
from recbole_mllm.common.resources import PROPERTIES
from recbole_mllm.common.settings import Settings
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.lora import adapt
from recbole_mllm.mllm.loss import example_loss, micro_batches

STYLE = Style.from_mapping("demo", yaml.safe_load((PROPERTIES / "prompt" / "demo.yaml").read_text()))
SETTINGS = Settings.from_config(yaml.safe_load((PROPERTIES / "model" / "MLLMMSR.yaml").read_text()) | {"mllm": "tiny"})
STEPS = 2  # the second shows what is kept from the first


def pairs(folder: Path, items: int, users: int) -> tuple[list[Prompt], torch.Tensor]:
    """Return prompts of `items` images with `users` different preferences each, in no order, and labels."""
    out = []
    for n in range(items):
        path = folder / f"{n}.png"
        Image.effect_noise((160 + n, 200), 60 + n).convert("RGB").save(path)
        for user in range(users):
            preference = f"The user prefers colour {user} and pattern {7 * user + n}, " * (4 + user % 3)
            out.append(recommend_prompt(STYLE, preference, f"candidate number {n}", path))
    order = torch.randperm(len(out), generator=torch.Generator().manual_seed(0)).tolist()
    return [out[i] for i in order], torch.tensor([float(i % 2) for i in order])


def plain(mllm: HFModel, prompts: list[Prompt], labels: torch.Tensor, size: int) -> None:
    """Add up the gradients of one batch, `size` padded rows a forward pass."""
    processor = mllm.encoder.processor
    for start in range(0, len(prompts), size):
        part, truth = prompts[start : start + size], labels[start : start + size].tolist()
        answers = [f" {STYLE.answer_yes if y else STYLE.answer_no}</s>" for y in truth]
        batch = processor(
            images=[Image.open(p.images[0]) for p in part],
            text=[f"<s>[INST] {p.text} [/INST]{a}" for p, a in zip(part, answers, strict=True)],
            return_tensors="pt",
            padding=True,
            add_special_tokens=False,
        )
        wanted = torch.full_like(batch["input_ids"], -100)
        for row, answer in enumerate(answers):
            length = len(processor.tokenizer(answer, add_special_tokens=False)["input_ids"])
            wanted[row, -length:] = batch["input_ids"][row, -length:]  # padded on the left
        (mllm.model(**batch, labels=wanted).loss * (len(part) / len(prompts))).backward()


def ours(mllm: HFModel, prompts: list[Prompt], labels: torch.Tensor, size: int) -> None:
    """Add up the gradients of one batch as the trainer does."""
    examples = mllm.examples(prompts, labels, mllm.answers(STYLE))
    for part in micro_batches(mllm.backbone, examples, size, share=True):
        loss = example_loss(mllm.backbone, [examples[i] for i in part], share=True)
        (loss * (len(part) / len(examples))).backward()


def measure(model: Path, users: int, items: int, size: int) -> dict[str, float]:
    """Time both ways on the same batch; CPU seconds, which a busy machine disturbs least."""
    prompts, labels = pairs(model.parent, items, users)
    seconds, gradients = {}, {}
    for name, way in (("plain", plain), ("ours", ours)):
        mllm = HFModel(str(model), SETTINGS.mllm, torch.device("cpu"))
        mllm.replace_model(adapt(mllm.model, replace(SETTINGS.lora, lora_dropout=0.0), seed=1))
        trained = [p for p in mllm.model.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(2)
        for parameter in trained:  # a fresh adapter's gradients are half zero
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
        mllm.model.train()
        started = time.process_time()
        for _ in range(STEPS):
            mllm.model.zero_grad()
            way(mllm, prompts, labels, size)
        seconds[name] = time.process_time() - started
        gradients[name] = torch.cat([p.grad.flatten() for p in trained])
    difference = float((gradients["ours"] - gradients["plain"]).norm() / gradients["plain"].norm())
    each = {k: f"{v / STEPS / len(prompts) * 1000:.0f} ms" for k, v in seconds.items()}
    print(f"{users:>3} users/item, {len(prompts):>3} examples, an example: ", each, flush=True)
    return {"ratio": seconds["plain"] / seconds["ours"], "difference": difference}


def main() -> None:
    """Measure at 6 users an item; ``--full`` also at 1, 2 and 12, and on four times as many items."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true")
    full = parser.parse_args().full
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        model = tiny_models.llava_next(Path(name) / "model", layers=4, width=256, tile=96)
        measure(model, 2, 1, 2)  # a first pass that warms caches and allocators
        plan = {1: 96, 2: 48, 6: 16, 12: 8} if full else {6: 4}
        found = {str(users): measure(model, users, items, 6) for users, items in plan.items()}
    ratio = {users: round(f["ratio"], 2) for users, f in found.items()}
    print(json.dumps({"ratio": ratio, "grad_rel_diff": max(f["difference"] for f in found.values())}))


if __name__ == "__main__":
    main()
