"""Loading models: one-file weights, what is missing said in one line, and a load that leaves transformers as it was."""

import importlib.util
import json
import shutil
from contextlib import nullcontext
from importlib import import_module

import pytest
import tiny_models
import torch
from stock_forward import CPU, SETTINGS, STYLE
from tiny_models import gguf_file
from transformers import ProcessorMixin

from recbole_mllm.common import model_names
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.model_names import identity_of
from recbole_mllm.common.prompts import recommend_prompt
from recbole_mllm.mllm import loading
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.loading import NoVideos, load, load_processor

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


def test_a_gguf_file_scores_as_the_folder_it_was_made_from_and_is_read_in_silence(llama, file, capfd):
    own = _scores(llama)
    assert own.std() > 1e-3
    capfd.readouterr()
    assert torch.allclose(_scores(file), own, atol=1e-5)
    assert "".join(capfd.readouterr()) == ""
    assert torch.allclose(_scores(file.parent), own, atol=1e-5)


def test_weights_are_named_by_their_bytes_not_by_their_place(llama, file, tmp_path):
    for source, inside in ((llama, "config.json"), (file, "")):
        copy = tmp_path / source.name
        shutil.copytree(source, copy) if inside else shutil.copy(source, copy)
        assert identity_of(str(copy)) == identity_of(str(source))
        with (copy / inside if inside else copy).open("ab") as more:
            more.write(b"x")
        assert identity_of(str(copy)) != identity_of(str(source))


def test_what_is_wrong_with_a_gguf_is_one_line(file, tmp_path, monkeypatch):
    for name, message in (("absent.gguf", "is not there"), ("absent", "cannot be loaded")):
        with pytest.raises(UserError, match=message):
            HFModel(str(tmp_path / name), SETTINGS.mllm, CPU)
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(file, tmp_path / name)
    with pytest.raises(UserError, match="holds 2 .gguf files"):
        HFModel(str(tmp_path), SETTINGS.mllm, CPU)
    find = importlib.util.find_spec
    monkeypatch.setattr(model_names, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(UserError, match=r"pip install 'recbole-mllm\[gguf\]'"):
        HFModel(str(file), SETTINGS.mllm, CPU)


def _changed(config):
    """Return what spoils a folder: its config says otherwise."""

    def spoil(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))

    return spoil


def _cut(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def _adapter_alone(folder):
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/model"}')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_changed({"num_hidden_layers": 4}), r"not whole: 9 of its weights are in no file \(model.layers.3."),
        (_changed({"intermediate_size": 96}), "its weights have other shapes than its config.json says"),
        (_cut, "damaged or do not belong together .SafetensorError"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "damaged or do not belong together"),
        (_adapter_alone, "an adapter of 'some/model', no whole model; `recbole-mllm export RUN --out DIR --merge`"),
    ],
    ids=["layers", "shapes", "cut", "tokenizer", "adapter"],
)
def test_a_folder_that_is_no_whole_model_is_refused_in_one_line(llama, tmp_path, spoil, message):
    """Layers in no file would be random numbers, and answer all the same."""
    spoil(shutil.copytree(llama, tmp_path / "model"))
    with pytest.raises(UserError, match=message) as raised:
        HFModel(str(tmp_path / "model"), SETTINGS.mllm, CPU)
    assert "\n" not in str(raised.value)


def test_a_transformers_that_would_not_read_images_is_refused(llama, monkeypatch):
    for found, old in (("5.17.0", True), ("5.22.2", True), ("5.23.0", False), ("5.24rc1", False), ("6.0", False)):
        monkeypatch.setattr(loading.transformers, "__version__", found)
        with pytest.raises(UserError, match=f"transformers {found} is too old") if old else nullcontext():
            load(str(llama), torch.float32, CPU)


def test_a_tower_that_is_not_whole_is_told_of(tmp_path, caplog):
    folder = tiny_models.llava(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    HFModel(str(folder), SETTINGS.mllm, CPU)
    assert "16 of its weights are in no file" in caplog.text and "is the download complete?" in caplog.text


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
