"""What RecBole makes of atomic files, by its own code and by ours: every column, split, batch and draw is the same."""

import contextlib
import pickle

import numpy as np
import pytest
import random_world
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.dataset import Dataset, SequentialDataset
from recbole.data.interaction import Interaction
from recbole.sampler.sampler import AbstractSampler, RepeatableSampler, Sampler
from recbole.utils import init_seed

from recbole_mllm.recbole_patches import fast_loading, list_column
from recbole_mllm.recbole_patches.list_column import ListColumn
from recbole_mllm.recbole_patches.used_ids import UsedIds

REPLACED = (
    (Interaction, "__getitem__"),
    (Dataset, "_grouped_index"),
    (Dataset, "_split_index_by_leave_one_out"),
    (SequentialDataset, "data_augmentation"),
    (Sampler, "get_used_ids"),
    (RepeatableSampler, "get_used_ids"),
    (AbstractSampler, "sample_by_key_ids"),
)
LOO = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "uni5"}
CE = {"train_neg_sample_args": None}
POPULAR = {"distribution": "popularity", "sample_num": 2, "alpha": 0.7, "dynamic": False, "candidate_num": 0}
WIDE = {"load_col": None, "numerical_features": ["rating"]}

CASES = {
    "SASRec, cross entropy": ("SASRec", CE | {"eval_args": LOO}),
    "SASRec, every column": ("SASRec", CE | WIDE | {"eval_args": LOO}),
    "SASRec, test only": ("SASRec", CE | {"eval_args": LOO | {"split": {"LS": "test_only"}, "mode": "full"}}),
    "SASRec, ratios": ("SASRec", CE | {"eval_args": LOO | {"split": {"RS": [0.6, 0.2, 0.2]}}}),
    "SASRec, k-core": (
        "SASRec",
        CE | WIDE | {"user_inter_num_interval": "[3,inf)", "item_inter_num_interval": "[2,9]"},
    ),
    "SASRec, filters": (
        "SASRec",
        CE | WIDE | {"rm_dup_inter": "last", "val_interval": {"rating": "[2,5]"}, "MAX_ITEM_LIST_LENGTH": 2},
    ),
    "GRU4RecF": ("GRU4RecF", CE | {"load_col": None, "selected_features": ["class"]}),
    "FPMC": ("FPMC", {"eval_args": LOO}),
    "BPR by popularity": ("BPR", {"eval_args": LOO | {"mode": "pop5"}, "train_neg_sample_args": POPULAR}),
    "FM, pointwise": ("FM", {"load_col": None, "threshold": {"rating": 3}, "eval_args": LOO | {"mode": "labeled"}}),
}


@contextlib.contextmanager
def recboles_own():
    """Put RecBole's genuine functions back for a while."""
    ours = [(owner, name, vars(owner)[name]) for owner, name in REPLACED]
    is_plain = fast_loading.is_plain
    try:
        for owner, name, shim in ours:
            setattr(owner, name, shim.__wrapped__)
        fast_loading.is_plain = lambda *_: False
        yield
    finally:
        fast_loading.is_plain = is_plain
        for owner, name, shim in ours:
            setattr(owner, name, shim)


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return {
        "data_path": str(tmp_path),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "train_batch_size": 64,
        "eval_batch_size": 100,
        "worker": 0,
        "state": "ERROR",
        "seed": 5,
    }


def prepared(model, config):
    config = Config(model=model, dataset="random", config_dict=config)
    init_seed(config["seed"], True)
    dataset = create_dataset(config)
    return config, dataset, data_preparation(config, dataset)


def everything(model, config):
    """Yield all a model could see: tables, vocabularies, matrices, two epochs, evaluation, the generators' state."""
    _, dataset, loaders = prepared(model, config)
    parts = [dataset, *(loader._dataset for loader in loaders)]
    yield "vocabularies", {field: list(tokens) for field, tokens in dataset.field2id_token.items()}
    yield "properties", [dataset.field2type, dataset.field2source, dataset.field2seqlen]
    for name in ("inter_feat", "user_feat", "item_feat"):
        yield name, [table and dict(table.interaction) for table in (getattr(part, name) for part in parts)]
    for number in range(2):
        yield f"epoch {number}", list(loaders[0])
    yield "evaluation", [list(loader) for loader in loaders[1:]]
    yield "matrix", [loaders[0]._dataset.inter_matrix(form).toarray() for form in ("csr", "coo")]
    yield "histories", dataset.history_item_matrix()
    for loader in loaders:
        used = loader._sampler.used_ids if loader._sampler is not None else [[]]
        yield "used items", [len(used), list(used), list(used[[0, -1]]) if len(used) > 1 else []]
    yield "generators", [np.random.get_state()[1], torch.get_rng_state()]


def assert_same(one, two, where):
    if isinstance(one, Interaction):
        one, two = one.interaction, two.interaction
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and one.shape == two.shape, where
        assert torch.equal(torch.nan_to_num(one, 7.5), torch.nan_to_num(two, 7.5)), where
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, two), where
    elif isinstance(one, dict):
        assert list(one) == list(two), where
        for key in one:
            assert_same(one[key], two[key], f"{where}, {key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for number, pair in enumerate(zip(one, two, strict=True)):
            assert_same(*pair, f"{where}[{number}]")
    else:
        assert one == two, where


@pytest.mark.parametrize("case", CASES)
def test_nothing_differs_from_recboles_own(case, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(list_column, "PLAIN_ELEMENTS", 300 * (len(case) % 2))
    model, more = CASES[case]
    random_world.write(tmp_path, "random", seed=len(case))
    with recboles_own():
        expected = list(everything(model, settings | more))
    found = list(everything(model, settings | more))
    for (name, one), (_, two) in zip(expected, found, strict=True):
        assert_same(one, two, f"{case}: {name}")


def test_the_fast_way_is_taken(settings, tmp_path, monkeypatch):
    """The comparisons above would also pass if everything fell back."""
    monkeypatch.setattr(list_column, "PLAIN_ELEMENTS", 300)
    random_world.write(tmp_path, "random", seed=1)
    assert all(hasattr(vars(owner)[name], "__wrapped__") for owner, name in REPLACED)
    read = []
    stock = fast_loading.read_fast
    monkeypatch.setattr(fast_loading, "read_fast", lambda *a, **k: [read.append(stock(*a, **k)), read[-1]][1])
    _, _, (train, valid, _) = prepared("SASRec", settings | CE | WIDE)
    assert len(read) == 3 and all(frame is not None for frame in read)
    lists = [name for name in train._dataset.inter_feat if name.endswith("_list")]
    assert len(lists) == 6 and all(type(train._dataset.inter_feat[name]) is ListColumn for name in lists)
    assert type(prepared("BPR", settings)[2][0]._sampler.used_ids) is UsedIds


def test_a_user_who_met_everything_is_refused_in_recboles_words(settings, tmp_path):
    (tmp_path / "random").mkdir()
    rows = [f"{user}\t{item}\t{item}" for user in "ab" for item in range(5 if user == "a" else 3)]
    (tmp_path / "random/random.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n" + "\n".join(rows))
    messages = []
    for way in (recboles_own, contextlib.nullcontext):
        with way(), pytest.raises(ValueError, match="interacted with all items") as error:
            prepared("BPR", settings)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_saved_loaders_and_datasets_come_back(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(list_column, "PLAIN_ELEMENTS", 0)
    random_world.write(tmp_path, "random", seed=4)
    more = settings | CE | {"checkpoint_dir": str(tmp_path / "saved"), "save_dataset": True, "save_dataloaders": True}
    _, _, first = prepared("SASRec", more)
    _, _, again = prepared("SASRec", more)
    for one, two in zip(first, again, strict=True):
        assert type(two._dataset.inter_feat["item_id_list"]) is ListColumn
        assert_same(one._dataset.inter_feat, two._dataset.inter_feat, "loaded")
    small = pickle.dumps(again[0]._dataset.inter_feat["item_id_list"])
    assert len(small) < 20 * len(again[0]._dataset) + 9 * 8 * 400
