"""Loading models: one-file weights, what is missing said in one line, and a load that leaves transformers as it was."""

import importlib.util
import os
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import tiny_models
import torch
from stock_forward import CPU, SETTINGS, STYLE
from tiny_models import gguf_file
from transformers import ProcessorMixin

from recbole_mllm.errors import UserError
from recbole_mllm.mllm import sources
from recbole_mllm.mllm.base import Decoding, answers_of
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.processors import NoVideos, load_processor
from recbole_mllm.mllm.sources import identity_of
from recbole_mllm.prompts import recommend_prompt

PROMPTS = [recommend_prompt(STYLE, f"likes {what}", "a mug", None) for what in ("cats", "</s> dogs", "red [INST] cars")]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def file(llama, tmp_path_factory):
    return gguf_file.write(llama, tmp_path_factory.mktemp("gguf") / "tiny-f32.gguf")


def _scores(name):
    model = HFModel(str(name), SETTINGS.mllm, CPU)
    return model.yes_scores(PROMPTS, model.answers(STYLE))


def test_a_gguf_file_scores_as_the_folder_it_was_made_from(llama, file):
    own = _scores(llama)
    assert own.std() > 1e-3
    assert torch.allclose(_scores(file), own, atol=1e-5)
    assert torch.allclose(_scores(file.parent), own, atol=1e-5)


def test_a_gguf_file_is_named_by_its_bytes(file, tmp_path):
    copy = tmp_path / file.name
    shutil.copy(file, copy)
    assert identity_of(str(copy), None) == identity_of(str(file), None)
    with copy.open("ab") as more:
        more.write(b"x")
    assert identity_of(str(copy), None) != identity_of(str(file), None)


def test_what_is_wrong_with_a_gguf_is_one_line(file, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is not there"):
        HFModel(str(tmp_path / "absent.gguf"), SETTINGS.mllm, CPU)
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(file, tmp_path / name)
    with pytest.raises(UserError, match="holds 2 .gguf files"):
        HFModel(str(tmp_path), SETTINGS.mllm, CPU)
    find = importlib.util.find_spec
    monkeypatch.setattr(sources, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(UserError, match=r"pip install 'recbole-mllm\[gguf\]'"):
        HFModel(str(file), SETTINGS.mllm, CPU)


@pytest.mark.slow
@pytest.mark.skipif("RECBOLE_MLLM_GGUF" not in os.environ, reason="RECBOLE_MLLM_GGUF names a real model's .gguf file")
def test_a_real_gguf_prefers_what_the_user_likes():
    model = HFModel(str(Path(os.environ["RECBOLE_MLLM_GGUF"])), SETTINGS.mllm, CPU)
    answers = model.answers(STYLE)
    assert answers.yes[0] != answers.no[0]
    assert torch.isfinite(model.yes_scores(PROMPTS, answers)).all()
    assert answers_of(model, PROMPTS[:1], Decoding(8))[0].text


@pytest.mark.parametrize("build", [tiny_models.qwen2_5_vl, tiny_models.smolvlm], ids=lambda build: build.__name__)
def test_a_processor_is_loaded_without_its_videos_and_transformers_stays_as_it_was(build, tmp_path):
    """Qwen-VL's wants torchvision for them, SmolVLM's num2words."""
    video = import_module("transformers.models.auto.video_processing_auto").AutoVideoProcessor
    smolvlm = import_module("transformers.models.smolvlm.processing_smolvlm")
    before = vars(video)["from_pretrained"], ProcessorMixin.check_argument_for_proper_class, smolvlm.num2words
    processor = load_processor(str(build(tmp_path)))
    assert isinstance(processor.video_processor, NoVideos)
    after = vars(video)["from_pretrained"], ProcessorMixin.check_argument_for_proper_class, smolvlm.num2words
    assert after == before
    with pytest.raises(UserError, match="videos need torchvision"):
        processor.video_processor("clip.mp4")
    processor.save_pretrained(tmp_path / "again")
    assert type(load_processor(str(tmp_path / "again"))) is type(processor)
