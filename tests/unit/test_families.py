"""Every family of models against transformers' own processor call and plain forward pass of one prompt at a time."""

from itertools import product

import pytest
import tiny_models
import torch
import yaml
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from recbole_mllm.mllm import scoring
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.prompts import IMAGE, Style, recommend_prompt
from recbole_mllm.resources import PROPERTIES
from recbole_mllm.settings import Settings

SETTINGS = Settings.from_config(yaml.safe_load((PROPERTIES / "model" / "MLLMMSR.yaml").read_text()))
STYLE = Style.from_mapping("demo", yaml.safe_load((PROPERTIES / "prompt" / "demo.yaml").read_text()))
IMAGES = {"red": (40, 30), "blue": (96, 33), "green": (30, 70)}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    place = tmp_path_factory.mktemp("images")
    for colour, size in IMAGES.items():
        picture = Image.new("RGB", size, colour)
        picture.paste("white", (3, 5, size[0] // 2, size[1] // 2))
        picture.save(place / f"{colour}.png")
    return place


@pytest.fixture(scope="module", params=tiny_models.FAMILIES, ids=lambda build: build.__name__)
def folder(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp(request.param.__name__))


@pytest.fixture(scope="module")
def mllm(folder):
    return HFModel(str(folder), SETTINGS.mllm, CPU)


@pytest.fixture(scope="module")
def stock(folder):
    """The model as transformers loads it; nothing of ours touches it."""
    auto = AutoModelForCausalLM if folder.name.startswith("llama") else AutoModelForImageTextToText
    return auto.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def prompts(mllm, images):
    """Both orders, long and short texts, images of three shapes and none, in no order."""
    likes = ["likes cats", "The user likes a very long list of dogs, and other animals", "red"]
    shown = [images / f"{colour}.png" for colour in IMAGES] if mllm.encoder.processor else []
    every = product(likes, [*shown, None], (True, False))
    made = [
        recommend_prompt(STYLE, preference, f"the {image.stem if image else 'plain'} mug", image, item_first=first)
        for preference, image, first in every
    ]
    return [*made[::3], *made[1::3], *made[2::3]]


def _own_inputs(mllm, prompt):
    """What the model's own processor makes of the prompt, template and all."""
    processor, tokenizer = mllm.encoder.processor, mllm.encoder.tokenizer
    pictures = [Image.open(path) for path in prompt.images]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
    if processor is None:
        return tokenizer.apply_chat_template([{"role": "user", "content": prompt.text}], **options)
    if not processor.chat_template and not pictures:  # PaliGemma's processor knows no prompt without an image
        return tokenizer(f"<bos>{prompt.text}\n", return_tensors="pt", add_special_tokens=False)
    if not processor.chat_template:
        return processor(text=prompt.text, images=pictures, return_tensors="pt")
    left = iter(pictures)
    head, *tails = prompt.text.split(IMAGE)
    content = [{"type": "text", "text": head}] if head else []
    for tail in tails:
        content += [{"type": "image", "image": next(left)}, *([{"type": "text", "text": tail}] if tail else [])]
    return processor.apply_chat_template([{"role": "user", "content": content}], **options)


def _own_logits(mllm, stock, prompt):
    """The stock forward pass of one prompt alone, over the whole vocabulary."""
    inputs = {name: value for name, value in _own_inputs(mllm, prompt).items() if name != "labels"}
    if mllm.encoder.processor is not None and "paligemma" in stock.config.model_type:
        inputs.setdefault("token_type_ids", torch.zeros_like(inputs["input_ids"]))
    with torch.no_grad():
        return stock(**inputs).logits[0, -1].float()


@pytest.fixture(scope="module")
def expected(mllm, stock, prompts):
    """Yes and No logits of each prompt by the stock forward pass, ``[B, 2]``."""
    answers = mllm.answers(STYLE)
    own = torch.stack([_own_logits(mllm, stock, prompt) for prompt in prompts])
    return own[:, [answers.yes[0], answers.no[0]]]


def test_the_ids_are_those_of_the_processor_itself(mllm, prompts):
    for prompt in prompts:
        own = _own_inputs(mllm, prompt)["input_ids"][0].tolist()
        ids = list(mllm.encoder(prompt).ids)
        assert ids == own, (mllm.encoder.tokenizer.decode(ids), mllm.encoder.tokenizer.decode(own))


def test_logits_depend_on_the_image_and_on_the_title(prompts, expected):
    margin = expected[:, 0] - expected[:, 1]
    for one, other in (("red", "blue"), ("mug", "mug")):
        del one, other
    assert margin.std() > 0.05


@pytest.mark.parametrize("share", [True, False], ids=["shared", "flat"])
def test_logits_equal_the_plain_forward(mllm, prompts, expected, share, monkeypatch):
    monkeypatch.setattr(scoring, "_LEAST_GAIN", 1)
    answers = mllm.answers(STYLE)
    encoded = mllm.encode(prompts)
    with torch.inference_mode():
        got = scoring.yes_logits(mllm.body, encoded, (answers.yes[0], answers.no[0]), share_prefix=share)
    assert (got - expected).abs().max() < 1e-5
