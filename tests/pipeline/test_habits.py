"""What RecBole's users are used to works with MLLMMSR: case studies, TensorBoard, wandb, `gpu_id`."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import small_world
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from recbole.utils.case_study import full_sort_topk
from run_parts import run_keys, with_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recbole_mllm.common.errors import UserError
from recbole_mllm.data.schema import HISTORY_NUMBER, POSITION
from recbole_mllm.quick_start import make_config, run


@pytest.fixture
def settings(place: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(place)
    few = {"train_last_k": 1, "limit_users": 8, "train_batch_size": 4, "summary_mode": "none", "use_image": False}
    return run_keys(place, mllm=str(place / "llama"), prompt_style="demo", **few)


def made(settings: dict[str, Any]) -> Any:
    return with_trainer(Config("MLLMMSR", "steps", config_dict=settings))


def test_full_sort_topk_gives_the_order_of_predict_on_all_items(settings: dict[str, Any]) -> None:
    model, (*_, test), _ = made(settings | {"finetune": "none"})
    users = test._dataset.inter_feat["user_id"].numpy()[:2]
    scores, items = full_sort_topk(users, model, test, k=small_world.ITEMS)
    for user, own_scores, own in zip(users, scores, items, strict=True):
        row = test._dataset.inter_feat[int((test._dataset.inter_feat["user_id"] == user).nonzero()[0])]
        every = torch.arange(1, small_world.ITEMS + 1)
        pairs = Interaction({
            "user_id": torch.full_like(every, int(user)), "item_id": every,
            **{field: torch.full_like(every, int(row[field])) for field in (POSITION, HISTORY_NUMBER)},
        })  # fmt: skip
        predicted = model.predict(pairs)
        assert set(own.tolist()) == set(every.tolist())
        assert torch.allclose(predicted[own - 1], own_scores, atol=1e-5)
        assert bool((own_scores.diff() <= 0).all())


def test_full_sort_topk_names_a_user_without_a_test_row(settings: dict[str, Any]) -> None:
    model, (*_, test), _ = made(settings | {"finetune": "none", "limit_users": 2})
    rows = test._dataset
    left_out = next(u for u in range(1, rows.user_num) if u not in rows.inter_feat["user_id"].tolist())
    name = rows.id2token("user_id", left_out)
    asked = [int(rows.inter_feat["user_id"][0]), left_out]
    with pytest.raises(UserError, match=f"^user {name} has no row in the split that was given"):
        full_sort_topk(asked, model, test, k=3)
    with pytest.raises(UserError, match="no user of internal id 999"):
        full_sort_topk([999], model, test, k=3)


class Recorded(ModuleType):
    """Stands for wandb: keeps what RecBole's WandbLogger calls it with (utils/wandblogger.py)."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.lines: list[dict[str, Any]] = []
        self.run: Any = None

    def init(self, project: str, config: Any) -> None:
        self.project, self.run = project, type("Run", (), {"summary": {}})()

    def define_metric(self, name: str, step_metric: str) -> None:
        pass

    def log(self, metrics: dict[str, Any], commit: bool) -> None:
        self.lines.append(metrics)


def test_tensorboard_and_wandb_show_losses_and_validation_by_step_and_epoch(
    settings: dict[str, Any], monkeypatch: Any
) -> None:
    fake = Recorded()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    _, (train, valid, test), trainer = made(settings | {"epochs": 2, "log_wandb": True, "wandb_project": "mine"})
    trainer.fit(train, valid)
    trainer.tensorboard.flush()
    events = EventAccumulator(trainer.tensorboard.log_dir).Reload()
    steps = events.Scalars("Step/loss")
    assert [event.step for event in steps] == list(range(2 * len(train)))
    by_epoch = np.array([event.value for event in steps]).reshape(2, -1).sum(1)
    assert [event.value for event in events.Scalars("Loss/Train")] == pytest.approx(by_epoch.tolist(), rel=1e-5)
    scores = events.Scalars("Vaild_score")
    assert [event.step for event in scores] == [0, 1]
    assert max(event.value for event in scores) == pytest.approx(trainer.best_valid_score)
    rates = [event.value for event in events.Scalars("Step/learning_rate")]
    assert max(rates) <= trainer.learning_rate * 1.0001 and rates[-1] < max(rates)

    found = trainer.evaluate(test)
    shown = [line["valid/ndcg@10"] for line in fake.lines if "valid_step" in line]
    assert fake.project == "mine" and shown == pytest.approx([event.value for event in scores])
    assert fake.run.summary["eval/ndcg@10"] == found["ndcg@10"]
    losses = [line["step/loss"] for line in fake.lines if "step/loss" in line]
    assert losses == pytest.approx([event.value for event in steps])
    epochs = [line["train/train_loss"] for line in fake.lines if "train/train_loss" in line]
    assert epochs == pytest.approx(by_epoch.tolist(), rel=1e-5)


def test_a_model_of_one_pass_runs_with_any_eval_step(settings: dict[str, Any]) -> None:
    keys = {"eval_step": 2, "epochs": 8, "frozen_candidates": True, "eval_args": {"mode": "uni20"}}
    found = run(make_config("Pop", "steps", [], settings | keys | {"mllm": "tiny", "load_col": {"inter": "*"}}))
    assert found.valid and found.test, "RecBole trains it for one epoch, and would neither validate nor save it"
