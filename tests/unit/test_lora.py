"""What is trained of a model, how it comes back, and QLoRA's refusals."""

import sys
from dataclasses import replace

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from stock_forward import CPU, SETTINGS, STYLE, loss_of

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.prompts import recommend_prompt
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.lora import check_finetune, load_trained_state, save_trained, trained_state, tune

PROMPTS = [recommend_prompt(STYLE, f"likes {what}", "a mug", None) for what in ("cats", "dogs and hens", "")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.llava(tmp_path_factory.mktemp("llava"))


def tuned(folder, dtype="auto", **settings):
    mllm = HFModel(str(folder), replace(SETTINGS.mllm, dtype=dtype), CPU)
    mllm.replace_model(tune(mllm.model, replace(SETTINGS.lora, **{"lora_dropout": 0.0} | settings), seed=1))
    return mllm


@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_what_is_trained_changes_nothing_before_and_comes_back_after(folder, tmp_path, finetune):
    fresh, mllm = HFModel(str(folder), SETTINGS.mllm, CPU), tuned(folder, finetune=finetune)
    answers, trained = mllm.answers(STYLE), {n for n, p in mllm.model.named_parameters() if p.requires_grad}
    assert trained and mllm.backbone.frozen_vision and not any("vision" in n or "projector" in n for n in trained)
    before = mllm.yes_scores(PROMPTS, answers)
    assert torch.allclose(before, fresh.yes_scores(PROMPTS, answers), atol=1e-6)
    loss_of(mllm, PROMPTS, torch.ones(len(PROMPTS))).backward()
    torch.optim.SGD([p for p in mllm.model.parameters() if p.requires_grad], lr=0.1).step()
    after = mllm.yes_scores(PROMPTS, answers)
    assert (after - before).mean() > 0.001  # every answer was Yes
    again = tuned(folder, finetune=finetune)
    load_trained_state(again.model, trained_state(mllm.model))
    assert torch.equal(again.yes_scores(PROMPTS, answers), after)
    save_trained(mllm.model, tmp_path, mllm.identity)
    name = "trained" if finetune == "full" else "adapter_model"
    assert load_file(tmp_path / f"{name}.safetensors").keys() == trained_state(mllm.model).keys()


def test_what_was_trained_with_other_settings_is_refused(folder):
    state = trained_state(tuned(folder).model)
    for other, message in (
        ({"lora_r": 2}, "other shapes"),
        ({"lora_target": "all"}, "fits other layers"),
        ({"finetune": "full"}, "not those trained here"),
    ):
        with pytest.raises(UserError, match=message):
            load_trained_state(tuned(folder, **other).model, state)


def test_qlora_without_bitsandbytes_is_one_line_before_anything_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.functional", raising=False)
    with pytest.raises(UserError, match=r"pip install \"recbole-mllm\[qlora\]\", or set finetune: lora"):
        check_finetune(replace(SETTINGS.lora, finetune="qlora"), CPU)
    check_finetune(SETTINGS.lora, CPU)


def test_qlora_on_a_device_that_bitsandbytes_fails_on_is_one_line():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra `qlora`)")
    wanted = replace(SETTINGS.lora, finetune="qlora")
    check_finetune(wanted, CPU)
    absent = next(kind for kind in ("cuda", "xpu") if not getattr(torch, kind).is_available())
    with pytest.raises(UserError, match=f"cannot run on {absent}, as bitsandbytes fails there .*set finetune: lora"):
        check_finetune(wanted, torch.device(absent))


@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_what_is_trained_of_a_half_precision_model_is_float32(folder, finetune):
    model = tuned(folder, "bfloat16", finetune=finetune).model
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
