"""Several real `transformers serve` processes, one slow, one killed and started again: the texts are those of one."""

import random
import signal
import threading
import time

import pytest
import torch
from test_transformers_serve import BASE, MODEL, SETTINGS, STYLE, Served

from recbole_mllm.common.endpoints import Endpoint
from recbole_mllm.demo.attributes import VALUES
from recbole_mllm.mllm.base import Batch, Decoding, answers_of
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.server import ServerModel
from recbole_mllm.prompts import item_line, preference_prompt, text_summary_prompt
from recbole_mllm.settings import Settings
from recbole_mllm.summaries.asking import Question
from recbole_mllm.summaries.store import Store
from recbole_mllm.summaries.writing import Scribe

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytestmark = pytest.mark.slow

LENGTH = Decoding(10)
CHAINS, STEPS = 24, 3


class Chains:
    """Chains of prompts, each of which holds the answer before it."""

    def __init__(self):
        self.waiting, self.texts = [(n, 0, "") for n in range(CHAINS)], {}
        self.at = {}  # what to do when so many answers are there

    def ready(self, count):
        out, self.waiting = self.waiting[:count], self.waiting[count:]
        return [Question(key, prompt(*key), key[2]) for key in out]

    def told(self, name, text):
        chain, step, _ = name
        self.texts[chain, step] = text
        if step + 1 < STEPS:
            self.waiting.append((chain, step + 1, text))
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
    for name in ("slow", "killed", "well"):
        (tmp_path / name).mkdir()
        made.append(Served(tmp_path / name))
    for server in made:
        server.start()
    for server in made:
        server.wait()
    yield made
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


def test_a_slow_one_and_one_killed_and_started_again_change_no_text(servers, tmp_path, caplog):
    slow, killed, well = servers
    urls = tuple(f"http://127.0.0.1:{server.port}/v1" for server in servers)
    model = ServerModel(Endpoint(MODEL, urls), SETTINGS)
    chains, store = Chains(), Store(tmp_path / "store.sqlite")
    chains.at = {12: killed.kill, 30: killed.start}
    with Slow(slow.process):
        Scribe("user", lambda: model, "server:tiny", store, LENGTH).serve(chains)
    assert not chains.at and "set aside" in caplog.text and f":{killed.port}" in caplog.text
    assert killed.process.poll() is None and len(store) == CHAINS * STEPS
    store.close()

    local, truth = HFModel("tiny", Settings.from_config(BASE).mllm, torch.device("cpu")), {}
    last = [""] * CHAINS
    for step in range(STEPS):
        last = [a.text for a in answers_of(local, [prompt(n, step, text) for n, text in enumerate(last)], LENGTH)]
        truth |= {(n, step): text for n, text in enumerate(last)}
    assert chains.texts == truth and len(set(truth.values())) > 10
    # it came back, and is asked again
    killed.wait()
    again = Batch([text_summary_prompt(STYLE, f"later {n}") for n in random.Random(1).sample(range(99), 12)], LENGTH)
    ServerModel(Endpoint(MODEL, urls[1:2]), SETTINGS).write(again)
    assert len(again.answers) == 12
