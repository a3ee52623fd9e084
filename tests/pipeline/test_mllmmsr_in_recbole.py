"""MLLMMSR inside stock RecBole: registered, trained, saved, reloaded, and ranked by what it says and nothing else."""

import re

import numpy as np
import pytest
import small_world
import tiny_models
import torch
from recbole.config import Config
from recbole.data import create_dataset
from recbole.data.interaction import Interaction
from recbole.quick_start import load_data_and_model, objective_function, run_recbole
from recbole.utils import get_trainer, init_seed

from recbole_mllm.cli import main
from recbole_mllm.common.errors import UserError
from recbole_mllm.data.schema import POSITION
from recbole_mllm.evaluation.candidates import prepare_loaders
from recbole_mllm.model.sequential_recommender.mllmmsr import MLLMMSR
from recbole_mllm.model.summarizers import prepare_summaries


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    small_world.write(folder / "data")
    tiny_models.llava(folder / "llava")
    return folder


@pytest.fixture
def settings(place, monkeypatch):
    monkeypatch.chdir(place)
    return {
        "data_path": str(place / "data"),
        "checkpoint_dir": str(place / "saved"),
        "mllm": str(place / "llava"),
        "prompt_style": "demo",
        "item_summary_tokens": 3,
        "user_summary_tokens": 3,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "train_last_k": 1,
        "show_progress": False,
        "seed": 7,
    }


def _parts(settings, model="MLLMMSR"):
    config = Config(model=model, dataset="steps", config_dict=settings)
    init_seed(config["seed"], True)
    dataset = create_dataset(config)
    return config, dataset, prepare_loaders(config, dataset)


def test_stock_run_recbole_trains_saves_and_reloads_and_its_seed_gives_the_same_numbers(settings, place):
    first, outcome = (run_recbole("MLLMMSR", "steps", config_dict=settings) for _ in range(2))
    assert 0 <= outcome["test_result"]["ndcg@10"] <= 1
    assert first["test_result"] == outcome["test_result"] and first["best_valid_score"] == outcome["best_valid_score"]
    saved = max((place / "saved").glob("MLLMMSR-*.pth"), key=lambda path: path.stat().st_mtime)
    assert (saved.with_suffix("") / "adapter_model.safetensors").is_file()
    state = torch.load(saved, weights_only=False)["state_dict"]
    assert state and all("lora_" in name for name in state)  # the base model is not in the checkpoint
    config, model, _, _, _, test = load_data_and_model(str(saved))
    again = get_trainer(config["MODEL_TYPE"], config["model"])(config, model).evaluate(test, load_best_model=False)
    assert dict(again) == dict(outcome["test_result"])


def test_hyper_tunings_objective_works(settings):
    found = objective_function({"model": "MLLMMSR", "dataset": "steps", **settings, "finetune": "none"})
    assert found["model"] == "MLLMMSR" and "ndcg@10" in found["test_result"]


def test_each_row_knows_its_place_in_the_whole_history(settings):
    settings |= {"MAX_ITEM_LIST_LENGTH": 3, "train_last_k": None}
    _, _, (train, valid, test, _) = _parts(settings)
    places = {
        name: sorted(set(loader._dataset.inter_feat[POSITION].tolist()))
        for name, loader in (("train", train), ("valid", valid), ("test", test))
    }
    last = small_world.LENGTH - 1
    assert places == {"train": list(range(1, last - 1)), "valid": [last - 1], "test": [last]}
    _, _, parts = _parts(settings | {"train_last_k": 2, "limit_users": 9})
    assert set(parts[0]._dataset.inter_feat[POSITION].tolist()) == {3, 4}
    users = [set(part._dataset.inter_feat["user_id"].tolist()) for part in parts[:3]]
    assert users[0] == users[1] == users[2] and len(users[0]) == 9
    rows = test._dataset
    for user, items in rows.histories.items():
        start = 2 * int(user[1:])
        assert items == [small_world.item(start + t) for t in range(small_world.LENGTH)]


class Planted:
    """Stands for an MLLM that says Yes to exactly the item after the last one the prompt speaks of."""

    def __init__(self, shuffled=False):
        self.shuffled = shuffled

    def __call__(self, prompts, answers, *, share_prefix):
        out = []
        for prompt in prompts:
            candidate, *history = re.findall(r"title of i(\d\d)", prompt.text)
            following = (max(map(int, history), key=lambda n: history.index(f"{n:02d}")) + 1) % small_world.ITEMS
            out.append(float(following == int(candidate)))
        return torch.tensor(out) if not self.shuffled else torch.zeros(len(out))


def _result(settings, scorer):
    config, _, (train, valid, test, _) = _parts(
        settings | {"summary_mode": "none", "finetune": "none", "score_cache": False}
    )
    model = MLLMMSR(config, train._dataset)
    model.mllm.yes_scores = scorer
    return get_trainer(config["MODEL_TYPE"], "MLLMMSR")(config, model).evaluate(test, load_best_model=False)


def test_a_planted_world_is_ranked_perfectly(settings):
    found = _result(settings, Planted())
    assert found["hit@3"] == found["mrr@10"] == found["ndcg@10"] == found["gauc"] == 1.0


def test_a_constant_scorer_is_at_chance(settings):
    found = _result(settings, Planted(shuffled=True))
    error = 4 * np.sqrt(0.5 * 0.5 / small_world.USERS)
    assert abs(found["hit@10"] - 10 / 21) < error and abs(found["gauc"] - 0.5) < error and found["hit@3"] < 0.5


def test_all_models_get_the_same_candidates(settings):
    digests = set()
    for model, extra in (("MLLMMSR", {}), ("SASRec", {"train_neg_sample_args": None}), ("BPR", {}), ("Pop", {})):
        protocol = {
            "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "uni20"}
        }
        config, dataset, loaders = _parts(settings | extra | protocol | {"frozen_candidates": True}, model)
        np.random.seed(len(digests))  # what a model draws from numpy's generator must change nothing
        pairs = [batch[0] for batch in loaders[2]]
        users = np.concatenate([dataset.field2id_token["user_id"][p["user_id"].numpy()] for p in pairs])
        items = np.concatenate([dataset.field2id_token["item_id"][p["item_id"].numpy()] for p in pairs])
        seen = {(u, small_world.item(2 * int(u[1:]) + t)) for u in set(users) for t in range(small_world.LENGTH)}
        drawn = sorted(zip(users.tolist(), items.tolist(), strict=True))
        assert len(set(drawn)) == len(drawn) == 21 * small_world.USERS
        assert len(set(drawn) & seen) == small_world.USERS  # the targets, and no other item the user met
        digests.add((loaders.candidates, tuple(drawn)))
    assert len(digests) == 1


def test_summaries_are_exported_and_off_accepts_them_but_makes_none(settings, place):
    run_recbole("MLLMMSR", "steps", config_dict=settings | {"finetune": "none"})
    assert list((place / "data" / "steps").glob("steps.*.isum")) and list(
        (place / "data" / "steps").glob("steps.*.usum")
    )
    run_recbole("MLLMMSR", "steps", config_dict=settings | {"finetune": "none", "summarize": "off"})
    with pytest.raises(UserError, match="summarize is off"):
        run_recbole("MLLMMSR", "steps", config_dict=settings | {"summarize": "off", "user_summary_tokens": 4})


def test_summaries_can_be_a_step_of_their_own(settings, monkeypatch):
    config, _, (train, *_) = _parts(settings | {"finetune": "none"})
    prepared = prepare_summaries(config, train._dataset)
    again = "recbole_mllm.model.sequential_recommender.mllmmsr.prepare_summaries"
    monkeypatch.setattr(again, lambda *_: pytest.fail("prepared twice"))
    model = MLLMMSR(config, train._dataset, prepared)
    assert model.preferences is prepared
    with pytest.raises(UserError, match="the checkpoint belongs to other#1, not to llava"):
        model.load_other_parameter({"base": "other#1"})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"eval_args": {"mode": "full", "order": "TO"}}, "set retriever: SASRec"),
        ({"lora_rnk": 4}, "unknown key 'lora_rnk' in config_dict; did you mean lora_"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_loaded(settings, keys, message):
    with pytest.raises(UserError, match=message):
        run_recbole("MLLMMSR", "steps", config_dict=settings | keys)


def test_missing_images_are_told_before_any_summary_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small_world.write(tmp_path / "dataset", images=False)
    for words in (["summarize"], ["--model", "MLLMMSR"]):
        assert main([*words, "--dataset", "steps", "--mllm=tiny"]) == 2
        assert "no item has an image" in capsys.readouterr().err
    assert not list((tmp_path / "dataset" / "steps").glob("*sum")) + list((tmp_path / "dataset").rglob("*.sqlite"))


def test_scores_of_all_items_are_those_of_each_pair(settings):
    _, dataset, (train, _, test, _) = _parts({**settings, "finetune": "none"})
    model = MLLMMSR(train._dataset.config, train._dataset).eval()
    rows = test._dataset.inter_feat[:2]
    with torch.no_grad():
        every = model.full_sort_predict(rows).view(2, -1)
        for item in (1, 7, dataset.item_num - 1):
            pairs = rows[:2]
            pairs.update(Interaction({"item_id": torch.full((2,), item)}))
            assert torch.allclose(every[:, item], model.predict(pairs), atol=1e-4)
    assert torch.isinf(every[:, 0]).all() and every.shape == (2, dataset.item_num)
    assert every[:, 1:].std() > 0
