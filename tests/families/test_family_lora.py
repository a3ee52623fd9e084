"""Which layers LoRA adapts in every family."""

from torch import nn

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
