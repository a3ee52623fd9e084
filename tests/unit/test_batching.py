"""Running out of memory lowers the batch and goes on; one prompt too large is named."""

import pytest
import tiny_models
import torch
from stock_forward import CPU, SETTINGS, STYLE

from recbole_mllm.errors import UserError
from recbole_mllm.mllm import scoring
from recbole_mllm.mllm.batching import Budget, in_batches
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.prompts import recommend_prompt


@pytest.fixture
def mllm(tmp_path):
    return HFModel(str(tiny_models.llama(tmp_path)), SETTINGS.mllm, CPU)


@pytest.fixture
def prompts():
    likes = [f"likes {letter} {'very ' * n}big cats" for n, letter in enumerate("abcdefghijklmnopqrstuvwx")]
    return [recommend_prompt(STYLE, preference, "a mug", None) for preference in likes]


@pytest.fixture
def small_memory(mllm, monkeypatch):
    """Let the model itself fail, as an accelerator would, when a call holds more than so many tokens in its cache."""

    def limit(tokens, error=None):
        tried, stock = [], mllm.model.model.forward

        def forward(*args, attention_mask, **kwargs):
            tried.append(attention_mask.numel())
            if attention_mask.numel() > tokens:
                raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            return stock(*args, attention_mask=attention_mask, **kwargs)

        monkeypatch.setattr(mllm.model.model, "forward", forward)
        return tried

    return limit


@pytest.mark.parametrize("least_gain", [1, 10**6], ids=["shared", "flat"])
def test_scores_are_the_same_in_little_memory(mllm, prompts, small_memory, monkeypatch, least_gain):
    monkeypatch.setattr(scoring, "_LEAST_GAIN", least_gain)
    answers = mllm.answers(STYLE)
    expected = mllm.yes_scores(prompts, answers)
    tried = small_memory(300)
    assert torch.allclose(mllm.yes_scores(prompts, answers), expected, atol=1e-5)
    failed = [size for size in tried if size > 300]
    assert failed and failed == sorted(failed, reverse=True)
    tried.clear()
    assert torch.allclose(mllm.yes_scores(prompts, answers), expected, atol=1e-5)
    assert all(size <= 300 for size in tried)  # what was learnt is kept


def test_memory_of_the_cpu_counts_too(mllm, prompts, small_memory):
    message = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: tried 9 bytes."
    small_memory(300, RuntimeError(message))
    assert len(mllm.yes_scores(prompts, mllm.answers(STYLE))) == len(prompts)


def test_one_prompt_too_large_is_named(mllm, prompts, small_memory):
    answers = mllm.answers(STYLE)
    small_memory(130)
    long = recommend_prompt(STYLE, "likes one thing " * 40, "a particular mug", None)
    with pytest.raises(UserError, match="out of memory with one prompt alone: .*a particular mug.*tokens"):
        mllm.yes_scores([*prompts, long], answers)


def test_another_error_is_not_swallowed(mllm, prompts, small_memory):
    small_memory(0, RuntimeError("expected scalar type Float"))
    with pytest.raises(RuntimeError, match="expected scalar type"):
        mllm.yes_scores(prompts, mllm.answers(STYLE))


def test_what_can_be_released_is_released_before_one_row_is_given_up():
    kept = [1]

    def run(batch):
        if kept:
            raise torch.OutOfMemoryError("out")
        return sum(batch)

    budget = Budget(8, lambda: bool(kept) and not kept.clear())
    assert [out for _, out in in_batches([5], run, len, budget, str)] == [5]


def test_what_is_made_anew_at_each_try_is_no_way_out():
    def run(_):
        raise torch.OutOfMemoryError("out")

    with pytest.raises(UserError, match="one prompt alone"):
        list(in_batches([5], run, len, Budget(8, lambda: True), str))


def test_rows_come_once_each_and_in_order():
    def run(batch):
        if len(batch) > 3:
            raise torch.OutOfMemoryError("out")
        return len(batch)

    budget = Budget(100)
    batches = [list(batch) for batch, _ in in_batches(range(20), run, len, budget, str)]
    assert sum(batches, []) == list(range(20))
    assert budget.size == 2 and max(map(len, batches)) == 2
    assert list(in_batches([], run, len, budget, str)) == []
