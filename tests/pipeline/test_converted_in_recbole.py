"""Converted datasets inside RecBole: exact order survives its float32, and every model runs on benchmark files."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raw_dumps import write_microlens

import recbole_mllm  # noqa: F401  registers with RecBole
from recbole_mllm.cli import main
from recbole_mllm.quick_start import make_config, run

TINY = {
    "mllm": "tiny",
    "hidden_size": 16, "inner_size": 16, "embedding_size": 16, "n_heads": 2, "epochs": 1, "train_batch_size": 64,
    "show_progress": False, "state": "ERROR", "metrics": ["NDCG", "GAUC"], "topk": [5], "valid_metric": "NDCG@5",
    "frozen_candidates": True, "reproducibility": True,
}  # fmt: skip
UNI = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "uni20"}


def config(folder: Path, model: str, **keys: Any) -> Any:
    more = {"data_path": str(folder.parent), "checkpoint_dir": str(folder.parent / "saved"), "eval_args": UNI}
    return make_config(model, folder.name, [], {**TINY, **more, **keys})


def dataset(folder: Path, model: str, **keys: Any) -> tuple[Any, list[Any]]:
    from recbole.data import create_dataset
    from recbole.utils import init_logger

    made = config(folder, model, **keys)
    init_logger(made)
    whole = create_dataset(made)
    return whole, whole.build()


def raw(whole: Any, field: str, values: Any) -> list[str]:
    return [str(token) for token in whole.id2token(field, np.asarray(values))]


@pytest.mark.parametrize("unit", [1, 1000])
def test_the_exact_order_survives_recboles_own_sort(tmp_path, unit):
    rng = random.Random(unit)
    rows = [
        (f"u{rng.randrange(12)}", f"i{n}", 1_700_000_000 * unit + rng.randrange(90 * unit), rng.randrange(1, 6))
        for n in range(400)
    ]
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "ratings.dat").write_text(
        "".join("::".join(map(str, row)) + "\n" for row in [(u, i, s, t) for u, i, t, s in rows])
    )
    (folder / "movies.dat").write_text("0::A title::Drama\n")
    assert main(["convert", "movielens", "--raw", str(folder), "--out", str(tmp_path / "m")]) == 0
    whole, (_, _, test) = dataset(tmp_path / "m", "SASRec")
    exact: dict[str, list[str]] = {}
    for user, item, _, _ in sorted(rows, key=lambda row: row[2]):  # stable: ties in the file's order
        exact.setdefault(user, []).append(item)
    shown = test.inter_feat
    users, targets = (raw(whole, field, shown[field]) for field in ("user_id", "item_id"))
    lists, lengths = shown["item_id_list"].numpy(), shown["item_length"].tolist()
    for u, items, length, target in zip(users, lists, lengths, targets, strict=True):
        assert [*raw(whole, "item_id", items[:length]), target] == exact[u][-length - 1 :]
    assert len(shown) == 12
    _, (_, _, general) = dataset(tmp_path / "m", "BPR")
    last = dict(zip(raw(whole, "user_id", general.inter_feat["user_id"]), general.inter_feat["item_id"], strict=True))
    assert {u: raw(whole, "item_id", [i])[0] for u, i in last.items()} == {u: items[-1] for u, items in exact.items()}


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty users who walk along a ring of 40 items; one in ten walks for 20 steps."""
    folder = tmp_path_factory.mktemp("paper")
    lists = {f"u{u}": [f"i{(3 * u + k) % 40}" for k in range(20 if u % 10 == 0 else 3 + u % 4)] for u in range(60)}
    dump = write_microlens(folder / "raw", lists, {f"i{n}": f"title {n}" for n in range(40)})
    assert main(["convert", "microlens", "--raw", str(dump), "--out", str(folder / "ring"), "--protocol", "paper"]) == 0
    return folder / "ring"


def lists_of(folder: Path, part: str) -> dict[str, list[str]]:
    lines = (folder / f"{folder.name}.{part}.inter").read_text().splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    return {user: [*items.split(" "), target] for user, items, target in rows}


@pytest.mark.parametrize("width", [5, 50])
def test_sequential_models_see_the_latest_items_at_the_configured_width(paper, width):
    whole, parts = dataset(paper, "SASRec", MAX_ITEM_LIST_LENGTH=width)
    for name, part in zip(("train", "valid", "test"), parts, strict=True):
        expected, rows = lists_of(paper, name), part.inter_feat
        assert rows["item_id_list"].shape == (len(expected), width)
        users = raw(whole, "user_id", rows["user_id"])
        for u, items, length in zip(users, rows["item_id_list"], rows["item_length"].tolist(), strict=True):
            assert raw(whole, "item_id", items[:length]) == expected[u][:-1][-width:]
            assert not items[length:].any()


def test_general_models_learn_all_histories_and_the_train_users_targets_alone(paper):
    whole, (train, valid, test) = dataset(paper, "BPR")
    expected = sorted(
        (u, i)
        for name in ("train", "valid", "test")
        for u, items in lists_of(paper, name).items()
        for i in (items if name == "train" else items[:-1])
    )

    def rows(part: Any) -> list[tuple[str, str]]:
        users, items = (raw(whole, field, part.inter_feat[field]) for field in ("user_id", "item_id"))
        return list(zip(users, items, strict=True))

    assert sorted(rows(train)) == expected
    for name, part in (("valid", valid), ("test", test)):
        assert dict(rows(part)) == {u: items[-1] for u, items in lists_of(paper, name).items()}
    _, (counted, *_) = dataset(paper, "Pop")
    assert sorted(raw(whole, "item_id", counted.inter_feat["item_id"])) == sorted(
        i[-1] for i in lists_of(paper, "train").values()
    )


@pytest.mark.parametrize("frozen", [True, None])
def test_pop_counts_every_target_and_nothing_else(tmp_path, frozen):
    lists = {f"u{u}": [f"i{u % 7}", f"i{7 + u % 3}", f"j{u % 2 if u % 3 else 0}"] for u in range(60)}
    raw_dump = write_microlens(tmp_path / "raw", lists, {})
    words = f"convert microlens --raw {raw_dump} --out {tmp_path / 'd'} --protocol paper"
    assert main(words.split()) == 0
    keys = {"frozen_candidates": frozen, "eval_args": {**UNI, "mode": "uni5"}}
    outcome = run(config(tmp_path / "d", "Pop", **keys))
    tokens = outcome.dataset.field2id_token["item_id"]
    counts = {str(token): int(count) for token, count in zip(tokens, outcome.model.item_cnt[:, 0], strict=True)}
    targets = [items[-1] for items in lists_of(tmp_path / "d", "train").values()]
    expected = {item: targets.count(item) for item in set(targets)}
    assert {item: count for item, count in counts.items() if count} == expected


def test_mllmmsr_knows_the_whole_history_behind_a_cut_list(paper):
    whole, (_, _, test) = dataset(paper, "MLLMMSR", MAX_ITEM_LIST_LENGTH=5)
    everything = {u: items for name in ("train", "valid", "test") for u, items in lists_of(paper, name).items()}
    assert whole.histories == {user: items[:-1] for user, items in everything.items()}
    assert {user: set(items) for user, items in whole.met.items()} == {u: set(i) for u, i in everything.items()}
    users = raw(whole, "user_id", test.inter_feat["user_id"])
    assert dict(zip(users, test.inter_feat["_position"].tolist(), strict=True)) == {
        u: len(everything[u]) - 1 for u in users
    }


def test_all_models_meet_the_same_candidates_on_benchmark_files(paper):
    runs = [run(config(paper, model)) for model in ("Pop", "BPR", "ItemKNN", "SASRec", "GRU4Rec", "DIEN")]
    assert len({outcome.candidates for outcome in runs}) == 1
    users = len(lists_of(paper, "test"))
    assert all(len(outcome.pairs["label"]) == 21 * users for outcome in runs if outcome.pairs)


# fmt: off
ALL = [
    "BERT4Rec", "Caser", "CORE", "DIN", "FEARec", "FOSSIL", "FPMC", "GCSAN", "GRU4RecCPR", "HGN", "HRM", "LightSANs",
    "NARM", "NextItNet", "NPE", "RepeatNet", "SASRecCPR", "SHAN", "SINE", "SRGNN", "STAMP", "TransRec",
]
# fmt: on


@pytest.mark.slow
@pytest.mark.parametrize("model", ALL)
def test_every_stock_sequential_model_runs_on_benchmark_files(paper, model):
    # CPR models refuse to score single candidates (sasreccpr.py:478), and this world has 40 items, not 100
    keys = {"eval_args": {**UNI, "mode": "full"}, "reranker_CAN_NUM": 20} if model.endswith("CPR") else {}
    outcome = run(config(paper, model, **{"metrics": ["NDCG"], **keys}))
    assert 0 <= outcome.test["NDCG@5"] <= 1
    each = 40 if model.endswith("CPR") else 21  # all items of this world, or the candidates
    assert outcome.pairs is None or len(outcome.pairs["label"]) == each * len(lists_of(paper, "test"))


@pytest.fixture(scope="module")
def movies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty users who walk along a ring of 40 films with two genres each, as benchmark files."""
    folder = tmp_path_factory.mktemp("movies")
    rows = [f"{u + 1}::{(3 * u + k) % 40 + 1}::4::{1000 + k}\n" for u in range(60) for k in range(3 + u % 4)]
    films = [f"{n + 1}::Film {n} (1999)::Drama|{('War', 'Comedy')[n % 2]}\n" for n in range(40)]
    (folder / "raw").mkdir()
    (folder / "raw" / "ratings.dat").write_text("".join(rows))
    (folder / "raw" / "movies.dat").write_text("".join(films))
    words = f"convert movielens --raw {folder / 'raw'} --out {folder / 'films'} --protocol paper"
    assert main(words.split()) == 0
    return folder / "films"


@pytest.mark.slow
@pytest.mark.parametrize("model", ["FDSA", "GRU4RecF", "S3Rec", "SASRecF"])
def test_stock_models_of_item_features_run_on_benchmark_files(movies, model):
    load = {"inter": ["user_id", "item_id_list", "item_id"], "item": ["item_id", "genres"]}
    keys = {"load_col": load, "selected_features": ["genres"], "item_attribute": "genres"}
    outcome = run(config(movies, model, **keys))
    assert outcome.train_data is not None
    assert all(np.isfinite(value) for value in outcome.test.values())
