"""Every family with most of its layers on disk (Accelerate's dispatch): the same scores and texts, and no training."""

from dataclasses import replace

import pytest
import torch
from planted_writers import answers_of
from stock_forward import CPU, SETTINGS

from recbole_mllm.common.errors import UserError
from recbole_mllm.mllm import scoring
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.interface import Decoding
from recbole_mllm.mllm.lora import tune
from recbole_mllm.mllm.placement import is_dispatched


def spread(folder, mllm, room):
    """Load a model that may take `room` of its bytes in memory."""
    size = sum(p.numel() * p.element_size() for p in mllm.model.parameters())
    chosen = replace(SETTINGS.mllm, device_map="auto", max_memory={"cpu": int(size * room)})
    return HFModel(str(folder), chosen, CPU)


# what comes first stays in memory: all layers on disk, with the head where that has weights of its own; or some of them
@pytest.fixture(scope="module", params=[0.6, pytest.param(0.85, marks=pytest.mark.slow)])
def dispatched(request, folder, mllm):
    return spread(folder, mllm, request.param)


def test_layers_are_on_disk(dispatched):
    away = {name for name, p in dispatched.model.named_parameters() if p.device.type == "meta"}
    assert is_dispatched(dispatched.model) and any(".layers.2." in name for name in away)
    assert away < {name for name, _ in dispatched.model.named_parameters()}


def test_nothing_in_memory_is_one_clear_line(folder, mllm):
    with pytest.raises(UserError, match="max_memory leaves no room in memory for the model's first layers"):
        spread(folder, mllm, 0.001)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "flat"])
def test_scores_are_those_of_the_plain_forward(dispatched, prompts, tokens, expected, share, monkeypatch):
    monkeypatch.setattr(scoring, "LEAST_GAIN", 1)
    with torch.inference_mode():
        found = scoring.yes_logits(dispatched.backbone, dispatched.encode(prompts), tokens, share_prefix=share)
    assert (found - expected).abs().max() < 1e-5


def test_texts_are_those_of_the_model_in_one_place(dispatched, mllm, prompts):
    chosen, decoding = prompts[:5], Decoding(6)
    assert answers_of(dispatched, chosen, decoding) == answers_of(mllm, chosen, decoding)


def test_training_is_refused(dispatched):
    with pytest.raises(UserError, match="can be scored and not trained"):
        tune(dispatched.model, SETTINGS.lora, 1)
