"""Fine-tuning inside RecBole: it learns, stops early, resumes after kill -9, fits into memory, names NaN's rows."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_world
import torch
from launching import ROOT, script_with
from recbole.config import Config
from recbole.quick_start import load_data_and_model
from recbole.utils import get_trainer, init_logger
from run_parts import with_trainer

from recbole_mllm.common.checkpoint import _CHOICE, _COURSE, _MODEL, last_of, newest, read_checkpoint
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.fitting import Fit
from recbole_mllm.evaluation.metrics import per_user
from recbole_mllm.mllm import loss
from recbole_mllm.model import row_scoring
from recbole_mllm.model.sequential_recommender.mllmmsr import MLLMMSR
from recbole_mllm.quick_start import run

CPU = torch.device("cpu")
EVALUATED = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "uni10"}


def _settings(place, folder):
    return {
        "data_path": str(place / "data"), "checkpoint_dir": str(folder / "saved"), "mllm": str(place / "llama"),
        "prompt_style": "demo", "item_summary": "none", "summary_mode": "none", "use_image": False, "train_last_k": 2,
        "limit_users": 15, "eval_args": EVALUATED, "train_batch_size": 8, "gradient_accumulation_steps": 2,
        "lora_dropout": 0.1,  # so that random numbers count
        "epochs": 2, "show_progress": False, "seed": 7,
    }  # fmt: skip


@pytest.fixture
def settings(place, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return _settings(place, tmp_path)


def _made(settings):
    config = Config(model="MLLMMSR", dataset="steps", config_dict=settings)
    init_logger(config)
    _, loaders, trainer = with_trainer(config)
    return trainer, *loaders


def _fit(settings, **more):
    trainer, train, valid, _ = _made(settings | more)
    trainer.fit(train, valid, verbose=False)
    return trainer


def _same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _state(file):
    return read_checkpoint(Path(file), CPU)["state_dict"]


KILLED = """
from recbole_mllm.trainer import MLLMMSRTrainer
stock = MLLMMSRTrainer._backward
def backward(self, *args):
    if (self.place.epoch, self.place.batch) == (1, 6):
        os.kill(os.getpid(), signal.SIGKILL)
    return stock(self, *args)
MLLMMSRTrainer._backward = backward
"""


def test_a_run_killed_in_an_epoch_resumes_to_the_same_adapter_bit_for_bit(settings, tmp_path):
    words = [f"--{key}={json.dumps(value, separators=(',', ':'))}" for key, value in settings.items()]
    words += ["--model", "MLLMMSR", "--dataset", "steps", "--checkpoint_every_steps=3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, script_with(KILLED, tmp_path), *words]
    child = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()[-2000:]
    (last,) = (tmp_path / "saved").glob("*.last.pth")
    killed = read_checkpoint(last, CPU)["training"]
    assert killed["place"][:2] == (1, 4)  # the sixth of 2 * 4 steps was never taken
    straight = _fit(settings, checkpoint_dir=str(tmp_path / "straight"))
    resumed = _fit(settings, resume="auto", checkpoint_every_steps=3)
    assert 0 < killed["train_s"] < resumed.train_s  # what the killed run had spent counts
    assert straight.train_loss_dict[1] == resumed.train_loss_dict[1]
    assert straight.best_valid_score == resumed.best_valid_score
    assert straight.best_valid_result == resumed.best_valid_result
    assert _same(straight.model.state_dict(), resumed.model.state_dict())
    moments = straight.optimizer.state_dict()["state"], resumed.optimizer.state_dict()["state"]
    assert all(_same(moments[0][n], moments[1][n]) for n in moments[0])
    assert _same(_state(straight.saved_model_file), _state(resumed.saved_model_file))
    assert Path(resumed.saved_model_file) == last.with_name(last.name.replace(".last", ""))


def test_a_run_resumes_from_a_checkpoint_of_an_epoch_too(settings, tmp_path):
    straight, train, _, _ = _made(settings)  # without validation every epoch is saved, the last over the first
    save = straight._save_checkpoint

    def save_and_copy(epoch, **how):
        save(epoch, **how)
        shutil.copy(straight.saved_model_file, tmp_path / f"epoch-{epoch}.pth")

    straight._save_checkpoint = save_and_copy
    straight.fit(train, verbose=False)
    again, train, _, _ = _made(settings)
    again.resume_checkpoint(tmp_path / "epoch-0.pth")  # RecBole's own way
    assert again.start_epoch == 1
    again.fit(train, verbose=False)
    assert _same(straight.model.state_dict(), again.model.state_dict())


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """The settings and the trainer of a run of one epoch, which has left its newest state too."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        settings = _settings(place, folder) | {"epochs": 1, "checkpoint_every_steps": 3}
        return settings, _fit(settings)


def test_a_finished_run_is_not_trained_again(finished):
    settings, first = finished
    trainer, train, valid, test = _made(settings | {"resume": "auto"})
    assert trainer.fit(train, valid, verbose=False) == (first.best_valid_score, first.best_valid_result)
    assert trainer.train_loss_dict == {} and trainer.saved_model_file == first.saved_model_file
    assert trainer.train_s == first.train_s > 0
    assert trainer.evaluate(test) == first.evaluate(test)
    last = last_of(Path(first.saved_model_file))
    _, model, *_ = load_data_and_model(str(last))  # RecBole's own way of reloading
    assert _same(model.state_dict(), _state(last))


def test_the_pairs_of_validation_are_those_of_the_state_that_is_tested(settings):
    metrics = {"metrics": ["NDCG"], "topk": [10], "valid_metric": "NDCG@10", "metric_decimal_place": 8}
    again = {"checkpoint_every_steps": 2, "resume": "auto"}

    def kept(**more):
        outcome = run(Config(model="MLLMMSR", dataset="steps", config_dict=settings | metrics | more), keep_valid=True)
        assert per_user(outcome.valid_pairs, outcome.config)["NDCG@10"].mean() == pytest.approx(
            outcome.valid["NDCG@10"], abs=1e-7
        )
        return outcome

    trained, resumed = kept(checkpoint_every_steps=2), kept(**again)  # the latter has no epoch left to validate
    assert all((trained.valid_pairs[name] == resumed.valid_pairs[name]).all() for name in trained.valid_pairs)
    assert trained.test == resumed.test and len(trained.valid_pairs["score"]) == 15 * 11
    zero, untrained = kept(finetune="none"), kept(epochs=0, checkpoint_every_steps=2)  # an adapter begins as nothing
    assert len(zero.valid_pairs["score"]) == 15 * 11 and untrained.test == zero.test and untrained.valid == zero.valid


def test_auto_finds_nothing_of_a_run_with_other_settings(finished):
    _, trainer = finished
    base, folder = trainer.model.other_parameter()["base"], Path(trainer.checkpoint_dir)
    assert newest(folder, base, trainer.config, CPU) == last_of(Path(trainer.saved_model_file))
    assert newest(folder, "other#1:float32", trainer.config, CPU) is None
    other = {"seed": 8, "lora_r": 4, "learning_rate": 0.1, "train_last_k": None, "use_image": True, "block_size": 9}
    for key, value in (other | {"control": "wrong-summary", "max_text_tokens": 77, "eval_args": {}}).items():
        config = {name: trainer.config[name] for name in (*_MODEL, *_COURSE, *_CHOICE)} | {key: value}
        assert newest(folder, base, config, CPU) is None


class Calls:
    """Something that would act when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_auto_passes_over_what_others_have_left_and_unpickles_none_of_it(finished, tmp_path, caplog):
    _, trainer = finished
    folder, marker = tmp_path / "saved", tmp_path / "called"
    shutil.copytree(Path(trainer.saved_model_file).parent, folder)
    last, base = folder / last_of(Path(trainer.saved_model_file)).name, trainer.model.other_parameter()["base"]
    whole = read_checkpoint(last, CPU)
    assert newest(folder, base, trainer.config, CPU) == last
    torch.save(whole | {"training": Calls(marker)}, folder / "MLLMMSR-calls.pth", pickle_protocol=4)
    torch.save(Calls(marker), folder / "MLLMMSR-old.pth", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": {}}, folder / "MLLMMSR-other.pth")
    torch.save(whole | {"config": {"model": "MLLMMSR"}}, folder / "MLLMMSR-dict.pth")
    torch.save(whole | {"other_parameter": [1]}, folder / "MLLMMSR-list.pth")
    (folder / "MLLMMSR-cut.pth").write_bytes(last.read_bytes()[:-4000])
    (folder / "MLLMMSR-text.pth").write_text("hello")
    (folder / "MLLMMSR-empty.pth").touch()
    shutil.copy(last, folder / "MLLMMSR-alone.last.pth")  # without its best epoch beside it
    foreign = sorted(path.name for path in folder.glob("MLLMMSR-[a-z]*.pth"))
    (folder / "MLLMMSR-folder.pth").mkdir()
    (folder / "MLLMMSR-nowhere.pth").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "MLLMMSR-pipe.pth")  # to open it would wait for ever
    assert newest(folder, base, trainer.config, CPU) == last and not marker.exists()
    told = [line for line in caplog.messages if "resume: auto passes over" in line]
    assert len(told) == len(foreign) == 9 and all(any(name in line for line in told) for name in foreign)


def test_a_checkpoint_that_cannot_be_resumed_from_is_refused(finished, tmp_path):
    settings, trainer = finished
    path = tmp_path / "run.pth"
    checkpoint = read_checkpoint(last_of(Path(trainer.saved_model_file)), CPU)
    within = {**checkpoint["training"], "place": (0, 2, 1.0), "best_valid_result": None}
    other, _, _, _ = _made(settings | {"train_batch_size": 32, "resume": "nowhere.pth"})
    for content, said in (
        (checkpoint | {"training": within}, "trained with train_batch_size 8, not 32; give the same settings"),
        (checkpoint | {"other_parameter": {"base": "other#1"}}, "the checkpoint belongs to other#1, not to llama"),
        (b"half a check", "cannot be read"),
    ):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(UserError, match=said):
            other.resume_checkpoint(path)
    with pytest.raises(UserError, match="does not exist"):
        other.resume()


def test_a_loss_that_is_no_number_stops_with_the_rows(settings, tmp_path):
    trainer, train, valid, _ = _made(settings)
    poison = next(p for n, p in trainer.model.named_parameters() if "lora_B" in n)
    with torch.no_grad():
        poison.fill_(float("nan"))
    adapter = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(UserError, match=r"training loss is nan in epoch 0; the batch's rows are in \S+\.tsv; lower"):
        trainer.fit(train, valid, verbose=False)
    (file,) = (tmp_path / "saved").glob("*.nonfinite.tsv")
    header, *lines = [line.split("\t") for line in file.read_text().splitlines()]
    assert header[:4] == ["user_id", "item_id", "position", "label"] and len(lines) == 8
    for user, item, position, label, _ in lines:
        right = small_world.item(2 * int(user[1:]) + int(position))
        assert (item == right) == (label == "1")
    after = trainer.model.state_dict()
    assert all(torch.equal(adapter[n].nan_to_num(), after[n].nan_to_num()) for n in adapter)


def test_training_stops_when_the_frozen_candidates_are_ranked_worse_and_keeps_the_best(settings):
    given = settings | {"epochs": 9, "stopping_step": 1, "checkpoint_every_steps": 100}
    trainer, train, valid, _ = _made(given)
    plan, adapters = iter([0.3, 0.7, 0.6, 0.5]), []
    trainer._valid_epoch = lambda *args, **kwargs: (value := next(plan), {"ndcg@10": value})
    found = trainer.fit(train, valid, verbose=False, callback_fn=lambda *_: adapters.append(_copy(trainer)))
    assert len(adapters) == 4 and found == (0.7, {"ndcg@10": 0.7})
    assert _same(_state(trainer.saved_model_file), adapters[1])
    trainer.load(Path(trainer.saved_model_file))
    assert _same(trainer.model.state_dict(), adapters[1]) and not _same(adapters[1], adapters[3])
    again, train, valid, _ = _made(given | {"epochs": 12})  # it is finished, however many epochs are asked for
    again.resume_checkpoint(last_of(Path(trainer.saved_model_file)))
    fit = Fit(again)
    assert fit.run(train, valid, verbose=False)[0] == 0.7 and again.train_loss_dict == {}
    assert fit.scores == [] and fit.converged


def _copy(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def test_accumulated_batches_have_the_gradient_of_one_large_batch(settings):
    found = {}
    for name, more in (
        ("large", {"train_batch_size": 60, "gradient_accumulation_steps": 1}),
        ("small", {"train_batch_size": 16, "gradient_accumulation_steps": 4, "micro_batch_size": 5}),
    ):
        how = {"lora_dropout": 0.0, "learner": "sgd", "epochs": 1, "warmup_ratio": 0.0, "clip_grad_norm": None}
        trainer, train, _, _ = _made(settings | how | {"weight_decay": 0.0} | more)
        before = _copy(trainer)
        trainer.fit(train, verbose=False)
        after = trainer.model.state_dict()
        found[name] = torch.cat([(after[n] - before[n]).flatten().double() for n in before])
    assert found["large"].norm() > 0
    assert (found["large"] - found["small"]).norm() < 1e-4 * found["large"].norm()  # the last batch is smaller


HALF = [
    {"finetune": "full", "learning_rate": 3e-4},
    {"dtype": "bfloat16"},
    {"dtype": "float16"},
    {"dtype": "bfloat16", "finetune": "full", "learning_rate": 3e-4},
]


@pytest.mark.parametrize("how", [{}, *(pytest.param(how, marks=pytest.mark.slow) for how in HALF)])
def test_the_loss_falls_on_a_planted_world(settings, how):
    trainer = _fit(settings | {"epochs": 3, "lora_dropout": 0.0, "eval_step": 0, "learning_rate": 3e-3} | how)
    losses = [trainer.train_loss_dict[epoch] for epoch in range(3)]
    assert losses[-1] < 0.8 * losses[0] and np.all(np.isfinite(losses))
    assert all(tensor.dtype == torch.float32 for tensor in _state(trainer.saved_model_file).values())


def test_full_tuning_is_saved_and_comes_back_through_recbole(settings):
    trainer, train, valid, test = _made(settings | {"finetune": "full", "learning_rate": 1e-4, "epochs": 1})
    trainer.fit(train, valid, verbose=False)
    expected = trainer.evaluate(test)
    folder = Path(trainer.saved_model_file).with_suffix("")
    assert sorted(path.name for path in folder.iterdir()) == ["trained.json", "trained.safetensors"]
    config, model, _, _, _, test = load_data_and_model(trainer.saved_model_file)
    again = get_trainer(config["MODEL_TYPE"], "MLLMMSR")(config, model).evaluate(test, load_best_model=False)
    assert dict(again) == dict(expected)


def test_sharing_and_grouping_are_on_by_themselves_and_change_no_epochs_rows(settings, place):
    sees = {"mllm": str(place / "llava"), "use_image": True}
    trainer, train, valid, _ = _made(settings | sees | {"epochs": 1})
    trainer.fit(train, verbose=False)
    assert train.grouped and trainer.model.shares_prefix
    for off in (
        {"group_by_item": "off"},
        {"share_prefix": "off"},
        {"prompt_order": "user-first"},
        {"micro_batch_size": 1},
    ):
        assert not _made(settings | sees | off)[0].model.groups_by_item
    checkpointed = _made(settings | sees | {"gradient_checkpointing": True})[0].model
    assert not checkpointed.shares_prefix and not checkpointed.groups_by_item


def test_a_killed_evaluation_resumes_from_what_it_had_scored(settings, tmp_path, monkeypatch):
    asked, stock = [], MLLMMSR._ask_prompts

    def ask(self, prompts):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(prompts))
        return stock(self, prompts)

    monkeypatch.setattr(row_scoring, "AHEAD", 40)
    zero = settings | {"finetune": "none"}
    trainer, train, valid, test = _made(zero)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MLLMMSR, "_ask_prompts", ask)
        trainer.fit(train, valid, verbose=False)
    (file,) = (tmp_path / "saved").glob("scores-*")
    assert asked == [40, 40] and file.stat().st_size == 24 * 80
    again, train, valid, test = _made(zero)
    found = again.fit(train, valid, verbose=False), again.evaluate(test)
    assert again.model.scores_reused == 80 and not list((tmp_path / "saved").glob("scores-*"))
    straight, train, valid, test = _made(zero | {"checkpoint_dir": str(tmp_path / "other")})
    assert (straight.fit(train, valid, verbose=False), straight.evaluate(test)) == found
    straight.fit(train, valid, verbose=False, saved=False)  # as tuning does: nothing is left behind
    assert not list((tmp_path / "other").glob("scores-*"))


# -- memory: a batch is halved, and no row's gradient is counted twice or lost


@pytest.fixture(scope="module", params=["lora", pytest.param("full", marks=pytest.mark.slow)])
def filled(request, place, tmp_path_factory):
    """A trainer and the first batch of its data: eight rows, dropout off."""
    folder = tmp_path_factory.mktemp("memory")
    keys = {"mllm": str(place / "llava"), "use_image": True, "finetune": request.param, "lora_dropout": 0.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        trainer, train, *_ = _made(_settings(place, folder) | keys | {"train_last_k": 1})
    trainer.model.train()
    return trainer, next(iter(train))


@pytest.fixture
def trained(filled, monkeypatch):
    """Return a call that trains on the batch and gives loss and gradients; the trainer forgets what it has learnt."""
    monkeypatch.setattr(loss, "LEAST_GAIN", 1)
    trainer, batch = filled
    trainer.budget.size = 1000

    def call(times=1):
        trainer.optimizer.zero_grad()
        for _ in range(times):
            loss = trainer._backward(batch, times * len(batch))
        return loss, torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])

    return trainer, batch, call


class Full:
    """Fails in a layer's forward or backward pass, as an accelerator does, where it holds more rows than `most`."""

    def __init__(self, trainer, most, where):
        self.most, self.failed = most, 0
        layer = trainer.model.mllm.backbone.head_model.model.language_model.layers[1].mlp
        if where == "forward":
            self.handle = layer.register_forward_hook(lambda module, given, out: self.check(out))
        else:  # by then the layer above has its gradients
            self.handle = layer.register_full_backward_hook(lambda module, given, out: self.check(out[0]))

    def check(self, tensor):
        if tensor.size(0) > self.most:
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_gradients_are_those_of_enough_memory(trained, where, caplog):
    trainer, batch, train = trained
    loss, whole = train()
    assert len(batch) >= 8 and whole.norm() > 0
    with Full(trainer, 2, where) as memory:
        again, halved = train()
        assert memory.failed and "going on with" in caplog.text
        assert again == pytest.approx(loss, rel=1e-5) and (halved - whole).norm() < 1e-5 * whole.norm()
        memory.failed = 0
        _, twice = train(times=2)  # a second batch is cut before it fails, and adds to the first one's gradients
        assert not memory.failed and (twice - whole).norm() < 1e-5 * whole.norm()


def test_a_row_too_large_alone_is_one_line_and_another_error_is_not_taken_for_it(trained, monkeypatch):
    trainer, _, train = trained
    with Full(trainer, 0, "backward"), pytest.raises(UserError, match="one row alone; set gradient_checkpointing"):
        train()

    def broken(_):
        raise RuntimeError("expected scalar type Half but found Float")

    monkeypatch.setattr(trainer.model, "calculate_loss", broken)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        train()
