"""Converted datasets inside RecBole: exact order survives its float32, and every model runs on benchmark files."""

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


# fmt: off
ALL = [
    "BERT4Rec", "Caser", "CORE", "DIEN", "DIN", "FEARec", "FOSSIL", "FPMC", "GCSAN", "GRU4RecCPR", "HGN", "HRM",
    "LightSANs", "NARM", "NextItNet", "NPE", "RepeatNet", "SASRecCPR", "SHAN", "SINE", "SRGNN", "STAMP", "TransRec",
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
