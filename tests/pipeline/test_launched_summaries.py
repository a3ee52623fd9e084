"""Models split among processes as writers of summaries: those of one process, and what may go wrong on the way."""

import json
from dataclasses import replace

import launched_runs
import pytest
import small_world
import tiny_models
import torch
from launching import FSDP, ROOT, launched, one_of_two, script_with
from safetensors.torch import load_file, save_file
from stock_forward import SETTINGS

from recbole_mllm.cli import main
from recbole_mllm.mllm.server import ServerModel
from recbole_mllm.model.summarizers import make_summary_setup

SLOW = pytest.mark.slow
SUMMARIES = {
    "summary_mode": "recurrent", "item_summary": "fused", "use_image": True, "mllm": "llava", "item_summary_tokens": 6,
    "user_summary_tokens": 6, "limit_users": 6, "train_last_k": 1, "epochs": 1,
}  # fmt: skip


def summary_words(place, folder, **more):
    """Return the settings of a run whose data lie in `folder`, as a command line says them."""
    words = launched_runs.words(place, folder, **SUMMARIES | more)
    words = [word for word in words if not word.startswith(("--data_path", "--model"))]
    return [*words, f"--data_path={folder / 'data'}"]


def summarised(place, folder, count, how, command=("summarize",), script=ROOT / "run_recbole_mllm.py", **more):
    """Run `command` in `count` processes; return what the launcher said and the files of summaries."""
    if not (folder / "data").exists():
        folder.mkdir(exist_ok=True)
        small_world.write(folder / "data")
    done = launched(count, [script, *command, *summary_words(place, folder, **more)], folder, **how)
    return done, {path.name: path.read_bytes() for path in (folder / "data" / "steps").glob("*.?sum")}


@pytest.fixture(scope="module")
def summaries_alone(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    small_world.write(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["summarize", *summary_words(place, folder)]) == 0
    files = {path.name: path.read_bytes() for path in (folder / "data" / "steps").glob("*.?sum")}
    assert len(files) == 2
    return files


TOLD_ALIVE = """
import weakref
from recbole_mllm.common import distributed
from recbole_mllm.mllm.hf import HFModel
stock, loaded = HFModel.split, []
def split(self):
    alive = sum(part() is not None for part in loaded)
    loaded.extend(weakref.ref(module) for module in self.model.modules())
    stock(self)
    print(f"process {distributed.process_index()}: {alive} parts alive of models before\\n", end="", flush=True)
HFModel.split = split
"""


@pytest.mark.parametrize("count", [2, pytest.param(6, marks=SLOW)])  # of six some have nothing to write
def test_a_model_that_is_split_writes_the_summaries_of_one_that_is_not(place, tmp_path, summaries_alone, count):
    script = script_with(TOLD_ALIVE, tmp_path)
    done, files = summarised(place, tmp_path, count, FSDP, script=script)
    assert done.returncode == 0 and files == summaries_alone, done.stderr[-3000:]
    told = [line for line in done.stdout.splitlines() if line.startswith("process ")]
    # the items' summariser is gone before the users' is split, in each process
    assert len(told) == 2 * count and all(": 0 parts alive" in line for line in told), told


@pytest.mark.slow
def test_a_whole_run_from_nothing_with_every_model_split(place, tmp_path, summaries_alone):
    said = {}
    for name, count, how in (("one", 1, {}), ("FSDP", 3, FSDP)):
        done, files = summarised(place, tmp_path / name, count, how, ["--model=MLLMMSR"])
        assert done.returncode == 0 and files == summaries_alone, done.stderr[-3000:]
        said[name] = [line for line in done.stdout.splitlines() if line.startswith(("best valid", "test"))]
    assert said["one"] == said["FSDP"] and len(said["one"]) == 2


def test_a_family_that_cannot_be_split_is_told_before_anything_is_loaded(place, tmp_path, monkeypatch, capsys, caplog):
    config = json.loads((place / "llama" / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config | {"model_type": "gpt_neox"}))
    with one_of_two(monkeypatch, **FSDP):
        # a whole path stays as it is below another
        assert main(launched_runs.words(place, tmp_path, mllm=str(other))) == 2
        assert "FSDP does not know the family gpt_neox here" in capsys.readouterr().err.splitlines()[-1]
        stage_of(place, user_summarizer=str(other))
    (line,) = [text for text in caplog.messages if "family gpt_neox" in text]
    assert line.startswith("user_summarizer: ") and line.endswith("only summaries that are there already will do")


@pytest.mark.slow
def test_weights_that_no_file_has_are_made_in_every_process(place, tmp_path):
    tiny_models.llava(tmp_path / "llava")
    (file,) = (tmp_path / "llava").glob("*.safetensors")
    unread = "vision_tower.post_layernorm"  # LLaVA takes the features of the layer before
    save_file({name: t for name, t in load_file(file).items() if unread not in name}, file, metadata={"format": "pt"})
    files = {}
    for count, how in ((1, {}), (2, FSDP)):
        done, files[count] = summarised(tmp_path, tmp_path / f"n{count}", count, how)
        assert done.returncode == 0 and "are left at random" in done.stderr, done.stderr[-3000:]
    assert files[1] == files[2] and len(files[1]) == 2


OUT_OF_MEMORY = """
import os, torch
from recbole_mllm.mllm.sharding import LockStep
from recbole_mllm.summaries.generator import CachedGenerator
if os.environ["RANK"] == "1":  # so that it takes part in the passes of the other one alone
    CachedGenerator.take = lambda self, count: []
def make_pass(self, *, learns):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
LockStep._pass = make_pass
"""


@pytest.mark.slow
def test_a_process_without_memory_for_the_others_passes_says_so_itself(place, tmp_path):
    script = script_with(OUT_OF_MEMORY, tmp_path)
    done, _ = summarised(place, tmp_path / "run", 2, FSDP, script=script, summarize_batch_size=2)
    said = done.stdout + done.stderr
    assert done.returncode != 0 and said.count("recbole-mllm: ") == 1, said[-3000:]
    assert said.count("recbole-mllm: out of memory; with FSDP a batch cannot be made smaller by itself") == 1


GONE = """
from recbole_mllm.mllm.encoder import Encoder
stock = Encoder.__call__
def encode(self, prompt, **options):
    if any(str(path) == IMAGE for path in prompt.images):
        raise OSError(f"{IMAGE}: gone")
    return stock(self, prompt, **options)
Encoder.__call__ = encode
"""


@pytest.mark.slow
def test_an_image_gone_for_one_process_ends_all_that_share_a_split_model(place, tmp_path, summaries_alone):
    small_world.write(tmp_path / "run" / "data")
    asked = next(text for name, text in summaries_alone.items() if name.endswith(".isum")).decode().splitlines()[1]
    (image,) = (tmp_path / "run" / "data" / "steps").rglob(f"{asked.partition(chr(9))[0]}.png")
    script = script_with(GONE.replace("IMAGE", repr(str(image))), tmp_path)
    done, _ = summarised(place, tmp_path / "run", 2, FSDP, script=script)
    said = done.stdout + done.stderr
    assert done.returncode != 0 and said.count("recbole-mllm: 1 item summaries cannot be written") == 1, said[-3000:]


def stage_of(place, **models):
    """Return what writes the summaries with such `models`."""
    settings = replace(SETTINGS, mllm=replace(SETTINGS.mllm, **models))
    config = {"data_path": str(place / "data" / "steps"), "ITEM_ID_FIELD": "item_id"}
    return make_summary_setup(config, settings, torch.device("cpu"))


def test_beside_a_server_a_split_model_is_loaded_by_all_for_its_own_summaries_alone(place, monkeypatch):
    with one_of_two(monkeypatch, **FSDP):
        stage = stage_of(place, item_summarizer="server:m@http://localhost:9/v1")
        assert isinstance(stage.summarizers["item"].load(), ServerModel)
        assert {kind: one.is_split for kind, one in stage.summarizers.items()} == {"item": False, "user": True}


def test_what_one_process_does_alone_waits_for_no_other_where_models_are_to_be_split(
    place, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    small_world.write(tmp_path / "data")
    words = summary_words(place, tmp_path)
    with one_of_two(monkeypatch, **FSDP):
        assert main(["plan", *words]) == 0 and "user summaries" in capsys.readouterr().out
        assert main(["summarize", "--dry-run", *words]) == 2
        assert "--dry-run lets one process try the model" in capsys.readouterr().err
        assert main(["--model=SASRecF", "--item_features=text", *words]) == 0 and "test: " in capsys.readouterr().out
    (texts,) = (tmp_path / "data" / "steps").glob("*.isum")  # of all items, written by a model that is not split
    assert len(texts.read_text().splitlines()) == 1 + small_world.ITEMS
