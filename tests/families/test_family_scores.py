"""Scores of every family, computed in every way, against the stock forward pass of one prompt at a time."""

from dataclasses import replace

import pytest
import torch
from planted_writers import answers_of
from stock_forward import CPU, SETTINGS, STYLE, own_inputs

from recbole_mllm.common.prompts import Prompt, image_summary_prompt, recommend_prompt
from recbole_mllm.mllm import scoring
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.interface import Decoding


@pytest.fixture(autouse=True)
def every_prefix_is_shared(monkeypatch):
    monkeypatch.setattr(scoring, "LEAST_GAIN", 1)


@torch.inference_mode()
def _scores(mllm, prompts, tokens, **options):
    return scoring.yes_logits(mllm.backbone, mllm.encode(prompts), tokens, **options)


def test_the_ids_are_those_of_the_processor_itself(mllm, prompts, sees, images):
    encoder = mllm.encoder
    # an image at the very start and the very end of a turn meets the template's own text
    edges = [Prompt("<image>\nWhat is it?", (images["blue"],)), Prompt("What is it? <image>", (images["red"],))]
    edges = [image_summary_prompt(STYLE, images["green"]), *edges] if sees else []
    for prompt in [*prompts, *edges, Prompt("Tab\tand  two spaces\n\n\nnewlines, \u00fc\u4e16\U0001f600")]:
        own = own_inputs(encoder.tokenizer, encoder.processor, prompt)["input_ids"][0].tolist()
        assert encoder.tokenizer.decode(encoder(prompt).ids) == encoder.tokenizer.decode(own)
        assert list(encoder(prompt).ids) == own


def test_the_margin_moves_with_the_title_and_with_the_image(own, tokens, sees, images):
    """Else no test of exactness here could fail."""

    def margin(title, image):
        logits = own(recommend_prompt(STYLE, "likes cats", title, images[image] if sees else None))
        return (logits[tokens[0]] - logits[tokens[1]]).item()

    assert abs(margin("the red mug", "red") - margin("a pair of warm winter socks, size 44", "red")) > 1e-2
    assert not sees or abs(margin("the red mug", "red") - margin("the red mug", "black")) > 1e-2


@pytest.mark.parametrize("share", [True, False], ids=["shared", "flat"])
def test_logits_equal_the_plain_forward(mllm, prompts, tokens, expected, share):
    assert (_scores(mllm, prompts, tokens, share_prefix=share) - expected).abs().max() < 1e-5


def test_logits_do_not_depend_on_order_or_company(mllm, prompts, tokens, expected, monkeypatch):
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = _scores(mllm, [prompts[i] for i in order], tokens)
    assert (shuffled - expected[order]).abs().max() < 1e-5
    alone = torch.cat([_scores(mllm, [prompt], tokens) for prompt in prompts])
    assert (alone - expected).abs().max() < 1e-5
    monkeypatch.setattr(mllm.backbone.budget, "size", 300)  # batches of one to three
    assert (_scores(mllm, prompts, tokens) - expected).abs().max() < 1e-5


def test_a_prefix_is_shared_where_the_family_allows_it(mllm, prompts, tokens, monkeypatch):
    read, stock = [], mllm.backbone.hidden

    def spy(rows, start, stops, cache):
        read.append(sum(stop - start for stop in stops))
        return stock(rows, start, stops, cache)

    monkeypatch.setattr(mllm.backbone, "hidden", spy)
    _scores(mllm, prompts, tokens)
    whole = sum(len(e.ids) for e in mllm.encode(prompts))
    assert sum(read) == whole if mllm.backbone.config.model_type == "paligemma" else sum(read) < 0.95 * whole


def test_bfloat16_is_no_worse_than_batching_alone(folder, prompts, tokens):
    half = HFModel(str(folder), replace(SETTINGS.mllm, dtype="bfloat16"), CPU)
    shared, flat = (_scores(half, prompts, tokens, share_prefix=share) for share in (True, False))
    alone = torch.cat([_scores(half, [prompt], tokens, share_prefix=False) for prompt in prompts])
    assert shared.dtype == torch.float32
    assert (shared - flat).abs().max() <= 2 * (flat - alone).abs().max() + 2**-7 * flat.abs().max()


def test_written_text_is_that_of_plain_generation(mllm, stock, prompts, monkeypatch):
    monkeypatch.setattr(mllm, "slots", 3)  # rows leave and join: the prompts have different lengths
    tokenizer, processor = mllm.encoder.tokenizer, mllm.encoder.processor
    few = prompts[:7]
    expected = []
    for prompt in few:
        inputs = own_inputs(tokenizer, processor, prompt)
        out = stock.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        expected.append(tokenizer.decode(out[0, inputs["input_ids"].size(1) :], skip_special_tokens=True).strip())
    assert [answer.text for answer in answers_of(mllm, few, Decoding(12))] == expected
