"""Which layers LoRA adapts in every family."""

import torch
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from recbole_mllm.mllm.loading import quantized
from recbole_mllm.mllm.lora import target_modules


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
