"""Summarisers behind real `transformers serve`: the texts of this process."""

import shutil
import sys

import pytest
import small_world
import torch
import yaml
from PIL import Image
from transformers_serve import TransformersServe

from recbole_mllm.cli import main
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.model_names import parse_endpoint, source_of
from recbole_mllm.common.prompts import (
    Style,
    fused_summary_prompt,
    image_summary_prompt,
    item_line,
    preference_prompt,
    text_summary_prompt,
)
from recbole_mllm.common.resources import PROPERTIES, resource
from recbole_mllm.common.settings import ServerSettings, Settings
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.interface import Decoding, answers_of
from recbole_mllm.mllm.server import ServerModel

pytest.importorskip("openai")
pytest.importorskip("uvicorn")

STYLE = Style.from_mapping("demo", yaml.safe_load(resource("prompt", "demo").read_text()))
BASE = yaml.safe_load((PROPERTIES / "model" / "MLLMMSR.yaml").read_text())
SETTINGS = ServerSettings(4, 60.0, 90.0, None)
LENGTH = Decoding(14)
KEY = "sk-no-file-may-hold-this"
MODEL = source_of("tiny")  # a server loads a local folder under its path


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with TransformersServe(MODEL, tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture(scope="module")
def local():
    return HFModel("tiny", Settings.from_config(BASE).mllm, torch.device("cpu"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    kinds = {"red.png": ("RGB", "red"), "blue.jpg": ("RGB", "blue"), "half.png": ("RGBA", (0, 128, 0, 128))}
    paths = []
    for name, (mode, colour) in kinds.items():
        Image.new(mode, (48, 64), colour).save(folder / name)
        paths.append(folder / name)
    lines = [item_line(STYLE, f"Mug {n}", "A red plain mug, wood scene.") for n in range(3)]
    return [
        *(image_summary_prompt(STYLE, path) for path in paths),
        *(text_summary_prompt(STYLE, f"Title {n} of ünïcode") for n in range(4)),
        fused_summary_prompt(STYLE, "a red mug", "Mug"),
        preference_prompt(STYLE, lines, None),
        preference_prompt(STYLE, lines, "The user prefers red."),
    ]


def asked(endpoint, prompts, decoding=LENGTH, settings=SETTINGS):
    model = ServerModel(parse_endpoint(endpoint, "item_summarizer"), settings)
    return answers_of(model, prompts, decoding)


def test_text_and_image_prompts_are_answered_as_in_this_process(served, local, prompts):
    here = [answers_of(local, [prompt], LENGTH)[0] for prompt in prompts]
    there = asked(served.endpoint, prompts)
    assert [a.text for a in there] == [a.text for a in here]
    assert [a.prompt_tokens for a in there] == [a.prompt_tokens for a in here]
    assert len({a.text for a in here}) > 4  # they do depend on the prompt
    assert all(a.truncated == (a.new_tokens >= LENGTH.max_new_tokens) for a in there)
    assert {a.truncated for a in there} == {True, False}


def test_a_model_it_does_not_serve_is_refused_with_its_own_words(served, prompts):
    other = served.endpoint.replace(MODEL, "another/model")
    with pytest.raises(UserError, match="Server is pinned to"):
        asked(other, prompts[3:6])


def test_summaries_made_through_a_server_need_no_server_once_imported(served, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["recbole-mllm"])
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in "ab":
        small_world.write(tmp_path / "dataset" / name)
        shutil.move(tmp_path / "dataset" / name / "steps", tmp_path / "dataset" / "steps")
        words = f"summarize --dataset steps --limit_users 3 --train_last_k=1 --item_summarizer={served.endpoint}"
        words += f" --user_summarizer={served.endpoint} --prompt_style=demo"
        words += " --item_summary_tokens=10 --user_summary_tokens=12"
        if name == "a":
            assert main(words.split()) == 0
            assert main(["store", "export", "steps", "--out", "published.jsonl.gz"]) == 0
            made = {p.name: p.read_bytes() for p in (tmp_path / "dataset" / "steps").glob("*.?sum")}
            shutil.move(tmp_path / "dataset" / "steps", tmp_path / "gone")
        else:
            assert main(["store", "import", "steps", "published.jsonl.gz"]) == 0
            assert main(words.replace(str(served.port), "9").split() + ["--summarize=off"]) == 0
            assert made == {p.name: p.read_bytes() for p in (tmp_path / "dataset" / "steps").glob("*.?sum")}
    assert len(made) == 2 and all(len(data.splitlines()) > 10 for data in made.values())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".log" for path in files)
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
