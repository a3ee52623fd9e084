"""An epoch's training rows: negatives nobody met, the same rows grouped or not, known by seed and epoch alone."""

import re
from collections import Counter

import numpy as np
import pytest
import small_world
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation

from recbole_mllm.common.errors import UserError
from recbole_mllm.data.dataloader import Negatives, SeededTrainDataLoader
from recbole_mllm.data.schema import POSITION


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    small_world.write(folder, images=False)
    return folder


@pytest.fixture
def settings(place):
    return {"data_path": str(place), "checkpoint_dir": str(place / "saved"), "seed": 7, "train_batch_size": 16,
            "mllm": "tiny"}  # fmt: skip


def _loader(settings, **more):
    config = Config(model="MLLMMSR", dataset="steps", config_dict=settings | more)
    return data_preparation(config, create_dataset(config))[0]


def _rows(loader, epoch=0, first=0):
    """Return each batch's (user, position, item, label), raw numbers of users and items."""
    loader.set_epoch(epoch, first)
    users, items = (loader._dataset.field2id_token[field] for field in ("user_id", "item_id"))
    return [
        [
            (int(users[u][1:]), p, int(items[i][1:]), label)
            for u, p, i, label in zip(*(b[f].tolist() for f in ("user_id", POSITION, "item_id", "label")), strict=True)
        ]
        for b in loader
    ]


def test_the_layout_is_recboles_positives_then_their_negatives(settings):
    how = {"distribution": "uniform", "sample_num": 3, "alpha": 1.0, "dynamic": False, "candidate_num": 0}
    for drawn, keys in ((1, {}), (3, {"train_neg_sample_args": how})):
        loader = _loader(settings, **keys)
        batches = _rows(loader)
        assert isinstance(loader, SeededTrainDataLoader) and len(batches) == len(loader)
        for batch in batches:
            count = len(batch) // (1 + drawn)
            assert [row[3] for row in batch] == [1.0] * count + [0.0] * drawn * count
            assert all(row[:2] == batch[place % count][:2] for place, row in enumerate(batch))
            assert all(item == (2 * user + place) % small_world.ITEMS for user, place, item, _ in batch[:count])


def test_no_negative_is_of_the_users_training_history_and_all_occur_in_training(settings):
    loader = _loader(settings, train_last_k=2)
    trained = small_world.LENGTH - 2  # the last two of each user are held out
    everything = {(2 * u + t) % small_world.ITEMS for u in range(small_world.USERS) for t in range(trained)}
    drawn = [(user, item) for epoch in range(40) for b in _rows(loader, epoch) for user, _, item, y in b if not y]
    for user, item in drawn:
        assert (item - 2 * user) % small_world.ITEMS >= trained and item in everything
    held_out = [(item - 2 * user) % small_world.ITEMS < small_world.LENGTH for user, item in drawn]
    assert 0.5 < np.mean(held_out) / (2 / (small_world.ITEMS - trained)) < 2  # drawn as often as any other
    counts = Counter(item for _, item in drawn)
    assert len(counts) == len(everything) and max(counts.values()) < 3 * min(counts.values())


def test_an_epoch_is_known_by_seed_and_epoch_alone(settings):
    loader, other = _loader(settings), _loader(settings)
    first = _rows(loader, 3)
    np.random.seed(1)
    torch.manual_seed(1)
    list(other)
    assert _rows(other, 3) == first != _rows(other, 4)
    assert _rows(other, 3, first=5) == first[5:]
    assert _rows(_loader(settings, seed=8), 3) != first
    passes = [[batch["item_id"].tolist() for batch in other] for _ in range(2)]  # counts up by itself
    assert passes[0] != passes[1]


def test_grouping_deals_out_the_same_rows_with_one_items_together(settings):
    loader = _loader(settings)
    plain = _rows(loader)
    SeededTrainDataLoader.of(loader, grouped=True)
    grouped = _rows(loader)
    assert sorted(sum(grouped, [])) == sorted(sum(plain, [])) and [*map(len, grouped)] == [*map(len, plain)]
    assert [loader.rows_in(n) for n in range(len(loader))] == [*map(len, grouped)]

    def neighbours(batches):
        return np.mean([a[2] == b[2] for batch in batches for a, b in zip(batch, batch[1:], strict=False)])

    assert neighbours(grouped) > 0.55 > 0.15 > neighbours(plain)
    assert all(max(Counter(row[2] for row in batch).values()) <= 8 for batch in grouped)
    assert len({tuple(batch) for batch in grouped} & {tuple(batch) for batch in _rows(loader, 1)}) == 0


def test_popular_negatives_come_in_proportion():
    met = np.array([(user, 1) for user in range(1, 31)] + [(user, 2) for user in range(1, 11)] + [(31, 3)])
    drawn = Negatives(met, 1.0).draw(np.full(4000, 31), np.random.default_rng(0))
    assert set(drawn) == {1, 2} and abs(np.mean(drawn == 1) - 0.75) < 0.05


def test_a_user_who_met_everything_is_one_clear_error(settings, tmp_path):
    folder = tmp_path / "steps"
    folder.mkdir()
    rows = [f"u{u}\ti{t}\t{t}" for u in range(2) for t in range(6)]
    (folder / "steps.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n" + "\n".join(rows) + "\n")
    with pytest.raises(UserError, match="user u. has met all 4 items that occur in training"):
        list(_loader(settings | {"data_path": str(tmp_path), "frozen_candidates": False}))


EARLY = {
    "dynamic": ({"train_neg_sample_args": {"dynamic": True}}, "dynamic asks an MLLM about every candidate"),
    "no negative left": ({}, "user all has met all 60 items that occur in training, so no negative is left"),
    "style": ({"prompt_style": "nothing"}, "prompt_style 'nothing' is unknown"),
    "metric": ({"valid_metric": "MRR@7"}, "MRR@7 is not measured"),
    "labels": ({"eval_args": {"mode": "labeled", "order": "TO"}}, "has no candidates to freeze"),
    "retriever": ({"retriever": "SASRek"}, "'SASRek' cannot be had: it is no model of RecBole's; did you mean SASRec?"),
}


@pytest.mark.parametrize("case", EARLY)
def test_what_no_training_could_do_is_refused_before_a_summary_or_a_model_is_made(
    settings, tmp_path, monkeypatch, case
):
    from recbole_mllm.model.sequential_recommender import mllmmsr

    def made(*given):
        pytest.fail("summaries would be made, or a model loaded")

    for name in ("make_summary_setup", "HFModel", "Reranker"):
        monkeypatch.setattr(mllmmsr, name, made, raising=False)
    folder = small_world.write(tmp_path, images=False)
    everything = [f"all\t{small_world.item(n)}\t{n + 1}\n" for n in range(small_world.ITEMS + 2)]
    with (folder / "steps.inter").open("a") as file:
        file.writelines(everything if case == "no negative left" else ())
    keys, said = EARLY[case]
    config = Config(model="MLLMMSR", dataset="steps", config_dict={**settings, "data_path": str(tmp_path)} | keys)
    config["frozen_candidates"] = None  # how the candidates are drawn is not the point
    train, *_ = data_preparation(config, create_dataset(config))
    config["frozen_candidates"] = True
    with pytest.raises(UserError, match=re.escape(said)):
        mllmmsr.MLLMMSR(config, train._dataset)
