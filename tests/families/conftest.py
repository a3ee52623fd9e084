"""One tiny model of each family, prompts for it, and what transformers itself makes of them."""

from functools import cache
from itertools import product

import pytest
import tiny_models
import torch
from PIL import Image
from stock_forward import CPU, SETTINGS, STYLE, own_inputs, own_logits
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from recbole_mllm.common.prompts import recommend_prompt
from recbole_mllm.mllm.hf import HFModel

SPREAD_BY_DEFAULT = {"llava_next", "qwen3_vl", "gemma3", "llama"}  # other families' models on disk: slow
IMAGES = {"red": (40, 30), "blue": (96, 33), "green": (30, 70)}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        family = getattr(getattr(item, "callspec", None), "params", {}).get("folder")
        if item.path.stem == "test_family_dispatch" and family.__name__ not in SPREAD_BY_DEFAULT:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Three images of different shapes, by name; also the first again, as another picture of the same size."""
    place = tmp_path_factory.mktemp("images")
    for colour, size in IMAGES.items():
        picture = Image.new("RGB", size, colour)
        picture.paste("white", (3, 5, size[0] // 2, size[1] // 2))
        picture.save(place / f"{colour}.png")
    Image.new("RGB", IMAGES["red"], "black").save(place / "black.png")
    return {colour: place / f"{colour}.png" for colour in (*IMAGES, "black")}


# a file's tests run family by family, and the next file begins with the first one again: each is made once a process
_FOLDERS = {}


@cache
def _mllm(folder):
    return HFModel(str(folder), SETTINGS.mllm, CPU)


@cache
def _stock(folder, kind):
    return kind.from_pretrained(folder).eval()


@pytest.fixture(scope="session", params=tiny_models.FAMILIES, ids=lambda build: build.__name__)
def folder(request, tmp_path_factory):
    if request.param not in _FOLDERS:
        _FOLDERS[request.param] = request.param(tmp_path_factory.mktemp(request.param.__name__))
    return _FOLDERS[request.param]


@pytest.fixture(scope="session")
def mllm(folder):
    """Shared by all tests of a family: whoever changes it changes it back."""
    return _mllm(folder)


@pytest.fixture(scope="session")
def sees(mllm):
    return mllm.encoder.processor is not None


@pytest.fixture(scope="session")
def stock(folder, sees):
    """The model as transformers loads it; nothing of ours touches it."""
    return _stock(folder, AutoModelForImageTextToText if sees else AutoModelForCausalLM)


@pytest.fixture(scope="session")
def own(mllm, stock):
    """The stock forward pass of one prompt: ``[V]`` logits at its end."""

    def last(prompt):
        return own_logits(stock, own_inputs(mllm.encoder.tokenizer, mllm.encoder.processor, prompt))[-1]

    return last


@pytest.fixture(scope="session")
def prompts(sees, images):
    """Both orders, long and short texts, images of three shapes and none, in no order."""
    likes = ["likes cats", "The user likes a very long list of dogs, and other animals", *([] if sees else ["red"])]
    shown = [images[colour] for colour in IMAGES] if sees else []
    made = [
        recommend_prompt(STYLE, preference, f"the {image.stem if image else 'plain'} mug", image, item_first=first)
        for preference, image, first in product(likes, [*shown, None], (True, False))
    ]
    return [*made[::3], *made[1::3], *made[2::3]]


@pytest.fixture(scope="session")
def tokens(mllm):
    """The first token of Yes and of No."""
    answers = mllm.answers(STYLE)
    return answers.yes[0], answers.no[0]


@pytest.fixture(scope="session")
def expected(own, prompts, tokens):
    """Yes and No logits of each prompt by the stock forward pass, ``[B, 2]``."""
    return torch.stack([own(prompt) for prompt in prompts])[:, list(tokens)]
