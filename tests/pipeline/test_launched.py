"""Several real processes (torchrun, gloo) against one: the same losses, adapters, scores and metrics."""

import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import launched_runs
import numpy as np
import pytest
import small_world
import tiny_models
import torch
from launching import FSDP, ROOT, ZERO, launched

from recbole_mllm.cli import main
from recbole_mllm.mllm import splitting
from recbole_mllm.resources import PROPERTIES
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


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "how", "then", "split"), [("1", {}, 1, {}), ("0", {}, 3, {}), ("1", ZERO, 3, FSDP)])
def test_a_killed_process_ends_the_others_with_a_word_and_another_number_goes_on(
    alone, world, tmp_path, rank, how, then, split
):
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(rank=rank))
    done = launched(2, [script, *launched_runs.words(world, tmp_path, checkpoint_every_steps=3)], tmp_path, **how)
    said = done.stdout + done.stderr
    # who notices first on a busy machine: the other process, or the launcher, which then ends it
    words = "another process of this run has ended without a word", "the launcher has ended this process"
    assert done.returncode != 0 and sum(map(said.count, words)) == 1, said[-3000:]
    (last,) = (tmp_path / "saved").glob("*.last.pth")
    assert read_checkpoint(last, torch.device("cpu"))["training"]["place"][:2] == (1, 4)

    words = launched_runs.words(world, tmp_path, checkpoint_every_steps=3, resume="auto")
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
    done = launched(2, [script, *launched_runs.words(world, tmp_path, checkpoint_every_steps=3)], tmp_path)
    assert done.returncode != 0 and "epoch 1 training" in done.stderr and "test:" not in done.stdout
    again = launched(
        3,
        [ROOT / "run_recbole_mllm.py", *launched_runs.words(world, tmp_path, checkpoint_every_steps=3, resume="auto")],
        tmp_path,
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
        assert main([*launched_runs.words(world, tmp_path), f"--config_files={file}"]) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    (line,) = capsys.readouterr().err.splitlines()
    assert wanted in line


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
    words = [*launched_runs.words(world, tmp_path), "--lora_rr=4"]
    done = launched(2, [ROOT / "run_recbole_mllm.py", *words], tmp_path)
    assert done.returncode != 0 and (done.stdout + done.stderr).count("recbole-mllm: unknown key 'lora_rr'") == 1


NAN = """
import os, sys
from recbole_mllm.model.sequential_recommender.mllmmsr import MLLMMSR
stock = MLLMMSR.calculate_loss
seen = []
def calculate_loss(self, examples):
    seen.append(len(examples))
    return stock(self, examples) * (float("nan") if os.environ["RANK"] == "1" and len(seen) == 3 else 1.0)
MLLMMSR.calculate_loss = calculate_loss
from recbole_mllm.cli import main
sys.exit(main())
"""


@pytest.mark.slow
def test_a_loss_that_is_no_number_in_one_process_stops_all_with_its_rows(world, tmp_path):
    script = tmp_path / "nan.py"
    script.write_text(NAN)
    done = launched(2, [script, *launched_runs.words(world, tmp_path)], tmp_path)
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
        words = [w for w in launched_runs.words(world, folder, **more) if not w.startswith("--data_path")]
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
