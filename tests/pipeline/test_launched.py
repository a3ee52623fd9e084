"""Several real processes (torchrun, gloo) against one: the same losses, adapters, scores and metrics."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import Mock

import launched_runs
import numpy as np
import pytest
import small_world
import tiny_models
import torch
import yaml
from launching import FSDP, ROOT, ZERO, launched
from safetensors.torch import load_file, save_file

from recbole_mllm.cli import main
from recbole_mllm.errors import UserError
from recbole_mllm.mllm import splitting
from recbole_mllm.mllm.server import ServerModel
from recbole_mllm.model.stages import make_stage
from recbole_mllm.resources import PROPERTIES
from recbole_mllm.settings import Settings
from recbole_mllm.summaries.estimate import estimate
from recbole_mllm.summaries.stage import claiming, user_scribe
from recbole_mllm.summaries.users import Plan
from recbole_mllm.training.checkpoint import read_checkpoint


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    small_world.write(folder / "data")
    tiny_models.llama(folder / "llama")
    tiny_models.llava(folder / "llava")
    return folder


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    folder, home, words = tmp_path_factory.mktemp("alone"), Path.cwd(), sys.argv
    os.chdir(folder)
    sys.argv = ["pytest"]
    try:
        return launched_runs.collect(world, folder)
    finally:
        os.chdir(home)
        sys.argv = words


SLOW = pytest.mark.slow
# one launch for all of a number: half of it is imports
KINDS = {2: ("plain", "FSDP", "DeepSpeed"), 3: ("FSDP", "DeepSpeed"), 4: ("plain",)}


@pytest.fixture(scope="module")
def launch(world, tmp_path_factory):
    """Return a function that gives what so many processes found, what they said and where, launched once each."""

    @cache
    def found(count):
        folder = tmp_path_factory.mktemp(f"together{count}")
        done = launched(count, [ROOT / "tests" / "launched_runs.py", world, folder, *KINDS[count]], folder)
        assert done.returncode == 0, done.stderr[-3000:]
        return torch.load(folder / "found.pt", weights_only=False), done, folder

    return found


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((count, kind), marks=[SLOW] if count > 2 else [], id=f"{count} {kind}")
        for count, kinds in KINDS.items()
        for kind in kinds
    ],
)
def together(request, launch):
    count, kind = request.param
    found, done, folder = launch(count)
    return count, found[kind], done, folder / kind


@pytest.mark.parametrize("case", launched_runs.CASES)
def test_losses_adapter_scores_and_metrics_are_those_of_one_process(alone, together, case):
    count, found, *_ = together
    one, many = alone[case], found[case]
    assert (one["world_size"], many["world_size"]) == (1, count)
    assert len(one["losses"]) == len(many["losses"]) >= 3
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=1e-5)
    assert one["learnt"].keys() == many["learnt"].keys()
    moved = max(float(tensor.abs().max()) for name, tensor in one["learnt"].items() if "lora_B" in name)
    for name, tensor in one["learnt"].items():
        assert float((tensor - many["learnt"][name]).abs().max()) < 1e-3 * moved, name
    for name in ("user_id", "item_id", "place"):
        assert one["pairs"][name] == many["pairs"][name]
    np.testing.assert_allclose(many["pairs"]["score"], one["pairs"]["score"], atol=1e-4)
    assert np.std(one["pairs"]["score"]) > 0.01
    assert (one["test"], one["valid"], one["tokens"]) == (many["test"], many["valid"], many["tokens"])


def test_each_process_holds_its_part_of_a_split_model_and_else_all_of_it(request, alone, together):
    count, found, *_ = together
    split = "plain" not in request.node.callspec.id
    for case in launched_runs.CASES:
        assert (found[case]["held"] == alone[case]["held"]) is not split
        # what is split is most of these models, and is divided by the processes (the main one holds the longest part,
        # which DeepSpeed pads)
        assert not split or found[case]["held"] < alone[case]["held"] * (0.65 + 0.35 / count)


def test_batches_with_fewer_rows_than_processes_or_uneven_ones_count_each_row_once(alone, together):
    for count, (loss, gradients) in alone["small"].items():
        other, summed = together[1]["small"][count]
        assert other == pytest.approx(loss, rel=1e-5)
        for one, many in zip(gradients, summed, strict=True):
            assert (one is None) == (many is None)
            assert one is None or float((one - many).norm()) <= 1e-4 * float(one.norm()) + 1e-7
        assert sum(float(one.norm()) for one in gradients if one is not None) > 0


def test_the_main_process_alone_writes_and_speaks(together):
    count, _, done, folder = together
    runs = len(launched_runs.CASES) * len(KINDS[count])
    assert done.stderr.count("epoch 0 training") == runs
    assert len(list((folder.parent / "log" / "MLLMMSR").glob("*.log"))) <= runs
    assert len(list((folder / "text" / "saved").glob("*.pth"))) == 1


KILLED = """
import os, signal, sys
from recbole_mllm.trainer import MLLMMSRTrainer
stock = MLLMMSRTrainer._backward
def backward(self, *args):
    if (self.place.epoch, self.place.batch) == (1, 6) and os.environ["RANK"] == {rank!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    return stock(self, *args)
MLLMMSRTrainer._backward = backward
from recbole_mllm.cli import main
sys.exit(main())
"""


def words_of(world, folder, **more):
    keys = launched_runs.settings(world, folder, {"mllm": "llama", **more})
    return ["--model=MLLMMSR", "--dataset=steps", *(f"--{k}={json.dumps(v).replace(' ', '')}" for k, v in keys.items())]


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "how", "then", "split"), [("1", {}, 1, {}), ("0", {}, 3, {}), ("1", ZERO, 3, FSDP)])
def test_a_killed_process_ends_the_others_with_a_word_and_another_number_goes_on(
    alone, world, tmp_path, rank, how, then, split
):
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(rank=rank))
    done = launched(2, [script, *words_of(world, tmp_path, checkpoint_every_steps=3)], tmp_path, **how)
    said = done.stdout + done.stderr
    # who notices first on a busy machine: the other process, or the launcher, which then ends it
    words = "another process of this run has ended without a word", "the launcher has ended this process"
    assert done.returncode != 0 and sum(map(said.count, words)) == 1, said[-3000:]
    (last,) = (tmp_path / "saved").glob("*.last.pth")
    assert read_checkpoint(last, torch.device("cpu"))["training"]["place"][:2] == (1, 4)

    words = words_of(world, tmp_path, checkpoint_every_steps=3, resume="auto")
    again = launched(then, [ROOT / "run_recbole_mllm.py", *words], tmp_path, **split)
    assert again.returncode == 0, again.stderr[-3000:]
    found = read_checkpoint(last, torch.device("cpu"))
    epoch, _, loss = found["training"]["place"]
    assert epoch == 2 and "Resume training from epoch 1, batch 4" in again.stderr
    straight = alone["text"]["losses"]
    (told,) = {line.split("train loss: ")[1][:7] for line in again.stderr.splitlines() if "epoch 1 training" in line}
    assert float(told) == pytest.approx(straight[-1], abs=2e-4)
    for name, tensor in alone["text"]["learnt"].items():
        assert float((found["state_dict"][name] - tensor).abs().max()) < 1e-4, name


KILLED_SCORING = """
import os, signal, sys
from recbole_mllm.model.sequential_recommender.mllmmsr import MLLMMSR
stock, calls = MLLMMSR._ask_prompts, []
def ask(self, prompts):
    calls.append(len(prompts))
    if len(calls) == 3 and os.environ["RANK"] == "1":  # two epochs' validations, and now the test
        stock(self, prompts[: len(prompts) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return stock(self, prompts)
MLLMMSR._ask_prompts = ask
from recbole_mllm.cli import main
sys.exit(main())
"""


@pytest.mark.slow
def test_a_process_killed_while_it_scores_costs_the_scoring_alone(alone, world, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED_SCORING)
    done = launched(2, [script, *words_of(world, tmp_path, checkpoint_every_steps=3)], tmp_path)
    assert done.returncode != 0 and "epoch 1 training" in done.stderr and "test:" not in done.stdout
    again = launched(
        3, [ROOT / "run_recbole_mllm.py", *words_of(world, tmp_path, checkpoint_every_steps=3, resume="auto")], tmp_path
    )
    assert again.returncode == 0 and " training [" not in again.stderr, again.stderr[-3000:]
    wanted = "  ".join(f"{name} {value:.4f}" for name, value in alone["text"]["test"].items() if name != "AUC")
    assert f"test:       {wanted}" in again.stdout


REFUSED = {
    "nproc: 2": ({}, "asks RecBole to start processes, and a launcher has started 2 already; leave nproc out"),
    "finetune: full": (FSDP, "finetune: full cannot be split by FSDP here; set finetune: lora"),
    "finetune: qlora": (FSDP, "finetune: qlora cannot be split by FSDP here; set finetune: lora"),
    "finetune: 'full'": (ZERO, "finetune: full cannot be split by DeepSpeed here; set finetune: lora"),
    "epochs: 2": (
        ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "gone.json"},
        "(gone.json) cannot be read: ",
    ),
    "epochs: 3": (ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ROOT / "setup.py")}, "setup.py) cannot be read: "),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_had_together_is_one_clear_line(world, tmp_path, monkeypatch, capsys, text):
    more, wanted = REFUSED[text]
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **more}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    file = tmp_path / "both.yaml"
    file.write_text(f"{text}\n")
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main([*words_of(world, tmp_path), f"--config_files={file}"]) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    (line,) = capsys.readouterr().err.splitlines()
    assert wanted in line


SUMMARIES = {
    "summary_mode": "recurrent", "item_summary": "fused", "use_image": True, "mllm": "llava", "item_summary_tokens": 6,
    "user_summary_tokens": 6, "limit_users": 6, "train_last_k": 1, "epochs": 1,
}  # fmt: skip


def summarised(world, folder, count, how, command=("summarize",), script=ROOT / "run_recbole_mllm.py", **more):
    """Run `command` in `count` processes; return what the launcher said and the files of summaries."""
    if not (folder / "data").exists():
        folder.mkdir(exist_ok=True)
        small_world.write(folder / "data")
    words = [w for w in words_of(world, folder, **SUMMARIES | more) if not w.startswith(("--data_path", "--model"))]
    words = [script, *command, *words, f"--data_path={folder / 'data'}"]
    done = launched(count, words, folder, **how)
    return done, {path.name: path.read_bytes() for path in (folder / "data" / "steps").glob("*.?sum")}


@pytest.fixture(scope="module")
def summaries_alone(world, tmp_path_factory):
    done, files = summarised(world, tmp_path_factory.mktemp("one"), 1, {})
    assert done.returncode == 0 and len(files) == 2, done.stderr[-2000:]
    return files


TOLD_ALIVE = """
import sys, weakref
from recbole_mllm import ranks
from recbole_mllm.mllm.hf import HFModel
stock, loaded = HFModel.split, []
def split(self):
    alive = sum(part() is not None for part in loaded)
    loaded.extend(weakref.ref(module) for module in self.model.modules())
    stock(self)
    print(f"process {ranks.rank()}: {alive} parts alive of models before\\n", end="", flush=True)
HFModel.split = split
from recbole_mllm.cli import main
sys.exit(main())
"""


# of six processes some have nothing to write
SPLIT_WRITERS = [(2, ZERO), (2, FSDP), (6, FSDP)]


@pytest.mark.parametrize(
    ("count", "how"),
    [pytest.param(*SPLIT_WRITERS[0], id="2 DeepSpeed")]
    + [pytest.param(*pair, marks=SLOW, id=f"{pair[0]} FSDP") for pair in SPLIT_WRITERS[1:]],
)
def test_a_model_that_is_split_writes_the_summaries_of_one_that_is_not(world, tmp_path, summaries_alone, count, how):
    script = tmp_path / "told.py"
    script.write_text(TOLD_ALIVE)
    done, files = summarised(world, tmp_path, count, how, script=script)
    assert done.returncode == 0 and files == summaries_alone, done.stderr[-3000:]
    told = [line for line in done.stdout.splitlines() if line.startswith("process ")]
    # the items' summariser is gone before the users' is split, in each process
    assert len(told) == 2 * count and all(": 0 parts alive" in line for line in told), told


@pytest.mark.slow
def test_a_whole_run_from_nothing_with_every_model_split(world, tmp_path, summaries_alone):
    said = {}
    for name, count, how in (("one", 1, {}), ("FSDP", 2, FSDP), ("DeepSpeed", 3, ZERO)):
        done, files = summarised(world, tmp_path / name, count, how, ["--model=MLLMMSR"])
        assert done.returncode == 0 and files == summaries_alone, done.stderr[-3000:]
        said[name] = [line for line in done.stdout.splitlines() if line.startswith(("best valid", "test"))]
    assert said["one"] == said["FSDP"] == said["DeepSpeed"] and len(said["one"]) == 2


def test_a_family_that_cannot_be_split_is_told_before_anything_is_loaded(world, tmp_path, monkeypatch, capsys, caplog):
    config = json.loads((world / "llama" / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **FSDP}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(words_of(world, tmp_path, mllm=str(other))) == 2  # a whole path stays as it is below another
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "FSDP does not know the family mistral here" in capsys.readouterr().err.splitlines()[-1]

    settings = Settings.from_config(yaml.safe_load((PROPERTIES / "model" / "MLLMMSR.yaml").read_text()))
    settings = replace(settings, mllm=replace(settings.mllm, user_summarizer=str(other)))
    make_stage({"data_path": str(world / "data" / "steps")}, settings, torch.device("cpu"))
    (line,) = [text for text in caplog.messages if "family mistral" in text]
    assert line.startswith("user_summarizer: ") and line.endswith("only summaries that are there already will do")


KILLED_WRITING = """
import os, signal, sys
from recbole_mllm.summaries.writing import Scribe
stock, given = Scribe.give, []
def give(self, arrived):
    stock(self, arrived)
    given.append(self.kind)
    if given.count("user") == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
Scribe.give = give
from recbole_mllm.cli import main
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [FSDP, ZERO], ids=["FSDP", "DeepSpeed"])
def test_a_killed_writer_of_a_split_model_ends_the_others_with_a_word(world, tmp_path, summaries_alone, how):
    script = tmp_path / "killed.py"
    script.write_text(KILLED_WRITING)
    done, _ = summarised(world, tmp_path / "run", 2, how, script=script)
    said = done.stdout + done.stderr
    words = "another process of this run has ended without a word", "the launcher has ended this process"
    assert done.returncode != 0 and sum(map(said.count, words)) == 1, said[-3000:]
    assert "Traceback (most recent call last)" not in said.partition("recbole-mllm:")[0]
    again, files = summarised(world, tmp_path / "run", 1, {})
    assert again.returncode == 0 and files == summaries_alone
    (line,) = [line for line in again.stderr.splitlines() if "item summaries: " in line]
    assert " 0 written" in line
    assert not list((tmp_path / "run" / "data" / "steps").glob("*rank*"))


@pytest.mark.slow
def test_weights_that_no_file_has_are_made_in_every_process(world, tmp_path):
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
import sys, torch
from recbole_mllm.mllm.splitting import LockStep
def make_pass(self, *, learns):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
LockStep._pass = make_pass
from recbole_mllm.cli import main
sys.exit(main())
"""


@pytest.mark.slow
def test_a_process_without_memory_for_the_others_passes_says_so_itself(world, tmp_path):
    script = tmp_path / "memory.py"
    script.write_text(OUT_OF_MEMORY)
    done, _ = summarised(world, tmp_path / "run", 2, FSDP, script=script, summarize_batch_size=2)
    said = done.stdout + done.stderr
    assert done.returncode != 0 and said.count("recbole-mllm: ") == 1, said[-3000:]
    assert said.count("recbole-mllm: out of memory; with FSDP a batch cannot be made smaller by itself") == 1


@pytest.mark.slow
def test_an_image_gone_for_one_process_ends_all_that_share_a_split_model(world, tmp_path, summaries_alone):
    small_world.write(tmp_path / "run" / "data")
    asked = next(text for name, text in summaries_alone.items() if name.endswith(".isum")).decode().splitlines()[1]
    (image,) = (tmp_path / "run" / "data" / "steps").rglob(f"{asked.partition(chr(9))[0]}.png")
    script = tmp_path / "gone.py"
    script.write_text(
        f"from pathlib import Path\nGONE = {str(image)!r}\n"
        + """
import sys
from recbole_mllm.mllm.encode import Encoder
stock = Encoder.__call__
def encode(self, prompt):
    if any(str(path) == GONE for path in prompt.images):
        raise OSError(f"{GONE}: gone")
    return stock(self, prompt)
Encoder.__call__ = encode
from recbole_mllm.cli import main
sys.exit(main())
"""
    )
    done, _ = summarised(world, tmp_path / "run", 2, FSDP, script=script)
    said = done.stdout + done.stderr
    assert done.returncode != 0 and said.count("recbole-mllm: 1 item summaries cannot be written") == 1, said[-3000:]


def test_beside_a_server_a_split_model_is_loaded_by_all_for_its_own_summaries_alone(world, monkeypatch):
    settings = Settings.from_config(yaml.safe_load((PROPERTIES / "model" / "MLLMMSR.yaml").read_text()))
    settings = replace(settings, mllm=replace(settings.mllm, item_summarizer="server:m@http://localhost:9/v1"))
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **FSDP}.items():
        monkeypatch.setenv(name, value)
    stage = make_stage({"data_path": str(world / "data" / "steps")}, settings, torch.device("cpu"))
    assert isinstance(stage.who.load_item(), ServerModel)
    assert (stage.who.item_is_split, stage.who.user_is_split) == (False, True)
    with pytest.raises(UserError, match="summaries that all processes had just written are gone"):
        claiming(user_scribe(stage, Mock())).load()


@pytest.fixture
def one_of_two(world, tmp_path, monkeypatch):
    """Return a function that runs a command in the main process of two, of which the other will not come."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **FSDP}.items():
        monkeypatch.setenv(name, value)
    small_world.write(tmp_path / "data")
    words = [w for w in words_of(world, tmp_path, **SUMMARIES) if not w.startswith(("--data_path", "--model"))]
    before = signal.getsignal(signal.SIGTERM)
    yield lambda *command: main([*command, *words, f"--data_path={tmp_path / 'data'}"])
    signal.signal(signal.SIGTERM, before)


def test_what_one_process_does_alone_waits_for_no_other_where_models_are_to_be_split(one_of_two, tmp_path, capsys):
    assert one_of_two("plan", "--probe") == 0 and "user summaries" in capsys.readouterr().out
    assert one_of_two("--model=SASRecF", "--item_features=text") == 0 and "test: " in capsys.readouterr().out
    (texts,) = (tmp_path / "data" / "steps").glob("*.isum")  # of all items, written by a model that is not split
    assert len(texts.read_text().splitlines()) == 1 + small_world.ITEMS


def test_a_dry_run_does_not_try_a_model_that_is_split(world, tmp_path, monkeypatch):
    keys = {"mllm": str(world / "llama"), "data_path": str(world / "data" / "steps"), "item_summary": "text"}
    given = yaml.safe_load((PROPERTIES / "model" / "MLLMMSR.yaml").read_text()) | keys | {"use_image": False}
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **FSDP}.items():
        monkeypatch.setenv(name, value)
    stage = make_stage(given, Settings.from_config(given), torch.device("cpu"))
    plan = Plan({"u": ["i00", "i01", "i02"]}, {"u": {2}})
    with pytest.raises(UserError, match="--dry-run lets one process try the model.* start it without FSDP"):
        estimate(stage, plan, "all")


TELLS = """
from recbole_mllm import ranks
from recbole_mllm.mllm import splitting
print(f"process {ranks.rank()} of {ranks.world_size()}: {splitting.wanted()}", flush=True)
"""


@pytest.mark.parametrize(
    ("name", "how"),
    [("deepspeed", "DeepSpeed"), pytest.param("fsdp", "FSDP", marks=SLOW), pytest.param("ddp", None, marks=SLOW)],
)
def test_accelerate_starts_what_its_file_says(tmp_path, name, how):
    script = tmp_path / "tells.py"
    script.write_text(TELLS)
    words = ["-m", "accelerate.commands.launch", "--config_file", PROPERTIES / "accelerate" / f"{name}.yaml", script]
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    told = sorted(line for line in done.stdout.splitlines() if line.startswith("process "))
    assert told == [f"process {rank} of 2: {how}" for rank in range(2)], done.stderr[-3000:]


@pytest.mark.parametrize(("stage", "text"), [(3, "DeepSpeed"), (2, "None"), (1, "None")])
def test_deepspeed_splits_a_model_at_its_third_stage_alone_and_says_so(monkeypatch, caplog, stage, text):
    more = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **more}.items():
        monkeypatch.setenv(name, value)
    assert str(splitting.wanted()) == text
    splitting.tell_of_the_unsplit()
    assert ("zero_stage is below 3, which splits no model" in caplog.text) is (stage < 3)


def test_a_mistake_is_told_once(world, tmp_path):
    words = [*words_of(world, tmp_path), "--lora_rr=4"]
    done = launched(2, [ROOT / "run_recbole_mllm.py", *words], tmp_path)
    assert done.returncode != 0 and (done.stdout + done.stderr).count("recbole-mllm: unknown key 'lora_rr'") == 1


NAN = """
import os, sys
from recbole_mllm.model.sequential_recommender.mllmmsr import MLLMMSR
stock = MLLMMSR.loss_of
seen = []
def loss_of(self, examples):
    seen.append(len(examples))
    return stock(self, examples) * (float("nan") if os.environ["RANK"] == "1" and len(seen) == 3 else 1.0)
MLLMMSR.loss_of = loss_of
from recbole_mllm.cli import main
sys.exit(main())
"""


@pytest.mark.slow
def test_a_loss_that_is_no_number_in_one_process_stops_all_with_its_rows(world, tmp_path):
    script = tmp_path / "nan.py"
    script.write_text(NAN)
    done = launched(2, [script, *words_of(world, tmp_path)], tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode != 0 and said.count("recbole-mllm: ") == 1, said[-3000:]
    assert said.count("recbole-mllm: the training loss is nan in epoch 0") == 1
    (file,) = (tmp_path / "saved").glob("*.nonfinite.tsv")
    _, *rows = [line.split("\t") for line in file.read_text().splitlines()]
    assert len(rows) == 8 and 0 < sum(row[-1] == "1" for row in rows) < 8


@pytest.mark.slow
def test_a_retriever_and_summaries_are_made_once_and_full_ranking_is_that_of_one_process(world, tmp_path):
    more = {
        "mllm": "llava", "use_image": True, "summary_mode": "recurrent", "item_summary": "image", "epochs": 1,
        "item_summary_tokens": 8, "user_summary_tokens": 8, "retriever": "Pop", "top_k": 5, "metrics": ["Hit", "NDCG"],
        "eval_args": {**launched_runs.EVALUATED, "mode": "full"}, "valid_metric": "NDCG@10", "limit_users": 8,
    }  # fmt: skip
    said, stores = {}, {}
    for count in (1, 2):
        folder = tmp_path / f"n{count}"
        folder.mkdir()
        small_world.write(folder / "data")
        words = [w for w in words_of(world, folder, **more) if not w.startswith("--data_path")]
        done = launched(count, [ROOT / "run_recbole_mllm.py", *words, f"--data_path={folder / 'data'}"], folder)
        assert done.returncode == 0, done.stderr[-3000:]
        said[count] = [line for line in done.stdout.splitlines() if line.startswith(("best valid", "test"))]
        assert done.stderr.count("training the retriever Pop") == 1
        stores[count] = {path.name: path.read_bytes() for path in (folder / "data" / "steps").glob("*.?sum")}
    assert said[1] == said[2] and len(said[1]) == 2
    assert stores[1] == stores[2] and len(stores[1]) == 2


WAITS = """
import sys, time
from datetime import timedelta
from recbole_mllm import ranks
ranks._COLLECTIVE = timedelta(seconds=2)
ranks.start()
ranks.main_first(lambda: ranks.is_main() and time.sleep(5))
found = ranks.gather_objects((ranks.rank(), ranks.on_main(lambda: "x" * int(sys.argv[1]))[-1:]))
if ranks.is_main():
    print("found", found)
ranks.stop()
"""


@pytest.mark.slow
def test_waiting_for_the_main_process_knows_no_collectives_timeout(tmp_path):
    (tmp_path / "waits.py").write_text(WAITS)
    done = launched(2, [tmp_path / "waits.py", 10**7], tmp_path)
    assert done.stdout == "found [(0, 'x'), (1, 'x')]\n", done.stderr[-2000:]
