"""Frozen candidates and MLLMMSR's rows, held against plain loops over the same data."""

from collections import Counter

import numpy as np
import pytest
import random_world
import run_parts
import torch
from recbole.config import Config
from recbole.data.dataloader import NegSampleEvalDataLoader

from recbole_mllm.data.schema import POSITION, TIE
from recbole_mllm.recbole_patches import list_column

LOO = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "uni5"}
CE = {"train_neg_sample_args": None}


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(list_column, "PLAIN_ELEMENTS", 0)  # lists are cut as they are read, as for large datasets
    random_world.write(tmp_path, "random", seed=11, users=50, items=60)
    return {
        "data_path": str(tmp_path),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "eval_args": LOO,
        "eval_batch_size": 40,
        "frozen_candidates": True,
        "worker": 0,
        "state": "ERROR",
    }


def prepared(model, config):
    config = Config(model=model, dataset="random", config_dict=config)
    return config, *run_parts.prepared(config)


class Given:
    """A sampler for RecBole's loader that hands out the frozen negatives."""

    phase = "test"

    def __init__(self, loader):
        self.negatives = dict(zip(loader.rows.users.tolist(), loader.negatives.reshape(-1, 5), strict=True))

    def sample_by_user_ids(self, users, items, count):
        return torch.from_numpy(np.concatenate([self.negatives[user] for user in users.tolist()]))


@pytest.mark.parametrize("plain", [0, 1 << 22])
def test_batches_are_laid_out_as_recboles(settings, plain, monkeypatch):
    monkeypatch.setattr(list_column, "PLAIN_ELEMENTS", plain)
    features = {"load_col": None, "selected_features": ["class"]}
    config, _, (_, _, test, _) = prepared("GRU4RecF", settings | CE | features)
    stock = NegSampleEvalDataLoader(config, test._dataset.copy(test._dataset.inter_feat), Given(test))
    batches = list(zip(stock, test, strict=True))
    assert stock.step == test.step and len(batches) > 3
    for (one, *theirs), (two, *ours) in batches:
        assert set(two.columns) - set(one.columns) == {TIE}
        for name in one.columns:
            assert one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]), name
        assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))


def test_users_with_several_targets_get_negatives_for_each(settings, tmp_path):
    split = {"split": {"RS": [0.4, 0.3, 0.3]}, "order": "RO", "group_by": "user", "mode": "uni5"}
    _, dataset, (train, valid, test, _) = prepared("BPR", settings | {"eval_args": split})
    met, several = met_by(dataset, tmp_path), 0
    for loader in (valid, test):
        rows = loader._dataset.inter_feat
        owned = Counter(rows["user_id"].tolist())
        found = Counter()
        for pairs, owner, positive_u, positive_i in loader:
            for place in owner.unique().tolist():
                mine = pairs["user_id"][owner == place].tolist()
                items, labels = (pairs[name][owner == place].numpy() for name in ("item_id", "label"))
                user, own = mine[0], owned[mine[0]]
                assert set(mine) == {user} and labels.tolist() == [1.0] * own + [0.0] * 5 * own
                assert sorted(items[:own]) == sorted(rows["item_id"][rows["user_id"] == user].tolist())
                times = rows["timestamp"][rows["user_id"] == user]
                shown = pairs["timestamp"][owner == place]
                assert torch.equal(shown, torch.cat([times, times.repeat_interleave(5)]))
                assert positive_i[positive_u == place].tolist() == items[:own].tolist()
                drawn = items[own:].tolist()
                assert len(set(drawn)) == len(drawn) and not set(drawn) & met[user]
                found[user] += 1
                several += own > 1
        assert set(found) == set(owned) and set(found.values()) == {1}
    assert several > 10


def lines(data_path):
    """Return the fields of every interaction in the file."""
    _, *rows = (data_path / "random/random.inter").read_text(encoding="utf-8").splitlines()
    return [row.split("\t") for row in rows]


def met_by(dataset, data_path):
    """Return each internal user's internal items, read from the file."""
    users, items = (dataset.field2token_id[field] for field in ("user_id", "item_id"))
    met = {}
    for user, item, *_ in lines(data_path):
        met.setdefault(users[user], set()).add(items[item])
    return met


def test_a_phase_without_rows_has_no_candidates(settings):
    _, dataset, (_, valid, test, _) = prepared(
        "SASRec", settings | CE | {"eval_args": LOO | {"split": {"LS": "test_only"}}}
    )
    assert len(list(valid)) == 0 and sum(len(batch[2]) for batch in test) > 40


@pytest.mark.parametrize("more", [{}, {"MAX_ITEM_LIST_LENGTH": 3}, {"limit_users": 7, "train_last_k": 2}])
def test_histories_and_positions_are_the_files(settings, more, tmp_path):
    _, dataset, loaders = prepared("MLLMMSR", settings | {"mllm": "none", "train_last_k": None} | more)
    expected = {}
    for user, item, *_ in sorted(lines(tmp_path), key=lambda line: float(line[2])):  # stable, not RecBole's float32
        expected.setdefault(user, []).append(item)
    train = loaders[0]._dataset
    assert dict(train.histories) == {user: own for user, own in expected.items() if len(own) > 1}
    positions, first = {}, []
    for loader in loaders[:3]:
        rows = loader._dataset.inter_feat
        raw = dataset.id2token("user_id", rows["user_id"].numpy()).tolist()
        for user, place, item in zip(raw, rows[POSITION].tolist(), rows["item_id"].tolist(), strict=True):
            positions.setdefault(user, set()).add(place)
            assert expected[user][place] == dataset.id2token("item_id", item)
        first += raw
    assert dict(train.positions) == positions
    assert "nobody" not in train.positions and "u0" not in train.histories
    if "limit_users" in more:  # the same users in each part, of whom training reads the latest rows
        users = [set(loader._dataset.inter_feat["user_id"].tolist()) for loader in loaders[:3]]
        assert users[2] >= users[0] | users[1] and len(users[2]) == 7
        own = dataset.id2token("user_id", train.inter_feat["user_id"].numpy()).tolist()
        latest = {user: max(1, len(expected[user]) - 3) for user in own}
        kept = {(user, place) for user, last in latest.items() for place in (last, last - 1) if place}
        assert set(zip(own, train.inter_feat[POSITION].tolist(), strict=True)) == kept
    if not more:
        assert list(train.positions) == list(dict.fromkeys(first))
