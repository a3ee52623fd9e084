"""The yardstick for a GPU: scoring and fine-tuning a model of real size beside the usual way, on one device in one run.

Random weights of a geometry are made on the device, so nothing is fetched. Printed, and at last as one JSON line: pairs
and prompt tokens a second, the share of the device's own matrix-multiplication rate (measured here, on large matrices)
that the computed FLOPs make, peak memory, and the largest batch that fits. Without a GPU a tiny geometry runs on the
CPU, which shows that the script works and nothing else.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import torch
from gpu_model import GEOMETRIES, build
from scoring import SETTINGS, STYLE, pairs
from torch.utils.flop_counter import FlopCounterMode

from recbole_mllm.common.prompts import Prompt
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.lora import adapt
from recbole_mllm.mllm.loss import example_loss, micro_batches
from recbole_mllm.mllm.memory import out_of_memory

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def peak_rate(dtype: torch.dtype) -> float:
    """Return the FLOP/s of one large matrix multiplication, the best of five."""
    side, best = (8192 if GPU else 1024), 0.0
    a, b = (torch.randn(side, side, device=DEVICE, dtype=dtype) for _ in range(2))
    for _ in range(5):
        best = max(best, 10 * 2 * side**3 / timed(lambda: [a @ b for _ in range(10)]))
    return best


def timed(run: Callable[[], Any]) -> float:
    """Return the wall seconds of `run`, the device's work included."""
    if GPU:
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def usual_inputs(mllm: HFModel, prompts: list[Prompt]) -> dict[str, Any]:
    """One processor call a batch, images opened and preprocessed each time, as the released code does."""
    from PIL import Image

    made = mllm.encoder.processor(
        images=[Image.open(p.images[0]) for p in prompts],
        text=[f"<s>[INST] {p.text} [/INST]" for p in prompts],
        return_tensors="pt",
        padding=True,
        add_special_tokens=False,
    )
    dtype = mllm.model.dtype
    return {k: v.to(DEVICE, dtype) if v.is_floating_point() else v.to(DEVICE) for k, v in made.items()}


@torch.inference_mode()
def usual_scoring(mllm: HFModel, prompts: list[Prompt], size: int) -> None:
    """Generate 30 tokens for batches of `size`; the first step's scores are what is wanted."""
    for start in range(0, len(prompts), size):
        inputs = usual_inputs(mllm, prompts[start : start + size])
        mllm.model.generate(**inputs, max_new_tokens=30, min_new_tokens=30, do_sample=False, pad_token_id=0)


def usual_training(mllm: HFModel, prompts: list[Prompt], size: int) -> None:
    """Batches of `size` with the loss on all tokens and all their logits."""
    for start in range(0, len(prompts), size):
        inputs = usual_inputs(mllm, prompts[start : start + size])
        mllm.model(**inputs, labels=inputs["input_ids"]).loss.backward()


def our_scoring(mllm: HFModel, prompts: list[Prompt], size: int) -> None:
    mllm.backbone.budget.size = size
    mllm.backbone.forget_features()
    mllm.yes_scores(prompts, mllm.answers(STYLE))


def our_training(mllm: HFModel, prompts: list[Prompt], size: int) -> None:
    mllm.backbone.forget_features()
    labels = torch.tensor([float(i % 2) for i in range(len(prompts))])
    examples = mllm.examples(prompts, labels, mllm.answers(STYLE))
    for part in micro_batches(mllm.backbone, examples, size, share=True):
        example_loss(mllm.backbone, [examples[i] for i in part], share=True).backward()


def measure(way: Callable[..., None], mllm: HFModel, prompts: list[Prompt], size: int, peak: float) -> dict[str, float]:
    """Run `way` three times: to warm up, to be timed, and to have its FLOPs counted."""
    tokens = sum(len(e.ids) for e in mllm.encode(prompts))
    way(mllm, prompts, size)
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(lambda: way(mllm, prompts, size))
    memory = torch.cuda.max_memory_allocated() / 2**30 if GPU else 0.0
    with FlopCounterMode(display=False) as counted:
        way(mllm, prompts, size)
    rate = counted.get_total_flops() / seconds
    mllm.model.zero_grad()
    found = {"pairs_per_s": len(prompts) / seconds, "tokens_per_s": tokens / seconds, "share_of_peak": rate / peak}
    return {k: round(v, 3) for k, v in (found | {"peak_gib": memory, "size": size}).items()}


def largest(way: Callable[..., None], mllm: HFModel, prompts: list[Prompt], sizes: list[int]) -> int | None:
    """Return the largest of `sizes` that fits, of rows or of cached tokens; None where there is no GPU to fill."""
    best = None
    length = len(mllm.encoder(prompts[0]).ids)
    for size in sizes if GPU else ():
        rows = size // length + 1 if way is our_scoring else size
        repeated = (prompts * (rows // len(prompts) + 1))[:rows]
        try:
            way(mllm, repeated, size)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            fits = False
        else:
            fits = not way_shrank(mllm, way, size)
        mllm.model.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
        if not fits:
            break
        best = size
    return best


def way_shrank(mllm: HFModel, way: Callable[..., None], size: int) -> bool:
    """Whether scoring ran out of memory and went on with less."""
    return way is our_scoring and mllm.backbone.budget.size < size


def main() -> None:
    """Measure scoring and training, in the usual way and in ours."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="llava-1.6-mistral-7b" if GPU else "tiny")
    parser.add_argument("--users", type=int, default=21, help="users per item in scoring")
    parser.add_argument("--items", type=int, default=4)
    given = parser.parse_args()
    dtype = torch.bfloat16 if GPU else torch.float32
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompts = pairs(folder, given.items, given.users)
        few = pairs(folder, given.items, 6)
        loaded = build(GEOMETRIES[given.geometry], DEVICE, dtype)
        settings = replace(SETTINGS.mllm, dtype=str(dtype).removeprefix("torch."))
        mllm = HFModel(given.geometry, settings, DEVICE, loaded=loaded)
        peak = peak_rate(dtype)
        found: dict[str, Any] = {"device": torch.cuda.get_device_name() if GPU else "cpu", "geometry": given.geometry}
        found |= {"matmul_tflops": round(peak / 1e12, 2), "users_per_item": given.users}
        powers = [2**n for n in range(1, 10)]
        found["scoring"] = {
            "usual": measure(usual_scoring, mllm, prompts, 6, peak),
            "ours": measure(our_scoring, mllm, prompts, mllm.backbone.budget.size, peak),
            "largest": {
                "usual_rows": largest(usual_scoring, mllm, prompts, powers),
                "our_cached_tokens": largest(our_scoring, mllm, prompts, [4096 * n for n in powers]),
            },
        }
        mllm.replace_model(adapt(mllm.model, replace(SETTINGS.lora, lora_dropout=0.0), seed=1))
        mllm.model.train()
        found["training"] = {
            "usual": measure(usual_training, mllm, few, 1, peak),
            "ours": measure(our_training, mllm, few, 2, peak),
            "largest": {
                "usual_rows": largest(usual_training, mllm, few, powers),
                "our_rows": largest(our_training, mllm, few, powers),
            },
        }
    print(json.dumps(found, indent=2))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
