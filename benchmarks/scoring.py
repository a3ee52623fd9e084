"""Scoring pairs: this project's way beside the released code's and a plain batched forward, on one model in one run.

The released way (test_with_llava_sft.py) makes one processor call a pair, generates 30 tokens in batches of six and
reads the first step's scores. The model is a tiny LLaVA-NeXT with random weights and about 740 image tokens an image;
its vocabulary is small, so that the head does not flatter. Ends with one JSON line; keys are users per item.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
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

STYLE = Style.from_mapping("demo", yaml.safe_load((PROPERTIES / "prompt" / "demo.yaml").read_text()))
SETTINGS = Settings.from_config(yaml.safe_load((PROPERTIES / "model" / "MLLMMSR.yaml").read_text()) | {"mllm": "tiny"})


def pairs(folder: Path, items: int, users: int) -> list[Prompt]:
    """Return prompts of `items` images with `users` different preferences each, in no order."""
    out = []
    for n in range(items):
        path = folder / f"{n}.png"
        Image.effect_noise((160 + n, 200), 60 + n).convert("RGB").save(path)
        for user in range(users):
            preference = f"The user prefers colour {user} and pattern {7 * user + n}, " * 5
            out.append(recommend_prompt(STYLE, preference, f"candidate number {n}", path))
    order = torch.randperm(len(out), generator=torch.Generator().manual_seed(0)).tolist()
    return [out[i] for i in order]


def _inputs(mllm: HFModel, prompts: list[Prompt]) -> dict[str, torch.Tensor]:
    """One processor call a batch of pairs, images opened and preprocessed each time."""
    texts = [f"<s>[INST] {p.text} [/INST]" for p in prompts]
    images = [Image.open(p.images[0]) for p in prompts]
    made = mllm.encoder.processor(
        images=images, text=texts, return_tensors="pt", padding=True, add_special_tokens=False
    )
    return dict(made)


@torch.inference_mode()
def released(mllm: HFModel, prompts: list[Prompt], yes: int, no: int) -> torch.Tensor:
    """Generate 30 tokens for batches of six; read Yes and No off the first step's scores."""
    out = []
    for start in range(0, len(prompts), 6):
        step = mllm.model.generate(
            **_inputs(mllm, prompts[start : start + 6]),
            max_new_tokens=30,
            min_new_tokens=30,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        ).scores[0]
        out.append(step[:, yes] - step[:, no])
    return torch.cat(out)


@torch.inference_mode()
def forward(mllm: HFModel, prompts: list[Prompt], yes: int, no: int) -> torch.Tensor:
    """One forward pass for batches of six, all logits."""
    out = []
    for start in range(0, len(prompts), 6):
        logits = mllm.model(**_inputs(mllm, prompts[start : start + 6])).logits[:, -1]
        out.append(logits[:, yes] - logits[:, no])
    return torch.cat(out)


def measure(folder: Path, users: int, items: int) -> dict[str, float]:
    """Time the three ways on the same pairs; CPU seconds, which a busy machine disturbs least."""
    model = folder / "model"
    prompts = pairs(folder, items, users)
    ways = {"released": released, "forward": forward}
    seconds, scores = {}, {}
    for name in ("released", "forward", "ours"):
        mllm = HFModel(str(model), SETTINGS.mllm, torch.device("cpu"))
        answers = mllm.answers(STYLE)
        started = time.process_time()
        if name == "ours":
            scores[name] = mllm.yes_scores(prompts, answers)
        else:
            scores[name] = ways[name](mllm, prompts, answers.yes[0], answers.no[0])
        seconds[name] = time.process_time() - started
    difference = max(float((scores["ours"] - scores[name]).abs().max()) for name in ways)
    print(
        f"{users:>3} users/item, {len(prompts):>3} pairs: ", {k: f"{v:.2f} s" for k, v in seconds.items()}, flush=True
    )
    return {
        "ratio": seconds["released"] / seconds["ours"],
        "forward": seconds["forward"] / seconds["ours"],
        "difference": difference,
    }


def main() -> None:
    """Measure at 1, 2, 5, 21 and 55 users an item."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="four times as many items")
    more = 4 if parser.parse_args().full else 1
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_models.llava_next(folder / "model", layers=4, width=256, tile=96)
        measure(folder, 2, 2)  # a first pass that warms caches and allocators
        plan = {1: 24, 2: 16, 5: 8, 21: 3, 55: 2}
        found = {str(users): measure(folder, users, items * more) for users, items in plan.items()}
    print(
        json.dumps(
            {
                "ratio": {users: round(f["ratio"], 2) for users, f in found.items()},
                "ratio_vs_forward": {users: round(f["forward"], 2) for users, f in found.items()},
                "max_abs_diff": max(f["difference"] for f in found.values()),
            }
        )
    )


if __name__ == "__main__":
    main()
