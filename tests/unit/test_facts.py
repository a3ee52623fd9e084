"""Candidates, popularity and order are the raw files': recomputed from the files alone, for every kind of model."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run_parts
from recbole.data import create_dataset
from recbole.evaluator.collector import Collector

from recbole_mllm.common.errors import UserError
from recbole_mllm.evaluation.candidates import digest_of
from recbole_mllm.evaluation.protocol import training_counts
from recbole_mllm.quick_start import make_config, run

MODELS = ("Pop", "BPR", "ItemKNN", "SASRec", "MLLMMSR")
LOO = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user"}
START = 1_700_000_000
Row = tuple[str, str, float]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def world(seed: int, users: int = 24, items: int = 90) -> list[Row]:
    """Return interactions a few seconds apart, some at once, in an order that is not theirs; u0 to u3 have 1 to 4."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        length = user + 1 if user < 4 else int(rng.integers(4, 16))
        times = START + rng.integers(0, 40, length) * 3
        chosen = rng.integers(0, items, length) ** 2 // items  # some are popular, some are taken twice
        rows += [(f"u{user}", f"i{item}", float(time)) for item, time in zip(chosen, times, strict=True)]
    return [rows[n] for n in rng.permutation(len(rows))]


def write_plain(home: Path, name: str, rows: list[Row]) -> dict[str, Any]:
    (home / name).mkdir(exist_ok=True)
    lines = [f"{user}\t{item}\t{time:.0f}" for user, item, time in rows]
    header = "user_id:token\titem_id:token\ttimestamp:float"
    (home / name / f"{name}.inter").write_text("\n".join([header, *lines]) + "\n")
    return {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}}


Listed = tuple[str, list[str], str]  # user, history, target


def write_listed(home: Path, name: str, parts: list[list[Listed]]) -> dict[str, Any]:
    (home / name).mkdir(exist_ok=True)
    for part, rows in zip(("train", "valid", "test"), parts, strict=True):
        lines = [f"{user}\t{' '.join(own)}\t{item}" for user, own, item in rows]
        header = "user_id:token\titem_id_list:token_seq\titem_id:token"
        (home / name / f"{name}.{part}.inter").write_text("\n".join([header, *lines]) + "\n")
    return {
        "benchmark_filename": ["train", "valid", "test"], "alias_of_item_id": ["item_id_list"],
        "load_col": {"inter": ["user_id", "item_id_list", "item_id"]}, "train_on_histories": True,
    }  # fmt: skip


def histories(rows: list[Row]) -> dict[str, list[str]]:
    """Return each user's items by exact time, equal times as in the file."""
    out: dict[str, list[str]] = {}
    for user, item, _ in sorted(rows, key=lambda row: row[2]):
        out.setdefault(user, []).append(item)
    return out


class Expected:
    """What the files say: who is asked about what, who has met what, what is trained on."""

    def __init__(self) -> None:
        self.met: dict[str, set[str]] = defaultdict(set)
        self.targets: dict[str, Counter[tuple[str, str]]] = {"valid": Counter(), "test": Counter()}
        self.trained: Counter[str] = Counter()

    @classmethod
    def plain(cls, rows: list[Row]) -> Expected:
        out = cls()
        for user, own in histories(rows).items():
            if len(own) > 1:  # a user of one interaction is unknown to sequential models
                out.met[user] |= set(own)
                out.trained.update(own[: max(2, len(own) - 2)])
            if len(own) > 2:
                out.targets["test"][user, own[-1]] += 1
            if len(own) > 3:
                out.targets["valid"][user, own[-2]] += 1
        return out

    @classmethod
    def listed(cls, parts: list[list[Listed]]) -> Expected:
        out = cls()
        most: dict[tuple[str, str], int] = defaultdict(int)
        held = Counter((user, target) for rows in parts[1:] for user, _, target in rows)
        for name, rows in zip(("train", "valid", "test"), parts, strict=True):
            for user, own, target in rows:
                out.met[user] |= {*own, target}
                learnt = Counter([*own, target] if name == "train" else own)
                if name != "train":  # the last item but one stands in the test row's list, and is no training
                    learnt -= Counter({item: held[user, item] - (item == target) for item in learnt})
                for item, times in learnt.items():
                    most[user, item] = max(most[user, item], times)
                if name != "train":
                    out.targets[name][user, target] += 1
        for (_, item), times in most.items():
            out.trained[item] += times
        return out


def paper(rows: list[Row]) -> list[list[Listed]]:
    """One row a user: the whole history and the last item."""
    parts: list[list[Listed]] = [[], [], []]
    for number, (user, own) in enumerate(histories(rows).items()):
        if len(own) > 1:
            parts[(0, 0, 1, 2)[number % 4]].append((user, own[:-1], own[-1]))
    return parts


def windows(rows: list[Row]) -> list[list[Listed]]:
    """Several rows a user, each with the last three items before its target, out of order."""
    parts: list[list[Listed]] = [[], [], []]
    for user, own in histories(rows).items():
        for place in range(1, len(own)):
            part = 0 if place < len(own) - 2 else place - len(own) + 3
            parts[part].insert(0, (user, own[max(0, place - 3) : place], own[place]))
    return parts


PROTOCOLS = ("loo-uni", "loo-pop", "paper-uni", "paper-pop", "windows-pop")


def planted(home: Path, protocol: str, seed: int) -> tuple[dict[str, Any], Expected]:
    kind, mode = protocol.split("-")
    rows = world(seed)
    if kind == "loo":
        keys, expected = write_plain(home, "world", rows), Expected.plain(rows)
    else:
        parts = paper(rows) if kind == "paper" else windows(rows)
        keys, expected = write_listed(home, "world", parts), Expected.listed(parts)
    return keys | {"eval_args": LOO | {"mode": f"{mode}5"}}, expected


def configured(home: Path, model: str, keys: dict[str, Any], **more: Any) -> Any:
    own = {"mllm": "none", "train_last_k": 1} if model == "MLLMMSR" else {}
    settings = {"data_path": str(home), "frozen_candidates": True, "state": "ERROR", "worker": 0, "topk": [3]}
    return make_config(model, "world", [], settings | own | {"valid_metric": "NDCG@3"} | keys | more)


def prepared(home: Path, model: str, keys: dict[str, Any], **more: Any) -> Any:
    config = configured(home, model, keys, **more)
    return config, *run_parts.prepared(config)


def asked(dataset: Any, loader: Any) -> tuple[Counter[tuple[str, str]], list[tuple[str, list[str]]]]:
    """Return the targets and each user's negatives, by raw ids."""
    targets: Counter[tuple[str, str]] = Counter()
    negatives = []
    for pairs, owner, *_ in loader:
        users, items = (dataset.id2token(field, pairs[field].numpy()) for field in ("user_id", "item_id"))
        for place in owner.unique().tolist():
            mine = (owner == place).numpy()
            labels = pairs["label"].numpy()[mine] > 0
            user = str(users[mine][0])
            targets.update((user, str(item)) for item in items[mine][labels])
            negatives.append((user, [str(item) for item in items[mine][~labels]]))
    return targets, negatives


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("lengths", "seeds"), [((2, 50), (1,)), pytest.param((2, 10, 100), (2, 3), marks=pytest.mark.slow)]
)
def test_every_model_and_list_length_is_asked_what_the_files_say(
    home: Path, protocol: str, lengths: tuple[int, ...], seeds: tuple[int, ...]
) -> None:
    for seed in seeds:
        keys, expected = planted(home, protocol, seed)
        drawable = set(expected.trained) if "pop" in protocol else set.union(*expected.met.values())
        digests = set()
        for model, length in product(MODELS, lengths):
            more = {"MAX_ITEM_LIST_LENGTH": length, "seed": seed + length}
            if model == "MLLMMSR" and length == lengths[-1]:
                digests.add(digest_of(configured(home, model, keys, **more)))  # before anything is split
            _, dataset, loaders = prepared(home, model, keys, **more)
            digests.add(loaders.candidates)
            for phase, loader in zip(("valid", "test"), loaders[1:3], strict=True):
                targets, negatives = asked(dataset, loader)
                assert targets == expected.targets[phase], (model, length, phase)
                for user, drawn in negatives:
                    assert len(set(drawn)) == len(drawn) and set(drawn) <= drawable - expected.met[user]
            counts, _ = training_counts(loaders[0]._dataset, dataset.user_num, dataset.item_num)
            named = {str(dataset.id2token("item_id", item)): int(counts[item]) for item in np.flatnonzero(counts)}
            assert named == expected.trained, (model, length)
        assert len(digests) == 1


def rows_of(dataset: Any, part: Any) -> list[tuple[str, ...]]:
    """Return user, item and, where there is one, the history of each row, by raw ids."""
    rows = part.inter_feat
    columns = [dataset.id2token(field, rows[field].numpy()).tolist() for field in ("user_id", "item_id")]
    if "item_id_list" in rows:
        lists = dataset.id2token("item_id", rows["item_id_list"].numpy())
        columns.append([" ".join(own[own != "[PAD]"]) for own in lists])
    return list(zip(*columns, strict=True))


@pytest.mark.parametrize("model", ["BPR", "SASRec", "MLLMMSR"])
def test_rows_stand_by_exact_time_then_place_in_the_file(home: Path, model: str) -> None:
    rows = world(5)
    keys = write_plain(home, "world", rows) | {"eval_args": LOO | {"mode": "uni5"}, "train_last_k": None}
    if model == "BPR":  # a run without our candidates stays stock
        _, stock, _ = prepared(home, model, keys, frozen_candidates=None)
        rounded = [row[:2] for row in sorted(rows, key=lambda row: np.float32(row[2]))]
        assert rows_of(stock, stock) == rounded != [row[:2] for row in sorted(rows, key=lambda row: row[2])]
    _, dataset, loaders = prepared(home, model, keys)
    before: dict[str, list[str]] = defaultdict(list)
    expected: list[tuple[str, ...]] = []
    for user, item, _ in sorted(rows, key=lambda row: row[2]):
        expected += [(user, item)] if model == "BPR" else [(user, item, " ".join(before[user]))] * bool(before[user])
        before[user].append(item)
    whole = [row[:3] for row in rows_of(dataset, dataset)]
    if model != "BPR":  # which RecBole has by user before it sorts them by time
        numbers = dataset.field2token_id["user_id"]
        ordered = sorted(((numbers[user], time) for user, _, time in rows))
        times = [time for (user, time), (before_it, _) in zip(ordered[1:], ordered, strict=False) if user == before_it]
        by_user = sorted(expected, key=lambda row: numbers[row[0]])
        expected = [by_user[n] for n in np.argsort(times, kind="stable")]
    assert whole == expected
    if model != "BPR":  # every row's history is what precedes it, in each part
        assert {row for loader in loaders[:3] for row in rows_of(dataset, loader._dataset)} <= set(expected)


@pytest.mark.parametrize("kind", [paper, windows])
def test_general_models_learn_each_interaction_once_and_none_that_is_held_out(home: Path, kind: Any) -> None:
    parts = kind(world(6))
    keys = write_listed(home, "world", parts) | {"eval_args": LOO | {"mode": "uni5"}}
    _, dataset, (train, *_) = prepared(home, "BPR", keys)
    learnt = Counter(rows_of(dataset, train._dataset))
    assert Counter(item for _, item in learnt.elements()) == Expected.listed(parts).trained
    if kind is windows:  # of whose rows nothing may be learnt but what leaving one out trains on
        own = histories(world(6)).items()
        allowed = Counter((user, item) for user, items in own for item in items[:-2] or items[:1])
        assert not learnt - allowed, learnt - allowed


def test_training_rows_are_recboles_own_in_its_order_where_float32_holds_the_times(home: Path) -> None:
    """Else every sequential model's batches, and so its numbers, would be others than RecBole's for no reason."""
    rows = [(user, item, (time - START) // 12) for user, item, time in world(5)]
    assert len({time for *_, time in rows}) < len(rows) / 4  # many at once, of different users
    keys = write_plain(home, "world", rows) | {"eval_args": LOO | {"mode": "uni5"}}
    ours, theirs = (prepared(home, "SASRec", keys, frozen_candidates=frozen)[2] for frozen in (True, None))
    for one, two in zip(ours[:3], theirs[:3], strict=True):
        a, b = one._dataset.inter_feat, two._dataset.inter_feat
        assert all(a[name].tolist() == b[name].tolist() for name in b.columns)


def test_duplicates_are_removed_without_losing_the_order_of_equal_times(home: Path) -> None:
    rows = [(f"u{n % 2}", f"i{n * 7 % 40}", float(START + n // 30)) for n in range(120)]
    keys = write_plain(home, "world", rows) | {"eval_args": LOO | {"mode": "uni5"}, "rm_dup_inter": "first"}
    _, dataset, _ = prepared(home, "BPR", keys)
    assert rows_of(dataset, dataset) == list(dict.fromkeys(row[:2] for row in rows))


def test_the_log_says_whose_order_float32_would_have_changed_and_which_times_cannot_be(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*world(5), ("u5", "i1", -5.0), ("u6", "i1", 0.0), ("u7", "i2", 9e12)]
    keys = write_plain(home, "world", rows) | {"eval_args": LOO | {"mode": "uni5"}}
    exact = histories(rows)
    stock = histories([(user, item, float(np.float32(time))) for user, item, time in rows])
    changed = sum(exact[user] != stock[user] for user in exact)
    assert changed > 10
    with caplog.at_level(logging.INFO):
        create_dataset(configured(home, "SASRec", keys))
    lines = [record.getMessage() for record in caplog.records if record.name == "root"]
    for said in (
        f"of {changed} of 24 users in another order",
        f"times: 2 of {len(rows)} interactions lie at or before 1970, 1 after tomorrow",
    ):
        assert sum(said in line for line in lines) == 1
    caplog.clear()
    places = write_plain(home, "world", [(user, item, time - START) for user, item, time in rows[:-3]])
    with caplog.at_level(logging.INFO):  # places are no moments, however small
        create_dataset(configured(home, "SASRec", places))
    assert not [line for line in caplog.messages if "float32" in line or "1970" in line]


def test_a_dataset_saved_by_a_stock_run_is_put_in_exact_order_and_its_dataloaders_are_refused(home: Path) -> None:
    keys = write_plain(home, "world", world(5)) | {"eval_args": LOO | {"mode": "uni5"}}
    saved = keys | {"checkpoint_dir": str(home / "s")}
    create_dataset(configured(home, "BPR", saved, frozen_candidates=None, save_dataset=True))
    assert (home / "s" / "world-Dataset.pth").is_file()
    (_, dataset, mine), (_, fresh, theirs) = prepared(home, "BPR", saved), prepared(home, "BPR", keys)
    assert rows_of(dataset, dataset) == rows_of(fresh, fresh)
    assert mine.candidates == theirs.candidates
    prepared(home, "BPR", saved, frozen_candidates=None, save_dataloaders=True)
    with pytest.raises(UserError, match="saved dataloaders, delete them"):
        prepared(home, "BPR", saved)


@pytest.mark.parametrize("protocol", ["loo-uni", "paper-uni"])
def test_metrics_of_popularity_count_the_training_split_alike(home: Path, protocol: str) -> None:
    keys, expected = planted(home, protocol, 4)
    (home / "world/world.item").write_text("item_id:token\tclass:token\n" + "".join(f"x{n}\ta\n" for n in range(9)))
    for model in MODELS:
        loaded = {"load_col": keys["load_col"] | ({"item": ["item_id", "class"]} if model == "SASRec" else {})}
        more = {"metrics": ["AveragePopularity", "TailPercentage", "ItemCoverage", "NDCG"], "limit_users": 5}
        more["filter_inter_by_user_or_item"] = False
        config, dataset, (train, *_) = prepared(home, model, keys | loaded, **more)
        collector = Collector(config)
        collector.data_collect(train)
        counted = collector.data_struct.get("data.count_items")
        named = {str(dataset.id2token("item_id", item)): times for item, times in counted.items()}
        assert named == expected.trained, model
        every = {item for _, items in expected.met.items() for item in items}
        unknown = {own[0] for own in histories(world(4)).values() if len(own) == 1} if protocol == "loo-uni" else set()
        assert collector.data_struct.get("data.num_items") == len(every | unknown) + 1, model


@pytest.mark.parametrize(
    ("kind", "batch", "frozen"), [("loo", 1, None), ("loo", 2048, None), ("paper", 2048, None), ("paper", 2048, True)]
)
def test_pop_counts_each_interaction_once_or_under_the_papers_protocol_each_target(
    home: Path, kind: str, batch: int, frozen: bool | None
) -> None:
    from recbole.quick_start.quick_start import get_model, get_trainer

    parts = paper(world(6))
    keys = write_plain(home, "world", world(6)) if kind == "loo" else write_listed(home, "world", parts)
    keys |= {"eval_args": LOO | {"mode": "uni5"}}
    config, dataset, (train, *_) = prepared(home, "Pop", keys, frozen_candidates=frozen, train_batch_size=batch)
    model = get_model("Pop")(config, train._dataset)
    get_trainer(config["MODEL_TYPE"], "Pop")(config, model).fit(train, saved=False)
    trained = Counter(item for _, item in rows_of(dataset, train._dataset))
    assert kind == "loo" or trained == Counter(target for _, _, target in parts[0])
    counts = model.item_cnt[:, 0]
    assert {str(dataset.id2token("item_id", n)): int(counts[n]) for n in counts.nonzero()[:, 0].tolist()} == trained


def test_only_the_metrics_asked_for_are_measured_and_popularity_is_that_of_training(home: Path) -> None:
    keys, expected = planted(home, "loo-uni", 7)
    several = ["NDCG", "AveragePopularity", "TailPercentage"]
    found = run(configured(home, "Pop", keys, metrics=several, show_progress=False))
    assert set(found.test) == {"NDCG@3", "AveragePopularity@3", "TailPercentage@3"} == set(found.valid)
    assert set(found.users) == {"user", "NDCG@3"} and found.pairs is not None
    best = [item for item, place in zip(found.pairs["item_id"], found.pairs["place"], strict=True) if place >= 3]
    popular = np.mean([expected.trained[str(found.dataset.id2token("item_id", item))] for item in best])
    assert found.test["AveragePopularity@3"] == pytest.approx(popular, abs=1e-4)
    assert set(run(configured(home, "Pop", keys, metrics=["NDCG", "GAUC"])).test) == {"NDCG@3", "GAUC", "AUC"}


def test_a_sample_of_users_is_the_same_for_every_model(home: Path) -> None:
    """Among them one of three interactions, whom general models alone could be validated on."""
    keys, expected = planted(home, "loo-uni", 8)
    digests = set()
    for model in MODELS:
        _, dataset, loaders = prepared(home, model, keys, limit_users=4, user_inter_num_interval="[0,5]")
        digests.add(loaders.candidates)
        assert asked(dataset, loaders.valid)[0] <= expected.targets["valid"]
    assert len(digests) == 1
