"""Under full ranking every model ranks the same items; ties, metrics and digests hold as they do for candidates."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_chance import CUTOFFS, ZeroGeneral, ZeroSequential, outcome
from test_chance import worlds as worlds

FULL = {"exclude_seen": True}


@pytest.fixture(autouse=True)
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    import test_chance

    monkeypatch.setattr(test_chance, "PROTOCOLS", {"loo": ("loo", "full"), "paper": ("paper", "full")})


def expected(found: Any) -> dict[str, tuple[float, float]]:
    """Return the mean of each metric if every rank of every user's items were alike, and its standard error."""
    among = dict(zip(found.pairs["user_id"].tolist(), found.pairs["among"].tolist(), strict=True))
    sizes = np.array([among[user] for user in found.users["user"].tolist()])
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


@pytest.mark.parametrize(("model", "protocol"), [(ZeroGeneral, "loo"), (ZeroSequential, "paper")])
def test_a_constant_scorer_scores_at_chance(worlds: Path, model: Any, protocol: str, monkeypatch: Any) -> None:
    found = outcome(worlds, model, protocol, monkeypatch, **FULL)
    assert len(found.users["user"]) >= 280 and "AUC" not in found.test
    for name, (mean, error) in expected(found).items():
        assert abs(found.test[name] - mean) < 4 * error, name
    assert set(found.test) == set(expected(found))
    assert all(1 - mean > 4 * error for mean, error in expected(found).values())  # a target that wins is noticed


@pytest.mark.parametrize("protocol", ["loo", "paper"])
def test_all_kinds_of_models_rank_the_same_items_and_share_a_digest(
    worlds: Path, protocol: str, monkeypatch: Any
) -> None:
    found = [outcome(worlds, model, protocol, monkeypatch, **FULL) for model in ("Pop", "BPR", "SASRec")]
    assert len({one.candidates for one in found}) == 1
    among = [dict(zip(one.pairs["user_id"].tolist(), one.pairs["among"].tolist(), strict=True)) for one in found]
    assert all(one == among[0] for one in among)
    limited = outcome(worlds, "Pop", protocol, monkeypatch, limit_users=50, **FULL)
    assert limited.candidates != found[0].candidates
    assert len(limited.users["user"]) == 50
    if protocol == "loo":
        stock = [outcome(worlds, model, protocol, monkeypatch) for model in ("Pop", "SASRec")]
        assert len({one.candidates for one in (*stock, found[0])}) == 3  # RecBole's two rules, and ours


@pytest.mark.parametrize("model", ["BPR", "SASRec"])
def test_ranks_and_metrics_are_those_of_the_scores(worlds: Path, model: str, monkeypatch: Any) -> None:
    """Recompute each target's rank from the model's own scores of all items."""
    found = outcome(worlds, model, "loo", monkeypatch, eval_batch_size=1000, **FULL)
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
    from recbole_mllm.evaluation.full_ranking import DEEPEST, KEPT_PAIRS, AllItems

    few, many = (AllItems(None, None, lambda u, i: i, rows) for rows in (100, 10_000_000))
    assert few.depth(10) == DEEPEST and many.depth(10) == 11 and few.depth(100) == 101
    assert AllItems(None, None, lambda u, i: i, KEPT_PAIRS // 20).depth(10) == 20


def test_two_targets_of_one_user_are_both_ranked() -> None:
    from recbole_mllm.evaluation.full_ranking import AllItems, rank_all

    pool = np.array([False, True, True, True, True, False])
    every = AllItems(pool, None, lambda users, items: -np.asarray(items), 1)
    scores = torch.tensor([[9.0, 3.0, 1.0, 1.0, 2.0, 8.0]])
    found = rank_all(scores, np.array([1]), np.array([0, 0]), np.array([2, 4]), every, 2)
    assert found.place.tolist() == [3, 1] and found.among.tolist() == [4]  # 1, 4, 3, 2: of equals the lower key
    assert found.head.tolist() == [[1, 4]]
    assert math.isinf(found.collected[0, 5]) and torch.argsort(-found.collected[0])[:4].tolist() == [1, 4, 3, 2]


def test_several_rankings_of_one_user_are_no_values_of_a_user(worlds: Path, monkeypatch: Any) -> None:
    import test_chance

    rows = {"split": {"RS": [0.4, 0.2, 0.4]}, "order": "TO", "group_by": "user"}
    monkeypatch.setattr(test_chance, "LOO", rows)
    found = outcome(worlds, "SASRec", "loo", monkeypatch, **FULL)
    assert found.pairs is None and found.test["Hit@10"] > 0
    general = outcome(worlds, "Pop", "loo", monkeypatch, **FULL)  # one ranking a user, with several targets
    assert general.pairs is not None and (np.bincount(general.pairs["user_id"], general.pairs["label"]) > 1).any()
