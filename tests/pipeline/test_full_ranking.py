"""All items are ranked: a retriever's best as the MLLM orders them, the others as they were, measured by RecBole."""

import re
import sys

import numpy as np
import pytest
import small_world
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.quick_start import load_data_and_model
from recbole.utils import get_model, get_trainer
from run_parts import run_keys, with_trainer

from recbole_mllm.common.errors import UserError
from recbole_mllm.quick_start import run

FULL = {"eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"}}
QUICK = {"SASRec": {"epochs": 3, "hidden_size": 8, "inner_size": 8, "n_layers": 1, "train_batch_size": 64}}
QUICK |= {"BPR": {"epochs": 3}, "FM": {"epochs": 1}}


@pytest.fixture
def settings(place, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest", "--epochs=1"])
    monkeypatch.chdir(place)
    return run_keys(place, mllm=str(place / "llava"), prompt_style="demo", summary_mode="none") | {
        "finetune": "none", "score_cache": False, "train_last_k": 1, "MAX_ITEM_LIST_LENGTH": small_world.LENGTH,
        "metrics": ["Hit", "MRR", "NDCG", "Recall"], "per_model": QUICK, "retriever": "SASRec", **FULL,
    }  # fmt: skip


class Opinion:
    """Stands for an MLLM with a fixed opinion of every (last title, candidate); `planted` knows the next item."""

    def __init__(self, planted):
        self.planted, self.asked = planted, 0

    def __call__(self, prompts, answers, *, share_prefix):
        self.asked += len(prompts)
        return torch.tensor([self.of(*self.read(prompt)) for prompt in prompts])

    @staticmethod
    def read(prompt):
        candidate, *history = map(int, re.findall(r"title of i(\d\d)", prompt.text))
        return history[-1], candidate

    def of(self, last, candidate):
        if self.planted:
            return -float((candidate - last - 1) % small_world.ITEMS)
        return float((37 * candidate + 11 * last) % 61) - 30.0


class Made:
    """A model with an `Opinion`, its evaluation rows and RecBole's word on them."""

    def __init__(self, settings, *, planted=False):
        self.config = Config(model="MLLMMSR", dataset="steps", config_dict=settings)
        self.model, (*_, self.test), self.trainer = with_trainer(self.config)
        self.model.mllm.yes_scores = self.opinion = Opinion(planted)

    def evaluate(self):
        return dict(self.trainer.evaluate(self.test, load_best_model=False))

    def rows(self):
        """Yield (user number, target, retriever's scores, our scores) of each test row, items by number."""
        data = self.test._dataset
        tokens = data.field2id_token["item_id"]
        columns = [data.field2token_id["item_id"][small_world.item(n)] for n in range(small_world.ITEMS)]
        for batch, history, owner, target, *_ in self.test:
            assert history is None and len(owner) == len(batch)
            ours = self.model.full_sort_predict(batch).view(len(batch), -1)
            before = self.model.reranker.retriever.scores(batch) if self.model.reranker.retriever else ours
            users = data.field2id_token["user_id"][batch["user_id"].numpy()]
            for row, user in enumerate(users):
                number = int(tokens[target[row]][1:])
                yield int(user[1:]), number, before[row, columns].numpy(), ours[row, columns].numpy()


def test_the_planted_world_is_ranked_perfectly_by_brute_force_without_a_retriever(settings, caplog):
    made = Made(settings | {"full_sort": "brute", "retriever": None}, planted=True)
    with caplog.at_level("INFO"):
        found = made.evaluate()
    assert found["hit@3"] == found["mrr@10"] == 1.0
    assert f"asks about {small_world.USERS * small_world.ITEMS:,} pairs" in caplog.text
    assert "pairs a second, about" in caplog.text


def test_a_shortlist_of_all_items_is_brute_force(settings):
    every = [Made(settings | {"top_k": small_world.ITEMS}), Made(settings | {"full_sort": "brute", "retriever": None})]
    assert every[0].evaluate() == every[1].evaluate()
    for (_, target, _, one), (_, same, _, other) in zip(*(made.rows() for made in every), strict=True):
        assert target == same
        last = (target - 1) % small_world.ITEMS
        opinion = np.array([Opinion(False).of(last, n) for n in range(small_world.ITEMS)])
        assert (np.diff(opinion[np.argsort(-one)]) <= 0).all() and (np.diff(opinion[np.argsort(-other)]) <= 0).all()


@pytest.mark.parametrize("retriever", ["SASRec", "BPR"])
def test_the_shortlist_takes_the_mllms_order_and_the_rest_keeps_the_retrievers(settings, retriever, caplog):
    made = Made(settings | {"retriever": retriever, "top_k": 5})
    with caplog.at_level("INFO"):
        made.evaluate()
    assert made.opinion.asked == 5 * small_world.USERS
    inside = 0
    for user, target, before, ours in made.rows():
        head, last = np.argsort(-ours)[:5], 2 * user + small_world.LENGTH - 2
        tail = np.setdiff1d(np.arange(small_world.ITEMS), head)
        assert before[head].min() >= before[tail].max()
        opinion = np.array([Opinion(False).of(last % small_world.ITEMS, n) for n in head])
        assert (np.diff(opinion) <= 0).all()
        order = tail[np.argsort(-ours[tail], kind="stable")]
        assert (np.diff(before[order][np.isfinite(before[order])]) <= 0).all()
        seen = {n % small_world.ITEMS for n in range(2 * user, 2 * user + small_world.LENGTH - 1)}
        assert retriever == "SASRec" or set(np.flatnonzero(np.isneginf(ours))) == seen
        inside += target in head
    assert f"puts {inside / small_world.USERS:.4f} of the targets among its best 5" in caplog.text


@pytest.mark.parametrize("retriever", ["SASRec", "BPR"])
def test_a_share_of_nothing_gives_the_metrics_of_the_retriever_itself_in_recbole(settings, retriever, place):
    made = Made(settings | {"retriever": retriever, "fusion": 0.0, "top_k": 7})
    alone = made.model.reranker.retriever
    checkpoint = torch.load(
        next((place / "saved").glob(f"retriever-{alone.identity.replace('#', '-')}.pth")), weights_only=False
    )
    config = checkpoint["config"]
    train, _, test = data_preparation(config, create_dataset(config))
    model = get_model(retriever)(config, train._dataset)
    model.load_state_dict(checkpoint["state_dict"])
    theirs = get_trainer(config["MODEL_TYPE"], retriever)(config, model).evaluate(test, load_best_model=False)
    assert made.evaluate() == pytest.approx(dict(theirs), abs=1e-6)
    assert config["epochs"] == 3  # its own section's, not the one in our command line


def test_the_best_share_is_chosen_on_validation_saved_and_restored(settings):
    chosen = run(Config("MLLMMSR", "steps", config_dict=settings | {"fusion": "auto", "top_k": 10}))
    share = chosen.retrieval["fusion"]
    values = {}
    for fixed in {0.0, share}:
        outcome = run(Config("MLLMMSR", "steps", config_dict=settings | {"fusion": fixed, "top_k": 10}))
        values[fixed] = outcome.valid["NDCG@10"]
        if fixed == share:
            assert outcome.test == chosen.test and outcome.valid == chosen.valid
    assert values[share] == max(values.values())
    config, model, _, _, _, test = load_data_and_model(str(chosen.checkpoint))
    assert model.reranker.share == share
    again = get_trainer(config["MODEL_TYPE"], "MLLMMSR")(config, model).evaluate(test, load_best_model=False)
    assert list(again.values()) == list(chosen.test.values())


def test_a_retriever_of_recboles_own_is_loaded_and_one_of_another_split_refused(settings, place):
    keys = {key: settings[key] for key in ("data_path", "checkpoint_dir", "load_col", "seed")} | FULL
    for number, split in enumerate(({"LS": "valid_and_test"}, {"RS": [0.8, 0.1, 0.1]})):
        args = {"eval_args": {**FULL["eval_args"], "split": split}}
        config = Config("BPR", "steps", config_dict=keys | args | {"epochs": 2})
        train, valid, _ = data_preparation(config, create_dataset(config))
        trainer = get_trainer(config["MODEL_TYPE"], "BPR")(config, get_model("BPR")(config, train._dataset))
        trainer.saved_model_file = str(place / f"bpr{number}.pth")
        trainer.fit(train, valid, saved=True)
    asked = settings | {"retriever": None, "retriever_checkpoint": str(place / "bpr0.pth")}
    made = Made(asked)
    assert made.model.reranker.identity.startswith("BPR#") and made.evaluate()["hit@10"] >= 0
    with pytest.raises(UserError, match=r"bpr1.pth was trained with eval_args.split"):
        Made(asked | {"retriever_checkpoint": str(place / "bpr1.pth")})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"retriever": "FM"}, "retriever FM cannot rank all items at once"),
        ({"retriever": None, "retriever_checkpoint": "no.pth"}, "no.pth does not exist"),
        ({"retriever": None, "full_sort": "brute", "fusion": 0.5}, "fusion mixes in a retriever's scores"),
        (
            {"eval_args": {**FULL["eval_args"], "mode": {"valid": "uni20", "test": "full"}}, "fusion": "auto"},
            "valid too",
        ),
    ],
)
def test_what_cannot_be_ranked_is_one_line(settings, keys, message):
    with pytest.raises(UserError, match=message) as caught:
        Made(settings | keys)
    assert "\n" not in str(caught.value)
