"""What a long run holds does not grow with its length."""

import gc
import weakref

import pytest
import tiny_models
import torch
from PIL import Image
from stock_forward import CPU, SETTINGS, STYLE

from recbole_mllm.common.prompts import recommend_prompt
from recbole_mllm.mllm import scoring
from recbole_mllm.mllm.backbone import Backbone
from recbole_mllm.mllm.hf import HFModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.llava(tmp_path_factory.mktemp("llava"))


def _prompts(place, items):
    """Three users of each of so many items, each with an image of its own."""
    out = []
    for n in range(items):
        path = place / f"{n}.png"
        Image.new("RGB", (40, 30), (n % 256, n // 256, 90)).save(path)
        out += [recommend_prompt(STYLE, f"likes {word}", f"mug {n}", path) for word in ("cats", "dogs", "red things")]
    return out


def _tensors():
    gc.collect()
    return sum(t.nbytes for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter))


def test_scoring_more_items_holds_no_more_caches_and_leaves_no_more_tensors(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "LEAST_GAIN", 1)
    monkeypatch.setattr("recbole_mllm.mllm.backbone.FEATURE_BYTES", 40_000)
    monkeypatch.setattr("recbole_mllm.mllm.encoder.IMAGE_BYTES", 100_000)
    monkeypatch.setattr("recbole_mllm.mllm.hf.IMAGE_BYTES", 100_000)
    alive, most = weakref.WeakSet(), []

    def seen(make):
        def made(*args):
            cache = make(*args)
            alive.add(cache)
            most.append(len(alive))
            return cache

        return made

    monkeypatch.setattr(Backbone, "new_cache", seen(Backbone.new_cache))
    monkeypatch.setattr(scoring, "fork", seen(scoring.fork))
    mllm = HFModel(str(folder), SETTINGS.mllm, CPU)
    answers, left = mllm.answers(STYLE), {}
    for items in (20, 20, 60):
        mllm.yes_scores(_prompts(tmp_path, items), answers)
        assert len(most) >= items  # one an item at least
        left[items] = _tensors(), max(most), len(alive)
        most.clear()
    assert left[60][1] == left[20][1] <= 6 and left[60][2] == 0
    assert left[60][0] <= 1.02 * left[20][0]
