"""Several real processes (torchrun, gloo) against one: the same losses, adapters, scores and metrics."""

import os
import re
import subprocess
import sys
from functools import cache

import launched_runs
import numpy as np
import pytest
import small_world
import torch
from launching import FSDP, ROOT, launched, one_of_two, script_with

from recbole_mllm.cli import main
from recbole_mllm.common.checkpoint import read_checkpoint
from recbole_mllm.common.resources import PROPERTIES

SLOW = pytest.mark.slow
RUN = ROOT / "run_recbole_mllm.py"


@pytest.fixture(scope="module")
def alone(place, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("alone"))
        return launched_runs.collect(place, folder)


# one launch for all of a number: half of it is imports
KINDS = {2: ("plain",), 3: ("FSDP",), 4: ("plain",)}


@pytest.fixture(scope="module")
def launch(place, tmp_path_factory):
    """Return a function that gives what so many processes found, what they said and where, launched once each."""

    @cache
    def found(count):
        folder = tmp_path_factory.mktemp(f"together{count}")
        done = launched(count, [ROOT / "tests" / "launched_runs.py", place, folder, *KINDS[count]], folder)
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
    return count, kind, found[kind], done, folder / kind


@pytest.mark.parametrize("case", launched_runs.CASES)
def test_losses_adapter_scores_and_metrics_are_those_of_one_process(alone, together, case):
    count, kind, found, *_ = together
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
    # each process holds all of a model or, of one that is split, its part of what most of these models are
    assert (many["held"] == one["held"]) is (kind == "plain")
    assert kind == "plain" or many["held"] < one["held"] * (0.65 + 0.35 / count)


def test_batches_with_fewer_rows_than_processes_or_uneven_ones_count_each_row_once(alone, together):
    for count, (loss, gradients) in alone["small"].items():
        other, summed = together[2]["small"][count]
        assert other == pytest.approx(loss, rel=1e-5)
        for one, many in zip(gradients, summed, strict=True):
            assert (one is None) == (many is None)
            assert one is None or float((one - many).norm()) <= 1e-4 * float(one.norm()) + 1e-7
        assert sum(float(one.norm()) for one in gradients if one is not None) > 0


def test_the_main_process_alone_writes_and_speaks(together):
    count, _, _, done, folder = together
    runs = len(launched_runs.CASES) * len(KINDS[count])
    assert done.stderr.count("epoch 0 training") == runs
    assert len(list(folder.glob("*/saved/log/MLLMMSR/*.log"))) <= runs
    assert len(list((folder / "text" / "saved").glob("*.pth"))) == 1


BROKEN = """
from recbole_mllm.model.sequential_recommender.mllmmsr import MLLMMSR
from recbole_mllm.trainer import MLLMMSRTrainer
seen = []
def die():
    os.kill(os.getpid(), signal.SIGKILL)
"""
KILLED = """
stock = MLLMMSRTrainer._backward
def backward(self, *args):
    if (self.place.epoch, self.place.batch) == (1, 6) and os.environ["RANK"] == {rank!r}:
        die()
    return stock(self, *args)
MLLMMSRTrainer._backward = backward
"""
KILLED_SCORING = """
stock = MLLMMSR._ask_prompts
def ask(self, prompts):
    seen.extend([self] * self._cache._on)  # in the test, not in an epoch's validation
    if len(seen) == 3 and os.environ["RANK"] == "1":
        die()
    return stock(self, prompts)
MLLMMSR._ask_prompts = ask
from recbole_mllm.model import row_scoring
row_scoring.AHEAD = 20
"""
NAN = """
stock = MLLMMSR.calculate_loss
def loss(self, interaction):
    seen.append(len(interaction))
    return stock(self, interaction) * (float("nan") if os.environ["RANK"] == "1" and len(seen) == 3 else 1.0)
MLLMMSR.calculate_loss = loss
"""


def broken(count, change, place, folder, **how):
    script = script_with(BROKEN + change, folder)
    done = launched(count, [script, *launched_runs.words(place, folder, checkpoint_every_steps=3)], folder, **how)
    assert done.returncode != 0
    return done, done.stdout + done.stderr


def resumed(count, place, folder, **how):
    words = launched_runs.words(place, folder, checkpoint_every_steps=3, resume="auto")
    done = launched(count, [RUN, *words], folder, **how)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@SLOW
@pytest.mark.parametrize(("rank", "how", "then", "split"), [("1", {}, 1, {}), ("0", FSDP, 3, {})])
def test_a_killed_process_ends_the_others_with_a_word_and_another_number_resumes(
    alone, place, tmp_path, rank, how, then, split
):
    _, said = broken(2, KILLED.format(rank=rank), place, tmp_path, **how)
    # who notices first on a busy machine: the other process, or the launcher, which then ends it
    words = "another process of this run ended without a message", "the launcher has ended this process"
    assert sum(map(said.count, words)) == 1, said[-3000:]
    (last,) = (tmp_path / "saved").glob("*.last.pth")
    assert read_checkpoint(last, torch.device("cpu"))["training"]["place"][:2] == (1, 4)
    again = resumed(then, place, tmp_path, **split)
    found = read_checkpoint(last, torch.device("cpu"))
    assert found["training"]["place"][0] == 2 and "Resume training from epoch 1, batch 4" in again.stderr
    plain = re.sub(r"\x1b\[[0-9;]*m", "", again.stderr)  # RecBole colours its log
    (told,) = set(re.findall(r"epoch 1 training .*train loss: ([\d.]{7})", plain))
    assert float(told) == pytest.approx(alone["text"]["losses"][-1], abs=2e-4)
    for name, tensor in alone["text"]["learnt"].items():
        assert float((found["state_dict"][name] - tensor).abs().max()) < 1e-4, name


@SLOW
def test_a_process_killed_while_it_scores_costs_what_it_had_not_scored(alone, place, tmp_path):
    done, _ = broken(2, KILLED_SCORING, place, tmp_path)
    assert "epoch 1 training" in done.stderr and "test:" not in done.stdout
    assert list((tmp_path / "saved").glob("scores-*.?"))
    again = resumed(3, place, tmp_path)
    assert " training [" not in again.stderr and not list((tmp_path / "saved").glob("scores-*"))
    wanted = "  ".join(f"{name} {value:.4f}" for name, value in alone["text"]["test"].items() if name != "AUC")
    assert f"test:       {wanted}" in again.stdout


REFUSED = {
    "nproc: 2": ({}, "asks RecBole to start processes, and a launcher has started 2 already; leave nproc out"),
    "finetune: full": (FSDP, "finetune: full cannot be split by FSDP here; set finetune: lora"),
    "finetune: qlora": (FSDP, "finetune: qlora cannot be split by FSDP here; set finetune: lora"),
    "finetune: lora": ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is withdrawn here; FSDP splits a model"),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_had_together_is_one_clear_line(place, tmp_path, monkeypatch, capsys, text):
    more, wanted = REFUSED[text]
    (tmp_path / "both.yaml").write_text(f"{text}\n")
    with one_of_two(monkeypatch, **more):
        assert main([*launched_runs.words(place, tmp_path), f"--config_files={tmp_path / 'both.yaml'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert wanted in line


TELLS = """
from recbole_mllm.common import distributed
from recbole_mllm.mllm import sharding
print(f"process {distributed.process_index()} of 2: {sharding.wanted()}\\n", end="", flush=True)
"""


@SLOW
@pytest.mark.parametrize(("name", "how"), [("fsdp", "FSDP"), ("ddp", None)])
def test_accelerate_starts_what_its_file_says(tmp_path, name, how):
    script = tmp_path / "tells.py"
    script.write_text(TELLS)
    words = ["-m", "accelerate.commands.launch", "--config_file", PROPERTIES / "accelerate" / f"{name}.yaml", script]
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    told = sorted(line for line in done.stdout.splitlines() if line.startswith("process "))
    assert told == [f"process {index} of 2: {how}" for index in range(2)], done.stderr[-3000:]


@SLOW
def test_a_mistake_is_told_once(place, tmp_path):
    done = launched(2, [RUN, *launched_runs.words(place, tmp_path), "--lora_rr=4"], tmp_path)
    assert done.returncode != 0 and (done.stdout + done.stderr).count("recbole-mllm: unknown key 'lora_rr'") == 1


@SLOW
def test_a_loss_that_is_no_number_in_one_process_stops_all_with_its_rows(place, tmp_path):
    _, said = broken(2, NAN, place, tmp_path)
    assert said.count("recbole-mllm: ") == said.count("recbole-mllm: the training loss is nan in epoch 0") == 1, said
    (file,) = (tmp_path / "saved").glob("*.nonfinite.tsv")
    _, *rows = [line.split("\t") for line in file.read_text().splitlines()]
    assert len(rows) == 8 and 0 < sum(row[-1] == "1" for row in rows) < 8


@SLOW
@pytest.mark.parametrize("control", [None, "shuffled-history", "wrong-summary"])
def test_a_retriever_and_summaries_are_made_once_and_full_ranking_is_that_of_one_process(place, tmp_path, control):
    more = {
        "mllm": "llava", "use_image": True, "summary_mode": "recurrent", "item_summary": "image", "epochs": 1,
        "item_summary_tokens": 8, "user_summary_tokens": 8, "retriever": "Pop", "top_k": 5, "metrics": ["Hit", "NDCG"],
        "eval_args": {**launched_runs.EVALUATED, "mode": "full"}, "valid_metric": "NDCG@10", "limit_users": 8,
        "control": control,
    }  # fmt: skip
    said, stores = {}, {}
    for count in (1, 2):
        folder = tmp_path / f"n{count}"
        folder.mkdir()
        small_world.write(folder / "data")
        words = [w for w in launched_runs.words(place, folder, **more) if not w.startswith("--data_path")]
        done = launched(count, [RUN, *words, f"--data_path={folder / 'data'}"], folder)
        assert done.returncode == 0, done.stderr[-3000:]
        said[count] = [line for line in done.stdout.splitlines() if line.startswith(("best valid", "test"))]
        assert done.stderr.count("training the retriever Pop") == 1
        stores[count] = {path.name: path.read_bytes() for path in (folder / "data" / "steps").glob("*.?sum")}
    assert said[1] == said[2] and len(said[1]) == 2
    assert stores[1] == stores[2] and len(stores[1]) == 2
