"""Whoever knows nothing scores at chance: by every metric, under every protocol, sequential and general.

Among drawn candidates and among all items, where every model ranks the same ones.
"""

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
from recbole_mllm.evaluation.full_ranking import DEEPEST, KEPT_PAIRS, AllItems, rank_all
from recbole_mllm.quick_start import make_config, run

CANDIDATES, CUTOFFS = 21, (3, 5, 10)
FULL = {"exclude_seen": True}
LOO = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user"}


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
    """Run `model` under a `protocol` such as ``paper full``: the dataset, and how candidates are had."""
    monkeypatch.chdir(world)
    dataset, mode = protocol.split()
    settings = {
        "data_path": str(world), "checkpoint_dir": str(world / "saved"), "epochs": 1, "train_batch_size": 4096,
        "MAX_ITEM_LIST_LENGTH": 10,  # as long as the longest; what is padded costs all the same
        "show_progress": False, "state": "ERROR", "frozen_candidates": True, "metric_decimal_place": 8,
        "metrics": ["Hit", "MRR", "NDCG", "Recall", "GAUC"], "topk": list(CUTOFFS), "valid_metric": "NDCG@10",
        "eval_args": LOO | {"mode": mode},
    }  # fmt: skip
    return run(make_config(model, dataset, [], settings | keys))


def at_chance(found: Any) -> dict[str, tuple[float, float]]:
    """Return the mean of each metric if every rank of every user's items were alike, and its standard error."""
    if "among" in found.pairs:
        among = dict(zip(found.pairs["user_id"].tolist(), found.pairs["among"].tolist(), strict=True))
        sizes = np.array([among[user] for user in found.users["user"].tolist()])
    else:
        sizes = np.full(len(found.users["user"]), CANDIDATES)
    gains = {
        "Hit": lambda r: np.ones_like(r, dtype=float), "Recall": lambda r: np.ones_like(r, dtype=float),
        "MRR": lambda r: 1 / r, "NDCG": lambda r: 1 / np.log2(r + 1),
    }  # fmt: skip
    out = {}
    for name, gain in gains.items():
        for k in CUTOFFS:
            at = gain(np.arange(1, k + 1))
            means = np.array([at.sum() / n for n in sizes])
            squares = np.array([(at**2).sum() / n for n in sizes])
            out[f"{name}@{k}"] = (float(means.mean()), float(np.sqrt((squares - means**2).sum())) / len(sizes))
    spread = np.sqrt(sum((n + 1) / (12 * (n - 1)) for n in sizes)) / len(sizes)
    return out | {"GAUC": (0.5, float(spread))}


def assert_at_chance(found: Any) -> None:
    assert len(found.users["user"]) >= 280
    expected = at_chance(found)
    assert set(found.test) - {"AUC"} == set(expected)
    for name, (mean, error) in expected.items():
        assert abs(found.test[name] - mean) < 4 * error, name
        assert 1 - mean > 4 * error  # a target that wins is noticed


@pytest.mark.parametrize(
    ("model", "protocol"),
    [
        *((ZeroGeneral, "loo uni20"), (ZeroSequential, "loo pop20"), (ZeroGeneral, "paper uni20")),
        *((ZeroSequential, "paper uni20"), (ZeroGeneral, "loo full"), (ZeroSequential, "paper full")),
    ],
)
def test_a_constant_scorer_scores_at_chance(worlds, model, protocol, monkeypatch):
    full = protocol.endswith("full")
    found = outcome(worlds, model, protocol, monkeypatch, **FULL if full else {})
    assert_at_chance(found)
    if full:
        assert "AUC" not in found.test
    else:
        assert set(found.pairs["score"].tolist()) == {0.0} and found.test["AUC"] == 0.5
        assert len(found.pairs["score"]) == len(found.users["user"]) * CANDIDATES


def test_random_scores_at_chance_and_by_pair(worlds, monkeypatch):
    found = outcome(worlds, "Random", "loo uni20", monkeypatch)
    assert_at_chance(found)
    users, per_user = len(found.users["user"]), CANDIDATES - 1
    error = math.sqrt((users + users * per_user + 1) / (12 * users * users * per_user))  # of the Mann-Whitney statistic
    assert abs(found.test["AUC"] - 0.5) < 4 * error
    smaller = outcome(worlds, "Random", "loo uni20", monkeypatch, eval_batch_size=100)
    assert smaller.test == found.test, "RecBole's own Random changes with the batch size"
    other = outcome(worlds, "Random", "loo uni20", monkeypatch, seed=77)
    assert not np.array_equal(other.pairs["score"], found.pairs["score"])
    # all items are ranked by the same scores
    every = Interaction({"user_id": torch.arange(1, 4)})
    scores = found.model.full_sort_predict(every).view(3, -1)
    pairs = Interaction({"user_id": torch.tensor([1, 2, 3]), "item_id": torch.tensor([5, 6, 7])})
    assert torch.equal(found.model.predict(pairs), scores[[0, 1, 2], [5, 6, 7]])
    assert not torch.equal(scores[0], scores[1])
    assert scores.min() >= 0 and scores.max() < 1


# All items ranked


@pytest.mark.parametrize("protocol", ["loo", "paper"])
def test_all_kinds_of_models_rank_the_same_items_and_share_a_digest(
    worlds: Path, protocol: str, monkeypatch: Any
) -> None:
    found = [outcome(worlds, model, f"{protocol} full", monkeypatch, **FULL) for model in ("Pop", "BPR", "SASRec")]
    assert len({one.candidates for one in found}) == 1
    among = [dict(zip(one.pairs["user_id"].tolist(), one.pairs["among"].tolist(), strict=True)) for one in found]
    assert all(one == among[0] for one in among)
    limited = outcome(worlds, "Pop", f"{protocol} full", monkeypatch, limit_users=50, **FULL)
    assert limited.candidates != found[0].candidates
    assert len(limited.users["user"]) == 50
    if protocol == "loo":
        stock = [outcome(worlds, model, f"{protocol} full", monkeypatch) for model in ("Pop", "SASRec")]
        assert len({one.candidates for one in (*stock, found[0])}) == 3  # RecBole's two rules, and ours


@pytest.mark.parametrize("model", ["BPR", "SASRec"])
def test_ranks_and_metrics_are_those_of_the_scores(worlds: Path, model: str, monkeypatch: Any) -> None:
    """Recompute each target's rank from the model's own scores of all items."""
    found = outcome(worlds, model, "loo full", monkeypatch, eval_batch_size=1000, **FULL)
    data, hit = found.dataset, []
    met: dict[int, set[int]] = {}
    for user, item in zip(data.inter_feat["user_id"].tolist(), data.inter_feat["item_id"].tolist(), strict=True):
        met.setdefault(user, set()).add(item)
    if "item_id_list" in data.inter_feat:
        for user, items in zip(
            data.inter_feat["user_id"].tolist(), data.inter_feat["item_id_list"].tolist(), strict=True
        ):
            met[user] |= set(items) - {0}
    kept = found.pairs
    for user in np.unique(kept["user_id"]).tolist()[:60]:
        own = {name: column[kept["user_id"] == user] for name, column in kept.items()}
        order = np.argsort(-own["place"])
        assert (np.diff(own["score"][order]) <= 0).all()
        target = own["item_id"][own["label"] > 0]
        assert len(target) == 1
        left = set(range(1, data.item_num)) - (met[user] - set(target.tolist()))
        assert set(own["item_id"].tolist()) <= left and own["among"][0] == len(left)
        rank = own["among"][0] - own["place"][own["label"] > 0][0]
        place = np.flatnonzero(found.users["user"] == user)[0]
        assert found.users["Hit@10"][place] == float(rank <= 10)
        assert found.users["GAUC"][place] == pytest.approx((len(left) - rank) / (len(left) - 1))
        hit.append(rank <= 10)
    assert 0 < np.mean(hit) < 1


def test_few_items_are_kept_where_rows_are_many() -> None:
    few, many = (AllItems(None, None, lambda u, i: i, rows) for rows in (100, 10_000_000))
    assert few.depth(10) == DEEPEST and many.depth(10) == 11 and few.depth(100) == 101
    assert AllItems(None, None, lambda u, i: i, KEPT_PAIRS // 20).depth(10) == 20


def test_two_targets_of_one_user_are_both_ranked() -> None:
    pool = np.array([False, True, True, True, True, False])
    every = AllItems(pool, None, lambda users, items: -np.asarray(items), 1)
    scores = torch.tensor([[9.0, 3.0, 1.0, 1.0, 2.0, 8.0]])
    found = rank_all(scores, np.array([1]), np.array([0, 0]), np.array([2, 4]), every, 2)
    assert found.place.tolist() == [3, 1] and found.among.tolist() == [4]  # 1, 4, 3, 2: of equals the lower key
    assert found.head.tolist() == [[1, 4]]
    assert math.isinf(found.collected[0, 5]) and torch.argsort(-found.collected[0])[:4].tolist() == [1, 4, 3, 2]


def test_several_rankings_of_one_user_are_no_values_of_a_user(worlds: Path, monkeypatch: Any) -> None:
    rows = {"eval_args": LOO | {"split": {"RS": [0.4, 0.2, 0.4]}, "mode": "full"}} | FULL
    found = outcome(worlds, "SASRec", "loo full", monkeypatch, **rows)
    assert found.pairs is None and found.test["Hit@10"] > 0
    general = outcome(worlds, "Pop", "loo full", monkeypatch, **rows)  # one ranking a user, with several targets
    assert general.pairs is not None and (np.bincount(general.pairs["user_id"], general.pairs["label"]) > 1).any()
