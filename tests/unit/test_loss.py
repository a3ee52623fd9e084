"""Fine-tuning losses and gradients: shared or not, in one part or many, checkpointed or not, they are the same."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import tiny_models
import torch
from PIL import Image
from stock_forward import CPU, SETTINGS, STYLE

from recbole_mllm.common.prompts import recommend_prompt
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.lora import tune
from recbole_mllm.mllm.loss import can_share, example_loss, groups, micro_batches

FAMILIES = [build for build in tiny_models.FAMILIES if build is not tiny_models.paligemma]  # a prefix-LM shares nothing


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    for n in range(3):
        Image.effect_noise((30 + n, 40), 60 + n).convert("RGB").save(folder / f"{n}.png")
    return folder


@cache
def _loaded(folder):
    return HFModel(str(folder), SETTINGS.mllm, CPU)


def _model(place, build, **lora):
    """Return a model with an adapter whose gradients are all non-zero; a fresh one's are half zero."""
    folder = place / build.__name__
    if not folder.is_dir():
        build(folder)
    mllm = copy.deepcopy(_loaded(folder))
    mllm.replace_model(tune(mllm.model, replace(SETTINGS.lora, **{"lora_dropout": 0.0, **lora}), seed=1))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in mllm.model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    mllm.model.train()
    return mllm


def _examples(mllm, place, users=3):
    """Return questions of three items, some users each, in an order that keeps no item together."""
    sees = mllm.encoder.processor is not None
    prompts = [
        recommend_prompt(
            STYLE, f"likes number {user} " * (user + 1), f"thing {n}", place / f"{n}.png" if sees else None
        )
        for user in range(users)
        for n in range(3)
    ]
    return mllm.examples(prompts, torch.arange(len(prompts)) % 2, mllm.answers(STYLE))


def _gradient(mllm):
    found = {n: p.grad.clone() for n, p in mllm.model.named_parameters() if p.requires_grad and p.grad is not None}
    mllm.model.zero_grad()
    return found


def _vector(gradient):
    return torch.cat([tensor.flatten().double() for tensor in gradient.values()])


def _relative(one, other):
    assert one.keys() == other.keys()
    return float((_vector(one) - _vector(other)).norm() / _vector(other).norm())


def _step(mllm, examples, parts=None, **how):
    for part in parts or [range(len(examples))]:
        loss = example_loss(mllm.backbone, [examples[i] for i in part], **how)
        (loss * (len(part) / len(examples))).backward()
    return _gradient(mllm)


@pytest.mark.parametrize(
    ("build", "whole"), [*((build, False) for build in FAMILIES), (tiny_models.llava, True), (tiny_models.llama, True)]
)
def test_shared_prefixes_change_no_gradient(place, build, whole, monkeypatch):
    monkeypatch.setattr("recbole_mllm.mllm.loss.LEAST_GAIN", 1)
    mllm = _model(place, build)
    examples = _examples(mllm, place, users=2)
    assert sorted(sorted(g.rows) for g in groups(mllm.backbone, examples)) == [[0, 3], [1, 4], [2, 5]]  # one an item
    plain = _step(mllm, examples, whole=whole)
    assert min(float(g.norm()) for g in plain.values()) > 0
    assert _relative(_step(mllm, examples, whole=whole, share=True), plain) < 1e-5


def long_images(folder):
    """Write a model to which an image is most of a prompt."""
    return tiny_models.llava_next(folder, tile=96)


def test_a_shared_prefix_is_computed_once(place, monkeypatch):
    mllm = _model(place, long_images)
    examples = _examples(mllm, place)
    read, stock = [], mllm.backbone.hidden

    def spy(rows, start, stops, cache):
        read.append(sum(stop - start for stop in stops))
        return stock(rows, start, stops, cache)

    monkeypatch.setattr(mllm.backbone, "hidden", spy)
    _step(mllm, examples, share=True)
    assert sum(read) < 0.5 * sum(len(e.ids) for e in examples)


def test_what_is_not_worth_sharing_is_not_shared(place):
    mllm = _model(place, tiny_models.llama)
    assert [g.shared for g in groups(mllm.backbone, _examples(mllm, place))] == [0]


@pytest.fixture(scope="module")
def llava(place):
    return _model(place, tiny_models.llava)


def test_rows_that_are_the_same_share_all_but_a_token(llava, place, monkeypatch):
    monkeypatch.setattr("recbole_mllm.mllm.loss.LEAST_GAIN", 1)
    twice = [_examples(llava, place)[0]] * 2
    assert _relative(_step(llava, twice, share=True), _step(llava, twice[:1])) < 1e-5


@pytest.mark.parametrize("share", [False, True])
def test_micro_batches_hold_every_row_once_and_change_no_gradient(llava, place, share, monkeypatch):
    monkeypatch.setattr("recbole_mllm.mllm.loss.LEAST_GAIN", 1)
    examples = _examples(llava, place)
    whole = _step(llava, examples)
    for size in (1, 2, None):
        parts = micro_batches(llava.backbone, examples, size, share=share)
        assert sorted(i for part in parts for i in part) == list(range(len(examples)))
        lengths = [[len(examples[i].ids) for i in part] for part in parts]
        if size and not share:
            assert all(len(part) <= size for part in parts) and sum(lengths, []) == sorted(sum(lengths, []))
        assert _relative(_step(llava, examples, parts, share=share), whole) < 1e-5


def test_rows_that_share_a_prefix_count_by_what_they_add(place):
    mllm = _model(place, long_images)
    examples = _examples(mllm, place)
    parts = micro_batches(mllm.backbone, examples, 2, share=True)
    # an item's image is three quarters of a row, so that all three of its users cost less than two rows
    assert sorted(map(sorted, parts)) == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]


@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_gradient_checkpointing_changes_no_gradient(place, finetune):
    mllm = _model(place, tiny_models.llava, finetune=finetune)
    examples = _examples(mllm, place)
    plain = _step(mllm, examples)
    mllm.checkpoint_gradients()
    assert not can_share(mllm.backbone)
    assert _relative(_step(mllm, examples, share=True), plain) < 1e-6


def test_features_of_a_frozen_tower_are_computed_once_and_are_exact(place, monkeypatch):
    mllm = _model(place, tiny_models.llava)
    examples = _examples(mllm, place)
    calls, model = [], mllm.backbone.head_model.model
    stock = model.get_image_features
    monkeypatch.setattr(model, "get_image_features", lambda **kw: calls.append(1) or stock(**kw))
    first, second = _step(mllm, examples), _step(mllm, examples)
    assert len(calls) == 3 and _relative(first, second) == 0.0
    monkeypatch.setattr(type(mllm.backbone), "frozen_vision", False)  # features made again at every step
    assert _relative(_step(mllm, examples), first) == 0.0 and len(calls) == 3 + len(examples)


@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_a_tower_that_is_trained_gets_gradients_and_no_cache(place, finetune, monkeypatch):
    monkeypatch.setattr("recbole_mllm.mllm.loss.LEAST_GAIN", 1)
    mllm = _model(place, tiny_models.llava, finetune=finetune, lora_target="all")
    examples = _examples(mllm, place)
    gradient = _step(mllm, examples)
    tower = [float(g.norm()) for name, g in gradient.items() if "vision_tower" in name]
    assert sum(n > 0 for n in tower) > len(tower) / 2
    assert not mllm.backbone.frozen_vision and not mllm.backbone._features
    assert _relative(_step(mllm, examples, share=True), gradient) < 1e-5
