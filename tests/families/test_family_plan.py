"""What a plan takes from a config alone, against the loaded model of each family."""

import copy
from contextlib import contextmanager

import pytest
import torch
from stock_forward import SETTINGS, STYLE
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.quantizers.quantizers_utils import should_convert_module

from recbole_mllm.common.prompts import recommend_prompt
from recbole_mllm.common.settings import LoraSettings
from recbole_mllm.mllm.loading import quantized
from recbole_mllm.mllm.lora import target_modules, tune
from recbole_mllm.mllm.loss import example_loss, make_examples
from recbole_mllm.plan.cost import flops, trained_parameters
from recbole_mllm.plan.counting import PlannedModel

LORA = {"finetune": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


@pytest.fixture(scope="session")
def plan(folder):
    return PlannedModel(str(folder), SETTINGS.mllm)


@contextmanager
def counting():
    """Count operations as torch does; its fused attention on a CPU is not counted, plain products are."""
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def test_weights_and_prompts_are_those_of_the_loaded_model(plan, mllm, prompts):
    real = {id(p): p for p in mllm.model.parameters()}.values()
    assert plan.device.type == "meta" and plan.sizes.parameters == sum(p.numel() for p in real)
    assert plan.sizes.weight_bytes(4) == sum(p.nbytes for p in real)
    assert plan.sizes.weight_bytes(2, four_bit=True) < plan.sizes.weight_bytes(2)
    for prompt in prompts:
        ours, theirs = plan.encoder(prompt), mllm.encoder(prompt)
        assert (ours.ids, [i.key for i in ours.images]) == (theirs.ids, [i.key for i in theirs.images])


@pytest.mark.parametrize("settings", [("lora", "all"), ("full", "language")])
def test_trained_parameters_are_those_that_training_has(plan, mllm, settings):
    how = LoraSettings(**LORA | {"finetune": settings[0], "lora_target": settings[1]})
    model = tune(copy.deepcopy(mllm.model), how, 1)
    assert trained_parameters(plan.model, how) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_text_takes_the_operations_and_the_cache_that_torch_shows(plan, mllm, prompts):
    shortest = min(prompts, key=lambda prompt: (len(prompt.images), len(mllm.encoder(prompt).ids)))
    one, cache = mllm.encoder(shortest), mllm.backbone.new_cache()
    with counting() as counter:
        mllm.backbone.logits(mllm.backbone.hidden([one], 0, [len(one.ids)], cache)[0])
    planned = flops(plan.sizes, plan.count_written(shortest, len(one.ids)))
    assert planned["prompt"] + planned["head"] == pytest.approx(counter.get_total_flops(), rel=0.03)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    kinds = getattr(mllm.backbone.config.get_text_config(), "layer_types", None) or []
    # a layer with a sliding window keeps the window alone, which a plan takes no account of
    all_of_it = len(one.ids) * plan.sizes.cache_bytes(4)
    assert held < all_of_it if "sliding_attention" in kinds else held == all_of_it


def test_an_image_takes_about_the_operations_that_torch_counts(plan, mllm, images, sees):
    assert sees or plan.sizes.vision == plan.sizes.projector == 0
    for path in images.values() if sees else ():
        image = mllm.encoder.image(path)
        with counting() as counter:
            mllm.backbone._encode(image)
        planned = plan.sizes.image_flops(plan.encoder.image(path).tensors, len(image.ids))
        assert planned == pytest.approx(counter.get_total_flops(), rel=0.15)


def test_scoring_and_training_compute_the_tokens_that_are_planned(plan, mllm, images, sees, monkeypatch):
    ran, real = [], mllm.backbone.hidden

    def hidden(rows, start, stops, cache):
        ran.append(sum(stop - start for stop in stops))
        return real(rows, start, stops, cache)

    monkeypatch.setattr(mllm.backbone, "hidden", hidden)
    items = {path.stem: path if sees else None for path in images.values()}
    many = [  # a few items, each asked about for many users, as a run does
        recommend_prompt(STYLE, f"likes {n} cats", f"the {name} mug" + " in its box" * 20, image, item_first=True)
        for name, image in items.items()
        for n in range(20)
    ]
    mllm.yes_scores(many, mllm.answers(STYLE))
    ours, theirs = ([encoder(prompt) for prompt in many] for encoder in (plan.encoder, mllm.encoder))
    planned = plan.count_scored(ours, share=True)
    assert planned.computed == sum(ran)
    assert planned.prompts == len(many) and planned.tokens == sum(len(prompt.ids) for prompt in theirs)
    ran.clear()
    yes = [mllm.answers(STYLE).yes] * 8
    with torch.no_grad():
        example_loss(mllm.backbone, make_examples(theirs[:8], yes), whole=True, share=True)
    planned = plan.count_trained(make_examples(ours[:8], yes), None, whole=True, share=True)
    assert planned.computed == sum(ran) and planned.predicted > 8


# Which layers LoRA adapts


def _linears(module, prefix=""):
    return {f"{prefix}{name}" for name, part in module.named_modules() if isinstance(part, nn.Linear)}


def test_language_is_the_whole_decoder_and_nothing_else(stock):
    decoder = stock.get_decoder()
    path = next(name for name, module in stock.named_modules() if module is decoder)
    assert set(target_modules(stock, "language")) == _linears(decoder, f"{path}.")


def test_all_is_every_linear_layer_but_head_and_projector(stock, sees):
    """The released code's rule, which adapts the vision tower too."""
    adapted = set(target_modules(stock, "all"))
    spared = _linears(stock) - adapted
    words = ("lm_head", "projector", "connector", "merger", "modality_projection")
    assert all(any(word in name for word in words) for name in spared) and "lm_head" in spared
    assert (
        adapted > set(target_modules(stock, "language")) if sees else adapted == set(target_modules(stock, "language"))
    )
    assert not sees or len(spared) > 1 or any("projector" in name for name, _ in stock.named_modules())


def test_qlora_quantises_the_layers_lora_adapts_and_no_other(stock):
    how = quantized(torch.bfloat16, torch.device("cuda", 0))["quantization_config"]
    assert how.load_in_4bit and how.bnb_4bit_quant_type == "nf4"
    in_four_bits = {name for name in _linears(stock) if should_convert_module(name, how.llm_int8_skip_modules)}
    assert in_four_bits == set(target_modules(stock, "language"))
