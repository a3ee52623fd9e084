"""A model without its weights: it encodes prompts, and says in which passes they would be computed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from recbole_mllm.data.images import image_digest
from recbole_mllm.errors import UserError
from recbole_mllm.mllm.anatomy import Anatomy, anatomy_of
from recbole_mllm.mllm.encode import AnswerTokens, Encoder, ImageInput, answer_tokens
from recbole_mllm.mllm.forward import Body
from recbole_mllm.mllm.hf import positions_of
from recbole_mllm.mllm.loading import UNREADABLE
from recbole_mllm.mllm.processors import load_processor
from recbole_mllm.mllm.sources import gguf_of, source_of
from recbole_mllm.prompts import Style
from recbole_mllm.settings import MLLMSettings

_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)


@dataclass(frozen=True, slots=True)
class Blueprint:
    """`body` stands on the meta device: it has shapes and no numbers."""

    name: str
    body: Body
    encoder: Encoder
    anatomy: Anatomy

    def answers(self, style: Style) -> AnswerTokens:
        """Return the tokens of the style's Yes and No as they follow a prompt."""
        return answer_tokens(self.encoder, style.answer_yes, style.answer_no)


@dataclass(slots=True)
class SizedEncoder(Encoder):
    """Preprocesses one image of each size: what an image becomes in tokens and patches follows from its size."""

    _by_size: dict[tuple[int, int], ImageInput] = field(default_factory=dict)
    _by_path: dict[Path, ImageInput] = field(default_factory=dict)

    def image(self, path: Path) -> ImageInput:
        """Return what an image of this size becomes, under the key of this one."""
        if path not in self._by_path:
            size = _size(path)
            if size not in self._by_size:
                self._by_size[size] = Encoder.image(self, path)
            self._by_path[path] = replace(self._by_size[size], key=image_digest(path))
        return self._by_path[path]


def blueprint(name: str, settings: MLLMSettings) -> Blueprint:
    """Read the config, tokeniser and processor of `name`.

    Raises:
        UserError: One of them is neither on this disk nor to be had.
    """
    transformers_logging.set_verbosity_error()
    source = source_of(name)
    options: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    if (file := gguf_of(source)) is not None:
        source, options["gguf_file"] = str(file.parent), file.name
    try:
        config = AutoConfig.from_pretrained(source, **options)
        sees = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and file is None
        processor = load_processor(source, **options) if sees else None
        tokenizer = processor.tokenizer if processor is not None else AutoTokenizer.from_pretrained(source, **options)
        model = _shapes(config, sees, settings.trust_remote_code)
    except UserError:
        raise
    except UNREADABLE as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"model {name!r} cannot be planned for: {reason}; a plan reads its config, tokenizer and processor files "
            f"and no weights: `hf download {name} --include '*.json' '*.jinja' '*.model' '*.txt'` fetches them"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    body = Body(model)
    limits = settings.max_text_tokens, body.architecture, positions_of(config)
    return Blueprint(name, body, SizedEncoder(tokenizer, processor, *limits), anatomy_of(model))


def _shapes(config: Any, sees: bool, trust: bool) -> Any:
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config, trust_remote_code=trust)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        width, height = image.size
        return (height, width) if image.getexif().get(_ORIENTATION, 1) in _TURNED else (width, height)
