"""A family this project has no row for is checked once; what disagrees with its plain forward pass is not used."""

import logging

import pytest
import tiny_models
import torch
from PIL import Image
from stock_forward import CPU, SETTINGS, STYLE, own_inputs, own_logits
from tiny_models.parts import TEXT, write
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from recbole_mllm.mllm import architectures, scoring
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.prompts import recommend_prompt

SMALL = {"vocab_size": 389, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
UNKNOWN = {
    "gpt2": (GPT2LMHeadModel, GPT2Config(n_embd=64, n_layer=2, n_head=4, **SMALL), "shared"),
    # two layers of a sliding window, and capped logits
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**TEXT, **SMALL, head_dim=16, sliding_window=16), "shared"),
    # divides its logits: the head's rows alone are not the whole story
    "granite": (GraniteForCausalLM, GraniteConfig(**TEXT, **SMALL, logits_scaling=8.0), "plain"),
    # has no keys and values at all
    "mamba": (MambaForCausalLM, MambaConfig(hidden_size=64, num_hidden_layers=2, **SMALL), "flat"),
}
PROMPTS = [recommend_prompt(STYLE, f"likes {what} cats", "a mug", None) for what in ("big", "very small", "no")]


@pytest.mark.parametrize("family", UNKNOWN)
def test_an_unknown_family_scores_as_its_plain_forward(family, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(scoring, "_LEAST_GAIN", 1)
    words = tiny_models.llama(tmp_path / "words")
    build, config, way = UNKNOWN[family]
    write(tmp_path, build, config, seed=1)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((words / name).read_bytes())
    model = HFModel(str(tmp_path), SETTINGS.mllm, CPU)
    answers = model.answers(STYLE)
    with caplog.at_level(logging.WARNING):
        got = model.yes_scores(PROMPTS, answers)
    inputs = [own_inputs(model.encoder.tokenizer, None, prompt) for prompt in PROMPTS]
    own = torch.stack([own_logits(model.model, one)[-1] for one in inputs])
    margin = own[:, answers.yes[0]] - own[:, answers.no[0]]
    assert margin.std() > 1e-3 and torch.allclose(got, margin, atol=1e-5)
    assert model.body.way == way
    assert ("disagrees with a plain forward pass" in caplog.text) == (way != "shared")


def test_a_prefix_lm_nobody_told_of_is_caught(tmp_path, monkeypatch, caplog):
    """PaliGemma without its row in the table."""
    monkeypatch.setattr(scoring, "_LEAST_GAIN", 1)
    monkeypatch.delitem(architectures._FAMILIES, "paligemma")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    model = HFModel(str(tiny_models.paligemma(tmp_path / "model")), SETTINGS.mllm, CPU)
    prompts = [recommend_prompt(STYLE, f"likes {w}", "a mug", tmp_path / "red.png") for w in ("cats", "small dogs")]
    answers = model.answers(STYLE)
    together = model.yes_scores(prompts, answers)
    assert model.body.way != "shared" and "paligemma: shared scoring disagrees" in caplog.text
    alone = torch.cat([model.yes_scores([prompt], answers) for prompt in prompts])
    assert torch.allclose(together, alone, atol=1e-5)


def test_the_check_is_made_once_and_a_known_family_needs_none(tmp_path, monkeypatch):
    made = []
    stock = scoring.way_to_score
    monkeypatch.setattr(scoring, "plain_logits", made.append)
    monkeypatch.setattr(scoring, "way_to_score", lambda *args: made.append("check") or stock(*args))
    model = HFModel(str(tiny_models.llama(tmp_path)), SETTINGS.mllm, CPU)
    for _ in range(3):
        model.yes_scores(PROMPTS, model.answers(STYLE))
    assert made == ["check"]
