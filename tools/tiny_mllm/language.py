"""The tiny MLLM's tokenizer, chat template and processor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import yaml

from recbole_mllm.common.prompts import Prompt, Style
from recbole_mllm.demo.attributes import BRANDS, FIELDS, VALUES
from tiny_mllm.settings import IMAGE_SIDE, PATCH, ROOT

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "[INST]", "[/INST]")
PAD, BOS, EOS, UNKNOWN, IMAGE_ID = range(5)
VOCABULARY = 600

# An image part becomes exactly "<image>" and a text part itself, so parts cut at the marks rejoin to the style's text.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}[INST] {% else %} {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'user' %} [/INST]{% else %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


def demo_style() -> Style:
    """Read the one wording the tiny MLLM is trained on."""
    path = ROOT / "properties" / "prompt" / "demo.yaml"
    return Style.from_mapping("demo", yaml.safe_load(path.read_text(encoding="utf-8")))


def save_processor(texts: Iterator[str], folder: Path) -> None:
    """Train the tokenizer on `texts` and save it with the image processor and the chat template.

    Every value of every field is one token, the same in captions, summaries and titles: that is what lets so small a
    model compare them.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=512,
    )
    half = [0.5, 0.5, 0.5]
    LlavaProcessor(
        image_processor=SiglipImageProcessorPil(
            size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}, image_mean=half, image_std=half
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=0,
    ).save_pretrained(folder)
    value_tokens(load_tokenizer(folder))


def vocabulary_words(rng: Random) -> str:
    """Return all values and brands in a random order, so that each becomes a token of its own."""
    words = [value for field in FIELDS for value in VALUES[field]] + list(BRANDS)
    rng.shuffle(words)
    return " " + " ".join(words)


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a saved processor."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder).tokenizer


def value_tokens(tokenizer: Any) -> dict[tuple[str, str], int]:
    """Return the token of each (field, value)."""
    return {(field, value): one_token(tokenizer, f" {value}") for field in FIELDS for value in VALUES[field]}


def one_token(tokenizer: Any, text: str) -> int:
    """Return the id of `text`, which must be a single token."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"{text!r} takes {len(ids)} tokens; the tiny MLLM needs it to be one")
    return ids[0]


def rendered(tokenizer: Any, prompt: Prompt, answer: str) -> tuple[str, str]:
    """Return what the chat template makes of the question and of the answer after it."""
    question = [{"role": "user", "content": prompt.text}]
    asked: str = tokenizer.apply_chat_template(question, tokenize=False)
    told: str = tokenizer.apply_chat_template([*question, {"role": "assistant", "content": answer}], tokenize=False)
    if not told.startswith(asked):
        raise ValueError(f"the chat template changes the question when it is answered: {told!r}")
    return asked, told[len(asked) :]
