"""Summarisers behind real `transformers serve`: the texts of this process, whoever is slow or killed."""

import shutil
import signal
import sys
import threading
import time
from dataclasses import replace

import pytest
import small_world
import torch
import yaml
from PIL import Image
from transformers_serve import TransformersServe

from recbole_mllm.cli import main
from recbole_mllm.common.endpoints import Endpoint, parse_endpoint
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.model_names import source_of
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
from recbole_mllm.demo.attributes import VALUES
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.interface import Ask, Batch, Decoding, answers_of
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


def test_it_takes_the_wish_for_no_thought_with_images_and_without(served, prompts):
    some = [prompts[0], prompts[-1]]
    quiet = asked(served.endpoint, some, settings=replace(SETTINGS, server_thinking="off"))
    assert [a.text for a in quiet] == [a.text for a in asked(served.endpoint, some)]  # its template knows of none


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


CHAINS, STEPS = 24, 3


class Chains:
    """Work in which each prompt but the first of a chain holds the answer before it."""

    def __init__(self):
        self.waiting, self.texts = [(n, 0, "") for n in range(CHAINS)], {}
        self.at = {}  # what to do when so many answers are there

    def take(self, count):
        out, self.waiting = self.waiting[:count], self.waiting[count:]
        return [Ask((chain, step), prompt(chain, step, text), Decoding(10)) for chain, step, text in out]

    def give(self, arrived):
        for (chain, step), answer in arrived:
            self.texts[chain, step] = answer.text
            if step + 1 < STEPS:
                self.waiting.append((chain, step + 1, answer.text))
            if act := self.at.pop(len(self.texts), None):
                act()


def prompt(chain, step, previous):
    colours, patterns = VALUES["colour"], VALUES["pattern"]
    colour, pattern = colours[(chain + step) % len(colours)], patterns[chain % len(patterns)]
    line = item_line(STYLE, f"Mug {chain}", f"A {colour} {pattern} mug, wood scene.")
    return preference_prompt(STYLE, [line], previous or None)


@pytest.fixture
def servers(tmp_path):
    made = []
    try:
        for name in ("slow", "killed", "well"):
            (tmp_path / name).mkdir()
            made.append(TransformersServe(MODEL, tmp_path / name))
        yield [server.wait() for server in made]
    finally:
        for server in made:
            server.process.send_signal(signal.SIGCONT)
            server.kill()


class Slow:
    """Lets a process run for a tenth of the time."""

    def __init__(self, process):
        self.process, self.done = process, threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        while not self.done.wait(0.1):
            self.process.send_signal(signal.SIGSTOP)
            time.sleep(0.9)
            self.process.send_signal(signal.SIGCONT)

    def __enter__(self):
        self.thread.start()

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()


@pytest.mark.slow
def test_a_slow_one_and_one_killed_and_started_again_change_no_text(servers, local, tmp_path, caplog):
    slow, killed, well = servers
    urls = tuple(f"http://127.0.0.1:{server.port}/v1" for server in servers)
    model = ServerModel(Endpoint(MODEL, urls), SETTINGS)
    chains = Chains()
    chains.at = {12: killed.kill, 30: killed.start}
    with Slow(slow.process):
        model.write(chains)
    assert not chains.at and "set aside" in caplog.text and f":{killed.port}" in caplog.text
    assert killed.process.poll() is None and len(chains.texts) == CHAINS * STEPS
    truth = {}
    last = [""] * CHAINS
    for step in range(STEPS):
        last = [a.text for a in answers_of(local, [prompt(n, step, text) for n, text in enumerate(last)], Decoding(10))]
        truth |= {(n, step): text for n, text in enumerate(last)}
    assert chains.texts == truth and len(set(truth.values())) > 10
    # it came back, and is asked again
    killed.wait()
    again = Batch([text_summary_prompt(STYLE, f"later {n}") for n in range(12)], Decoding(10))
    ServerModel(Endpoint(MODEL, urls[1:2]), SETTINGS).write(again)
    assert len(again.answers) == 12
