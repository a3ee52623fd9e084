"""Whoever knows nothing scores at chance: by every metric, under every protocol, sequential and general."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from raw_dumps import write_microlens
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import GeneralRecommender, SequentialRecommender
from recbole.utils import InputType

from recbole_mllm.cli import main
from recbole_mllm.quick_start import make_config, run

CANDIDATES, CUTOFFS = 21, (3, 5, 10)
LOO = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user"}
PROTOCOLS = {"uni20": ("loo", "uni20"), "pop20": ("loo", "pop20"), "paper": ("paper", "uni20")}


class Zero:
    """Scores every pair 0."""

    input_type = InputType.POINTWISE

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)  # type: ignore[call-arg]
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def calculate_loss(self, interaction: Any) -> torch.Tensor:
        return self.nothing.sum() * 0.0

    def predict(self, interaction: Any) -> torch.Tensor:
        return torch.zeros(len(interaction))


class ZeroGeneral(Zero, GeneralRecommender):
    """From users and items."""


class ZeroSequential(Zero, SequentialRecommender):
    """From sequences."""


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same drawn histories, popular items first, as leave-one-out files and as the paper's benchmark files."""
    home = tmp_path_factory.mktemp("chance")
    rng = random.Random(5)
    items = [f"i{n}" for n in range(90)]
    weights = [1 / (1 + n) ** 0.5 for n in range(90)]
    for name, users, protocol in (("loo", 400, "loo"), ("paper", 2900, "paper")):
        lists = {f"u{u}": list(dict.fromkeys(rng.choices(items, weights, k=rng.randint(6, 9)))) for u in range(users)}
        dump = write_microlens(home / f"raw-{name}", lists, {item: f"title {item}" for item in items})
        words = ["convert", "microlens", "--raw", str(dump), "--out", str(home / name), "--protocol", protocol]
        assert main(words) == 0
    return home


def outcome(world: Path, model: Any, protocol: str, monkeypatch: pytest.MonkeyPatch, **keys: Any) -> Any:
    monkeypatch.chdir(world)
    dataset, mode = PROTOCOLS[protocol]
    settings = {
        "data_path": str(world), "checkpoint_dir": str(world / "saved"), "epochs": 1, "train_batch_size": 4096,
        "MAX_ITEM_LIST_LENGTH": 10,  # as long as the longest; what is padded costs all the same
        "show_progress": False, "state": "ERROR", "frozen_candidates": True, "metric_decimal_place": 8,
        "metrics": ["Hit", "MRR", "NDCG", "Recall", "GAUC"], "topk": list(CUTOFFS), "valid_metric": "NDCG@10",
        "eval_args": LOO | {"mode": mode},
    }  # fmt: skip
    return run(make_config(model, dataset, [], settings | keys))


def at_chance() -> dict[str, tuple[float, float]]:
    """Return mean and standard deviation of one user's metrics when the target's rank is any of 21 alike."""
    gains = {
        "Hit": lambda r: 1.0,
        "Recall": lambda r: 1.0,
        "MRR": lambda r: 1 / r,
        "NDCG": lambda r: 1 / math.log2(r + 1),
    }
    ranks = range(1, CANDIDATES + 1)
    values = {
        f"{name}@{k}": [gain(r) if r <= k else 0.0 for r in ranks] for name, gain in gains.items() for k in CUTOFFS
    }
    values["GAUC"] = [1 - (r - 1) / (CANDIDATES - 1) for r in ranks]
    return {name: (float(np.mean(given)), float(np.std(given))) for name, given in values.items()}


def assert_at_chance(found: Any, least_users: int) -> None:
    users = len(found.users["user"])
    assert users >= least_users and len(found.pairs["score"]) == users * CANDIDATES
    expected = at_chance()
    assert set(found.test) == set(expected) | {"AUC"}
    for name, (mean, spread) in expected.items():
        assert abs(found.test[name] - mean) < 4 * spread / math.sqrt(users), name


@pytest.mark.parametrize(
    ("model", "protocol"),
    [(ZeroGeneral, "uni20"), (ZeroSequential, "pop20"), (ZeroGeneral, "paper"), (ZeroSequential, "paper")],
)
def test_a_constant_scorer_scores_at_chance(worlds, model, protocol, monkeypatch):
    found = outcome(worlds, model, protocol, monkeypatch)
    assert set(found.pairs["score"].tolist()) == {0.0}
    assert found.test["AUC"] == 0.5
    assert_at_chance(found, 280)


def test_random_scores_at_chance_and_by_pair(worlds, monkeypatch):
    found = outcome(worlds, "Random", "uni20", monkeypatch)
    assert_at_chance(found, 280)
    users, per_user = len(found.users["user"]), CANDIDATES - 1
    error = math.sqrt((users + users * per_user + 1) / (12 * users * users * per_user))  # of the Mann-Whitney statistic
    assert abs(found.test["AUC"] - 0.5) < 4 * error
    smaller = outcome(worlds, "Random", "uni20", monkeypatch, eval_batch_size=100)
    assert smaller.test == found.test, "RecBole's own Random changes with the batch size"
    other = outcome(worlds, "Random", "uni20", monkeypatch, seed=77)
    assert not np.array_equal(other.pairs["score"], found.pairs["score"])
    # all items are ranked by the same scores
    every = Interaction({"user_id": torch.arange(1, 4)})
    scores = found.model.full_sort_predict(every).view(3, -1)
    pairs = Interaction({"user_id": torch.tensor([1, 2, 3]), "item_id": torch.tensor([5, 6, 7])})
    assert torch.equal(found.model.predict(pairs), scores[[0, 1, 2], [5, 6, 7]])
    assert not torch.equal(scores[0], scores[1])
    assert scores.min() >= 0 and scores.max() < 1
