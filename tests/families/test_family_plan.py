"""What a plan takes from a config alone, against the loaded model of each family."""

from contextlib import contextmanager

import pytest
import torch
from stock_forward import CPU, SETTINGS, STYLE
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from recbole_mllm.mllm.anatomy import Part, trained_parameters
from recbole_mllm.mllm.blueprint import blueprint
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.passes import Pass, scoring_passes, training_passes
from recbole_mllm.mllm.sft import example_loss, make_examples, micro_batches
from recbole_mllm.mllm.sharing import can_share
from recbole_mllm.mllm.tuning import tune
from recbole_mllm.planning.flops import head_flops, image_flops, read_flops
from recbole_mllm.settings import LoraSettings

LORA = {"finetune": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


@pytest.fixture(scope="session")
def plan(folder):
    return blueprint(str(folder), SETTINGS.mllm)


def test_parameters_and_bytes_are_those_of_the_loaded_model(plan, mllm):
    assert plan.body.device.type == "meta"
    real = {id(p): p for p in mllm.model.parameters()}.values()
    assert plan.anatomy.parameters == sum(p.numel() for p in real)
    assert plan.anatomy.weight_bytes(4) == sum(p.nbytes for p in real)
    assert plan.anatomy.weight_bytes(2, four_bit=True) < plan.anatomy.weight_bytes(2)


def test_a_tokens_keys_and_values_take_what_the_cache_holds(plan, mllm, prompts):
    one = min((mllm.encoder(prompt) for prompt in prompts), key=lambda e: (len(e.images), len(e.ids)))
    cache = mllm.body.new_cache()
    with torch.inference_mode():
        mllm.body.hidden([one], 0, [len(one.ids)], cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    planned = len(one.ids) * plan.anatomy.cache_bytes(4)
    kinds = getattr(mllm.body.config.get_text_config(), "layer_types", None) or []
    # a layer with a sliding window keeps the window alone, which a plan takes no account of
    assert held < planned if "sliding_attention" in kinds else held == planned


@pytest.mark.parametrize("settings", [("lora", "language"), ("lora", "all"), ("full", "language"), ("full", "all")])
def test_trained_parameters_are_those_that_training_has(plan, folder, settings):
    how = LoraSettings(**LORA | {"finetune": settings[0], "lora_target": settings[1]})
    model = tune(HFModel(str(folder), SETTINGS.mllm, CPU).model, how, 1)
    assert trained_parameters(plan.body.model, how) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_prompts_become_the_same_tokens(plan, mllm, prompts):
    for prompt in prompts:
        ours, real = plan.encoder(prompt), mllm.encoder(prompt)
        assert (ours.ids, [i.key for i in ours.images]) == (real.ids, [i.key for i in real.images])


@contextmanager
def _counting():
    """Count operations as torch does; its fused attention on a CPU is not counted, plain products are."""
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def test_text_takes_the_operations_that_torch_counts(plan, mllm, prompts):
    one = min((mllm.encoder(prompt) for prompt in prompts), key=lambda e: (len(e.images), len(e.ids)))
    length = len(one.ids)
    with _counting() as counter:
        mllm.body.logits(mllm.body.hidden([one], 0, [length], None)[0])
    planned = read_flops(plan.anatomy, [Pass(1, 0, length, length, 0)]) + head_flops(plan.anatomy, length)
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_an_image_takes_about_the_operations_that_torch_counts(plan, mllm, images, sees):
    if not sees:
        assert plan.anatomy.vision == plan.anatomy.projector == Part()
        return
    for path in images.values():
        image = mllm.encoder.image(path)
        with _counting() as counter:
            mllm.body._encode(image)
        planned = image_flops(plan.anatomy, plan.encoder.image(path).tensors, len(image.ids))
        assert planned == pytest.approx(counter.get_total_flops(), rel=0.15)


@pytest.fixture
def ran(mllm, monkeypatch):
    """The passes that the model really makes: (rows, first token, tokens of all rows)."""
    passes, real = [], mllm.body.hidden

    def hidden(rows, start, stops, cache):
        passes.append((len(rows), start, sum(stop - start for stop in stops)))
        return real(rows, start, stops, cache)

    monkeypatch.setattr(mllm.body, "hidden", hidden)
    return passes


@pytest.mark.parametrize("gain", [1, 40, 512])
def test_scoring_makes_the_passes_that_are_planned(plan, mllm, prompts, ran, tokens, monkeypatch, gain):
    for module in ("mllm.scoring", "mllm.passes"):
        monkeypatch.setattr(f"recbole_mllm.{module}._LEAST_GAIN", gain)
    answers = mllm.answers(STYLE)
    mllm.yes_scores(prompts, answers)
    planned = scoring_passes(plan.body, plan_encoded := [plan.encoder(prompt) for prompt in prompts], share=True)
    assert sorted((p.rows, p.before, p.tokens) for p in planned) == sorted(ran)
    ran.clear()
    mllm.yes_scores(prompts, answers, share_prefix=False)
    planned = scoring_passes(plan.body, plan_encoded, share=False)
    assert sorted((p.rows, p.before, p.tokens) for p in planned) == sorted(ran)


@pytest.mark.parametrize("size", [None, 2, 5])
@pytest.mark.parametrize("share", [True, False])
def test_training_makes_the_passes_that_are_planned(plan, mllm, prompts, ran, size, share):
    answers = mllm.answers(STYLE)
    told = [answers.yes, answers.no] * len(prompts)
    share = share and can_share(mllm.body)
    examples = make_examples([mllm.encoder(prompt) for prompt in prompts], told[: len(prompts)])
    ours = make_examples([plan.encoder(prompt) for prompt in prompts], told[: len(prompts)])
    with torch.no_grad():
        for part in micro_batches(mllm.body, examples, size, share=share):
            example_loss(mllm.body, [examples[i] for i in part], share=share)
    planned = [one for part in training_passes(plan.body, ours, size, share=share) for one in part]
    assert [(p.rows, p.before, p.tokens) for p in planned] == ran
