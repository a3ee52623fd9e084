"""Every family with its layers split among processes by FSDP: the scores, gradients and texts of the whole model.

This file is also what runs in each process, ``torchrun … test_family_split.py OUT.json``: each takes another
number of prompts, so that some make passes without any of their own.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import tiny_models
import torch
from launched_runs import held_here
from launching import FSDP, launched
from PIL import Image
from stock_forward import CPU, SETTINGS, STYLE

from recbole_mllm.common import distributed
from recbole_mllm.common.prompts import recommend_prompt
from recbole_mllm.mllm import scoring
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.interface import Batch, Decoding
from recbole_mllm.mllm.lora import tune
from recbole_mllm.mllm.loss import example_loss

FAMILIES = {build.__name__: build for build in (*tiny_models.FAMILIES, *tiny_models.PAIRS, *tiny_models.TEXT_FAMILIES)}
LORA = replace(SETTINGS.lora, finetune="lora", lora_dropout=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])  # of four, the last has no prompt of its own
def test_scores_gradients_and_texts_are_those_of_the_whole_model(count, tmp_path):
    done = launched(count, [__file__, tmp_path / "told.json"], tmp_path, limit_s=600, **FSDP)
    assert done.returncode == 0, done.stderr[-3000:]
    every = json.loads((tmp_path / "told.json").read_text())
    assert [set(told) for told in every] == [set(FAMILIES)] * count
    for process, told in enumerate(every):
        for family, found in told.items():
            assert found["prompts"] == max(0, 5 - 2 * process) and found["moved"] > 0.01, family
            assert found["written"] == [True, True] and found["tokens"] >= found["prompts"], family
            assert found["scores"] < 1e-5 and found["half"] == 0 and found["held"] < 0.9 * found["whole"], family
            assert max(found["gradients"], found["recomputed"]) < 1e-5, family
        assert sum(found["tokens"] for found in told.values()) >= 3 * len(told) * max(0, 5 - 2 * process)


def adapted(folder, *, split, dtype="float32"):
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


def asked(mllm, picture):
    """Return prompts with parts in common, fewer for later processes, none for the fourth."""
    image = picture if mllm.encoder.processor is not None else None
    likes = ("likes cats", "likes a very long list of dogs")
    every = [recommend_prompt(STYLE, like, title, image) for like in likes for title in ("the red mug", "socks")]
    every.append(recommend_prompt(STYLE, likes[0], "a hat", None))
    return every[: max(0, 5 - 2 * distributed.process_index())]


def scores(mllm, prompts):
    """Return the scores with shared prefixes and without, one below the other."""
    answers = mllm.answers(STYLE)
    return torch.stack([mllm.yes_scores(prompts, answers, share_prefix=share) for share in (True, False)])


def gradients(mllm, prompts):
    """Return the loss of the right answers and the adapter's gradients, an example at a time."""
    mllm.model.zero_grad()
    out = {"loss": torch.zeros(())}
    labels = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])[: len(prompts)]
    for example in mllm.examples(prompts, labels, mllm.answers(STYLE)) if prompts else ():
        loss = example_loss(mllm.backbone, [example], share=False)
        loss.backward()
        out["loss"] += loss.detach()
    return out | {name: p.grad.clone() for name, p in mllm.model.named_parameters() if p.grad is not None}


def written(mllm, prompts):
    """Return what the model writes behind each prompt, of lengths of their own, two at a time."""
    mllm.slots, learns = 2, mllm.model.training
    mllm.model.eval()
    work = Batch(prompts, Decoding(6 + 2 * distributed.process_index()))
    mllm.write(work)
    mllm.model.train(learns)
    return [work.answers[place] for place in range(len(prompts))]


def apart(one, many):
    """Return the largest difference, beside the largest number of each gradient."""
    if one.keys() != many.keys():
        return 1.0
    return max(float((many[n] - g).abs().max() / g.abs().max().clamp(min=1e-3)) for n, g in one.items())


def compared(folder, picture):
    """Return how far the split model is from the whole one, and how much of it is here."""
    whole, split = adapted(folder, split=False), adapted(folder, split=True)
    prompts = asked(whole, picture)
    told = {"prompts": len(prompts), "moved": 1.0, "gradients": 0.0, "scores": 0.0, "half": 0.0, "written": []}
    for _ in range(2):  # scoring, then learning, then both once more
        if prompts:
            told["scores"] = max(told["scores"], float((scores(whole, prompts) - scores(split, prompts)).abs().max()))
        distributed.arrive()
        told["written"] += [written(whole, prompts) == (by_parts := written(split, prompts))]
        told["tokens"] = sum(answer.new_tokens for answer in by_parts)
        distributed.arrive()
        one, many = gradients(whole, prompts), gradients(split, prompts)
        distributed.arrive()
        told["gradients"] = max(told["gradients"], apart(one, many))
        if prompts:
            told["moved"] = max(float(g.abs().max()) for n, g in one.items() if n != "loss")
    split.checkpoint_gradients()
    split.model.train()  # layers are computed again in training alone
    told["recomputed"] = apart(one, gradients(split, prompts))
    distributed.arrive()
    told["held"] = sum(held_here(p) for p in split.model.parameters())
    told["whole"] = sum(p.numel() for p in whole.model.parameters())
    # in bfloat16 both compute the same numbers in the same order
    halves = [adapted(folder, split=split, dtype="bfloat16") for split in (False, True)]
    if prompts:
        one, many = (scores(half, prompts) for half in halves)
        told["half"] = float((one - many).abs().max())
    distributed.arrive()
    return told


if __name__ == "__main__":
    scoring.LEAST_GAIN = 1
    with TemporaryDirectory() as scratch:
        picture = Path(scratch) / "red.png"
        Image.new("RGB", (40, 30), "red").save(picture)
        folders = {
            name: build(Path(scratch) / name) for name, build in FAMILIES.items()
        }  # later, process 0 alone saves
        told = {name: compared(folder, picture) for name, folder in folders.items()}
    every = distributed.gather_objects(told)
    if distributed.is_main():
        Path(sys.argv[1]).write_text(json.dumps(every))
    distributed.stop()
