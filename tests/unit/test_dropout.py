"""Keyed LoRA dropout: masks as random as any, and the same for a token wherever it is computed."""

import math
from dataclasses import replace

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from stock_forward import CPU, SETTINGS, STYLE
from torch import nn

from recbole_mllm.mllm.dropout import KeyedDropout, Masks, key_dropout
from recbole_mllm.mllm.encode import Encoded, ImageInput
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.sft import example_loss
from recbole_mllm.mllm.tuning import tune
from recbole_mllm.prompts import recommend_prompt

ROWS = [Encoded(tuple(np.random.default_rng(n).integers(1, 50_000, 400).tolist()), (), 0) for n in range(4)]


def kept(dropout, masks, rows=ROWS, start=0, stop=None, width=257, step=(7, 0, 0)):
    """Return ``[B, S, width]`` 0 or 1: what `dropout` keeps of `rows`."""
    masks.begin(*step)
    stops = [min(stop or len(row.ids), len(row.ids)) for row in rows]
    with masks.over_text(rows, start, stops, -1):
        return (dropout(torch.ones(len(rows), max(stops) - start, width)) != 0).double()


def together(one, other, p):
    """Return how far two masks are from independent, in standard errors."""
    apart = ((one - (1 - p)) * (other - (1 - p))).mean() / (p * (1 - p))
    return abs(float(apart)) * math.sqrt(one.numel())


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_masks_are_random_in_every_direction(p):
    masks = Masks()
    dropout, other = (KeyedDropout(p, number, masks) for number in (0, 1))
    found = kept(dropout, masks)
    for axes in [(0, 1, 2), (0, 1), (2,)]:  # of all, of each channel, of each token
        share, count = found.mean(axes), found.numel() / found.mean(axes).numel()
        off = (share - (1 - p)) / math.sqrt(p * (1 - p) / count)
        assert off.abs().max() < 5.5 and (off.numel() == 1 or abs(off.std() - 1) < 0.15)
    assert together(found, kept(other, masks), p) < 5  # another layer
    assert together(found, kept(dropout, masks, step=(7, 0, 1)), p) < 5  # another batch
    assert together(found, kept(dropout, masks, step=(8, 0, 0)), p) < 5  # another seed
    for one, next_to_it in [
        (found[1:], found[:-1]), (found[:, 1:], found[:, :-1]), (found[..., 1:], found[..., :-1]),
        (found[..., :256:2], found[..., 1:256:2]),  # halves of one hash
    ]:  # fmt: skip
        assert together(one, next_to_it, p) < 5


def test_what_is_kept_is_larger_by_as_much_as_is_dropped():
    masks, x = Masks(), torch.randn(4, 400, 30, dtype=torch.double)
    with masks.over_text(ROWS, 0, [400] * 4, -1):
        y = KeyedDropout(0.25, 0, masks)(x)
    torch.testing.assert_close(y[y != 0], x[y != 0] / 0.75)
    assert abs(float((y == 0).double().mean()) - 0.25) < 0.01


def test_a_token_has_one_mask_whatever_it_is_computed_with():
    masks = Masks()
    dropout = KeyedDropout(0.3, 0, masks)
    whole = kept(dropout, masks)
    assert torch.equal(whole, kept(dropout, masks))
    assert torch.equal(whole[[2]], kept(dropout, masks, rows=ROWS[2:3]))
    assert torch.equal(whole[:, 100:250], kept(dropout, masks, start=100, stop=250))
    cut = [replace(ROWS[0], ids=ROWS[0].ids[:90]), ROWS[1]]  # padded
    assert torch.equal(whole[0, :90], kept(dropout, masks, rows=cut)[0, :90])


def test_a_token_is_known_by_all_that_stands_before_it_images_too():
    picture, another = (ImageInput(name, (9, 9), {}) for name in ("a", "b"))
    ids = (5, 6, 9, 9, 7, 8)  # 9 stands for the image
    rows = [Encoded(ids, (picture,), 0), Encoded(ids, (another,), 0), Encoded((5, 6, 9, 9, 1, 8), (picture,), 0)]
    masks = Masks()
    dropout = KeyedDropout(0.5, 0, masks)
    with masks.over_text(rows, 0, [6] * 3, 9):
        one, other, third = dropout(torch.ones(3, 6, 200)) != 0
    same = [torch.equal(a, b) for a, b in zip(one, other, strict=True)]
    assert same == [True, True, False, False, False, False]
    assert [torch.equal(a, b) for a, b in zip(one, third, strict=True)] == [True] * 4 + [False] * 2


def test_without_training_nothing_is_dropped_and_without_knowledge_torch_drops():
    masks, x = Masks(), torch.ones(2, 3, 500)
    dropout = KeyedDropout(0.5, 0, masks)
    assert torch.equal(dropout.eval()(x), x)
    torch.manual_seed(3)
    drawn = dropout.train()(x)
    torch.manual_seed(3)
    assert torch.equal(drawn, nn.functional.dropout(x, 0.5))
    with masks.over_text(ROWS[:2], 0, [7, 7], -1):  # other vectors than those in hand
        assert abs(float((dropout(x) != 0).double().mean()) - 0.5) < 0.05
    assert key_dropout(nn.ModuleDict({"a": nn.Linear(2, 2)})) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("dropout")
    for n in range(2):
        Image.effect_noise((40, 40), 60 + n).convert("RGB").save(place / f"{n}.png")
    tiny_models.llava(place / "llava")
    return place


@pytest.mark.parametrize("target", ["language", "all"])
def test_gradients_do_not_depend_on_how_a_batch_is_cut(folder, target):
    mllm = HFModel(str(folder / "llava"), SETTINGS.mllm, CPU)
    mllm.replace_model(tune(mllm.model, replace(SETTINGS.lora, lora_dropout=0.4, lora_target=target), 1))
    torch.manual_seed(2)
    for name, parameter in mllm.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    mllm.model.train()
    prompts = [recommend_prompt(STYLE, f"likes {n}", "a mug", folder / f"{n % 2}.png") for n in range(4)]
    examples = mllm.examples(prompts, torch.tensor([1.0, 0.0, 1.0, 0.0]), mllm.answers(STYLE))

    def gradient(*parts, batch=0):
        mllm.model.zero_grad()
        mllm.body.masks.begin(1, 0, batch)
        for part in parts:
            (example_loss(mllm.body, [examples[i] for i in part]) * len(part) / 4).backward()
        return torch.cat([p.grad.flatten() for p in mllm.model.parameters() if p.requires_grad])

    whole = gradient([0, 1, 2, 3])
    cut = gradient([3], [0, 2], [1])
    assert float((whole - cut).norm()) < 1e-5 * float(whole.norm())
    other = gradient([0, 1, 2, 3], batch=1)
    assert float((whole - other).norm()) > 0.1 * float(whole.norm())
