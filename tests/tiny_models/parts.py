"""What the tiny models share: sizes, weights that make logits depend on the context, and how a folder is written."""

import json
import shutil
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel

# A language model of 3 layers; 64 wide, 4 heads of 16 that share 2 pairs of keys and values
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
# A vision tower of 2 layers over images of 32 x 32 in patches of 8
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_MADE = TemporaryDirectory()


def made_once(build: Callable[..., Path]) -> Callable[..., Path]:
    """Let a process make each model once, and copy it from then on: many tests begin with the same one."""

    @wraps(build)
    def built(folder: Path, **how: Any) -> Path:
        source = Path(_MADE.name) / f"{build.__name__} {how}"
        if not source.is_dir():
            build(source, **how)
        return Path(shutil.copytree(source, folder, dirs_exist_ok=True))

    return built


def ids(words: Any, **names: str) -> dict[str, int]:
    """Return the token id of each named spelling."""
    return {name: words.convert_tokens_to_ids(spelling) for name, spelling in names.items()}


def settle(model: torch.nn.Module) -> None:
    """Scale the weights so that logits depend on the context: at default size an exactness test cannot fail."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                # Gemma3's projector begins at zero: a model that sees no image
                parameter.mul_(3) if parameter.any() else parameter.normal_(std=0.1)


def write(
    folder: Path, model: type[PreTrainedModel], config: Any, *parts: Any, seed: int = 0, **processor: Any
) -> Path:
    """Write random weights of `config`, the `parts` of its processor, and what else the processor is told."""
    torch.manual_seed(seed)
    made = model(config)
    settle(made)
    made.save_pretrained(folder)
    for part in parts:
        part.save_pretrained(folder)
    if processor:
        (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder
