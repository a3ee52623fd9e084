"""Running out of memory while training: the batch is halved, and no row's gradient is counted twice or lost."""

import sys

import pytest
import small_world
import tiny_models
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_trainer, init_logger, init_seed

from recbole_mllm.errors import UserError
from recbole_mllm.mllm import sharing
from recbole_mllm.model.sequential_recommender.mllmmsr import MLLMMSR


@pytest.fixture(scope="module", params=["lora", "full"])
def made(request, tmp_path_factory):
    """A trainer and the first batch of its data: eight rows, dropout off."""
    place = tmp_path_factory.mktemp("memory")
    small_world.write(place / "data")
    settings = {
        "data_path": str(place / "data"),
        "checkpoint_dir": str(place / "saved"),
        "mllm": str(tiny_models.llava(place / "llava")),
        "prompt_style": "demo",
        "item_summary": "none",
        "summary_mode": "none",
        "finetune": request.param,
        "limit_users": 10,
        "train_last_k": 1,
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "uni10"},
        "train_batch_size": 8,
        "lora_dropout": 0.0,
        "seed": 7,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pytest"])
        patch.chdir(place)
        config = Config(model="MLLMMSR", dataset="steps", config_dict=settings)
        init_seed(config["seed"], True)
        init_logger(config)
        train, *_ = data_preparation(config, create_dataset(config))
        model = MLLMMSR(config, train._dataset)
        trainer = get_trainer(config["MODEL_TYPE"], "MLLMMSR")(config, model)
    model.train()
    yield trainer, next(iter(train))


@pytest.fixture
def trained(made, monkeypatch):
    """Return a call that trains on the batch and gives loss and gradients; the trainer forgets what it has learnt."""
    monkeypatch.setattr(sharing, "_LEAST_GAIN", 1)
    trainer, batch = made
    trainer.halving.most = None

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
        layer = trainer.model.mllm.body.head_model.model.language_model.layers[1].mlp
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


def test_a_row_too_large_alone_is_one_line(trained):
    trainer, _, train = trained
    with Full(trainer, 0, "backward"), pytest.raises(UserError, match="one row alone; set gradient_checkpointing"):
        train()


def test_another_error_is_not_taken_for_it(trained, monkeypatch):
    trainer, _, train = trained

    def broken(_):
        raise RuntimeError("expected scalar type Half but found Float")

    monkeypatch.setattr(trainer.model, "calculate_loss", broken)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        train()
