"""A fine-tuned model exported, served by a real `transformers serve`, and asked there: the scores of this process."""

import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import small_world
import torch
from recbole.quick_start import load_data_and_model, run_recbole

from recbole_mllm.cli import main
from recbole_mllm.endpoints import parse_endpoint
from recbole_mllm.errors import UserError
from recbole_mllm.mllm.served import ServedScorer
from recbole_mllm.prompts import recommend_prompt
from recbole_mllm.settings import ServerSettings

pytest.importorskip("openai")
pytest.importorskip("uvicorn")

SERVERS = ServerSettings(4, 60.0, 90.0, None)


class Serve:
    """`transformers serve` of one folder on a port of its own, in float32."""

    def __init__(self, model, folder, *more):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.model, self.log = model, folder / "serve.log"
        command = ["-m", "transformers.cli.transformers", "serve", str(model), "--device", "cpu", "--dtype", "float32"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command, *more, "--host", "127.0.0.1", "--port", str(self.port)],
                stdout=log,
                stderr=log,
                env=os.environ | {"HF_HUB_CACHE": str(folder / "hub"), "OMP_NUM_THREADS": "1"},
            )

    def wait(self):
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2).close()
                return self
            except OSError:
                assert self.process.poll() is None, self.log.read_text()
                time.sleep(0.1)
        raise AssertionError("the server did not start")

    def __enter__(self):
        return self.wait()

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    @property
    def endpoint(self):
        return f"server:{self.model}@http://127.0.0.1:{self.port}/v1"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data, and the checkpoint of a few large steps of LoRA on the bundled model."""
    place = tmp_path_factory.mktemp("served")
    small_world.write(place / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pytest"])
        patch.chdir(place)
        run_recbole("MLLMMSR", "steps", config_dict=_settings(place))
    (path,) = (place / "saved").glob("MLLMMSR-*.pth")
    return path


def _settings(place, **more):
    return {
        "data_path": str(place / "data"),
        "checkpoint_dir": str(place / "saved"),
        "mllm": "tiny",
        "item_summary_tokens": 8,
        "user_summary_tokens": 8,
        "learning_rate": 0.02,
        "train_last_k": 1,
        "limit_users": 12,
        "train_batch_size": 8,
        "show_progress": False,
        "seed": 3,
    } | more


@pytest.fixture(scope="module")
def local(trained):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pytest"])
        patch.chdir(trained.parent.parent)
        _, model, *_ = load_data_and_model(str(trained))
    model.load_state_dict(torch.load(trained, weights_only=False)["state_dict"])
    return model.eval()


@pytest.fixture(scope="module")
def prompts(local, trained):
    """Questions with images and without, and a title that spells the model's special tokens."""
    images = sorted((trained.parent.parent / "data" / "steps" / "images").iterdir())
    likes = ["The user prefers red.", "The user is new."]
    titles = ["a plain mug", "Ünïcode 'mug', \"set of 3\"", "a <image-1> mug"]
    return [
        recommend_prompt(local.style, preference, title, image)
        for preference in likes
        for title in titles
        for image in (images[0], images[-1], None)
    ]


@pytest.fixture(scope="module")
def merged(trained):
    out = trained.parent.parent / "merged"
    assert main(["export", str(trained), "--out", str(out), "--merge"]) == 0
    return out


@pytest.fixture(scope="module")
def served(merged, tmp_path_factory):
    with Serve(merged, tmp_path_factory.mktemp("hub")) as server:
        yield server


def test_a_served_export_says_yes_as_likely_as_this_process(served, local, prompts, caplog):
    here = local.mllm.yes_scores(prompts, local.answers).sigmoid()
    scorer = ServedScorer(parse_endpoint(served.endpoint, "mllm"), SERVERS)
    there = scorer.yes_scores(prompts, scorer.answers(local.style)).sigmoid()
    torch.testing.assert_close(there, here, atol=1e-4, rtol=0)
    assert here.max() - here.min() > 0.01  # they do depend on the prompt
    assert scorer.tokens_read == sum(len(e.ids) for e in local.mllm.encode(prompts))
    assert "adds words of its own" not in caplog.text


def test_the_adapter_is_in_what_is_served(local, prompts):
    tuned = local.mllm.yes_scores(prompts, local.answers)
    with local.mllm.model.disable_adapter():
        bare = local.mllm.yes_scores(prompts, local.answers)
    assert (tuned.sigmoid() - bare.sigmoid()).abs().max() > 0.01


def test_recbole_ranks_by_a_served_model_as_by_the_trained_one(served, local, trained, monkeypatch):
    place = trained.parent.parent
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.chdir(place)
    here = _settings(place, resume=str(trained))
    there = _settings(place, mllm=served.endpoint, finetune="none", prompt_style="demo", resume=None)
    there |= {"item_summarizer": "tiny", "user_summarizer": "tiny", "checkpoint_dir": str(place / "other")}
    first, second = (run_recbole("MLLMMSR", "steps", config_dict=one)["test_result"] for one in (here, there))
    assert dict(first) == dict(second)
    (path,) = (place / "other").glob("*.pth")
    saved = torch.load(path, weights_only=False)
    assert saved["other_parameter"] == {"base": f"server:{served.model}"} and not saved["state_dict"]
    with pytest.raises(UserError, match="its model is behind a server, so there is nothing here to export"):
        from recbole_mllm.training.export import export

        export(str(path), place / "nothing", merge=True)
