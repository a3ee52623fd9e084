"""A family over another language model: what its own class makes of that one's settings is what is computed.

A LLaVA over a Granite reads no ``logits_scaling``, a PaliGemma over a Gemma2 reads its cap; each is compared with the
model as transformers loads it, in scores, loss, gradients, texts and the merged export.
"""

from dataclasses import replace

import pytest
import tiny_models
import torch
from PIL import Image
from planted_writers import answers_of
from stock_forward import CPU, SETTINGS, STYLE, own_inputs
from transformers import AutoModelForImageTextToText

from recbole_mllm.common.prompts import recommend_prompt
from recbole_mllm.mllm import families, scoring
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.interface import Decoding
from recbole_mllm.mllm.lora import tune
from recbole_mllm.mllm.loss import example_loss, groups
from recbole_mllm.training.model_export import write_model

QUICK = {"llava_cohere", "llava_next_granite", "aya_vision_cohere2", "internvl_qwen3"}  # the last: InternVL3.5
CASES = [
    pytest.param(build, id=build.__name__, marks=() if build.__name__ in QUICK else pytest.mark.slow)
    for build in tiny_models.PAIRS
]
LABELS = torch.tensor([1.0, 0.0, 0.0, 1.0])


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """A pair's folder, the model of ours with an adapter that does something, and prompts with parts in common."""
    folder = request.param(tmp_path_factory.mktemp(request.param.__name__))
    Image.effect_noise((40, 30), 60).convert("RGB").save(folder / "red.png")
    mllm = HFModel(str(folder), SETTINGS.mllm, CPU)
    likes = ("likes cats", "The user likes a very long list of dogs, and other animals")
    prompts = [recommend_prompt(STYLE, like, "the red mug", folder / "red.png") for like in likes]
    prompts += [recommend_prompt(STYLE, like, "socks", None) for like in likes]
    return folder, mllm, prompts


def own(mllm, stock, prompts, word=""):
    """Return the stock inputs and logits of each prompt."""
    tokenizer, processor = mllm.encoder.tokenizer, mllm.encoder.processor
    inputs = [own_inputs(tokenizer, processor, prompt, word) for prompt in prompts]
    return [(one["input_ids"][0], stock(**one).logits[0].float()) for one in inputs]


def likelihood(mllm, stock, prompts):
    """Return the mean loss of the right answers by the stock forward pass; gradients flow."""
    losses = []
    for prompt, label in zip(prompts, LABELS.tolist(), strict=True):
        ((ids, logits),) = own(mllm, stock, [prompt], STYLE.answer_yes if label else STYLE.answer_no)
        places = torch.arange(len(mllm.encoder(prompt).ids), len(ids))
        losses.append(torch.nn.functional.cross_entropy(logits[places - 1], ids[places]))
    return torch.stack(losses).mean()


def test_scores_and_texts_are_those_of_the_stock_model(pair, monkeypatch):
    folder, mllm, prompts = pair
    monkeypatch.setattr(scoring, "LEAST_GAIN", 1)
    stock = AutoModelForImageTextToText.from_pretrained(folder).eval()
    answers = mllm.answers(STYLE)
    with torch.no_grad():
        ends = torch.stack([logits[-1] for _, logits in own(mllm, stock, prompts)])
    margin = ends[:, answers.yes[0]] - ends[:, answers.no[0]]
    assert margin.std() > 1e-3 and mllm.backbone.architecture.known
    for share in (True, False):
        assert (mllm.yes_scores(prompts, answers, share_prefix=share) - margin).abs().max() < 1e-5
    with torch.inference_mode():
        whole = [
            mllm.backbone.logits(mllm.backbone.hidden([one], 0, [len(one.ids)], None)[0])[-1]
            for one in mllm.encode(prompts)
        ]
    assert (torch.stack(whole) - ends).abs().max() < 1e-5
    written = [
        mllm.encoder.tokenizer.decode(
            stock.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].size(1) :],
            skip_special_tokens=True,
        ).strip()
        for inputs in (own_inputs(mllm.encoder.tokenizer, mllm.encoder.processor, prompt) for prompt in prompts)
    ]
    assert [answer.text for answer in answers_of(mllm, prompts, Decoding(8))] == written


def test_a_pair_without_a_test_is_checked_and_keeps_its_sharing(pair, monkeypatch):
    _, mllm, prompts = pair
    outer, text = mllm.backbone.config.model_type, mllm.backbone.config.get_text_config().model_type
    row = families._FAMILIES[outer]
    monkeypatch.setitem(families._FAMILIES, outer, replace(row, texts=row.texts - {text}))
    unknown = HFModel(str(pair[0]), SETTINGS.mllm, CPU)
    asked = []
    stock = scoring.find_scoring_mode
    monkeypatch.setattr(scoring, "find_scoring_mode", lambda *args: asked.append(1) or stock(*args))
    answers = mllm.answers(STYLE)
    assert (unknown.yes_scores(prompts, answers) - mllm.yes_scores(prompts, answers)).abs().max() < 1e-5
    assert not unknown.backbone.architecture.known and asked
    assert unknown.backbone.scoring_mode == ("shared" if row.shares_prefix else "flat")


def test_loss_gradients_and_the_merged_export_are_those_of_the_stock_model(pair, monkeypatch, tmp_path):
    folder, _, prompts = pair
    monkeypatch.setattr("recbole_mllm.mllm.loss.LEAST_GAIN", 1)
    mllm = HFModel(str(folder), SETTINGS.mllm, CPU)
    mllm.replace_model(tune(mllm.model, replace(SETTINGS.lora, lora_dropout=0.0), seed=1))
    torch.manual_seed(1)
    adapted = {name: p for name, p in mllm.model.named_parameters() if p.requires_grad}
    for name, parameter in adapted.items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    examples = mllm.examples(prompts, LABELS, mllm.answers(STYLE))
    expected = likelihood(mllm, mllm.backbone.head_model, prompts)
    gradients = torch.autograd.grad(expected, adapted.values())
    for share in (True, False):
        loss = example_loss(mllm.backbone, examples, share=share)
        assert torch.allclose(loss, expected, atol=1e-6)
        found = torch.autograd.grad(loss, adapted.values())
        off = torch.cat([(a - b).flatten() for a, b in zip(found, gradients, strict=True)])
        assert off.norm() < 2e-5 * torch.cat([g.flatten() for g in gradients]).norm()
    assert len(groups(mllm.backbone, examples)) == (2 if mllm.backbone.architecture.shares_prefix else 1)
    scores = mllm.yes_scores(prompts, answers := mllm.answers(STYLE))
    write_model(mllm, str(folder), tmp_path, merge=True)
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        ends = torch.stack([logits[-1] for _, logits in own(mllm, stock, prompts)])
    assert (ends[:, answers.yes[0]] - ends[:, answers.no[0]] - scores).abs().max() < 1e-5
