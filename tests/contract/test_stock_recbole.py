"""Stock RecBole trains, evaluates its best checkpoint, saves and reloads, with nothing but ``import recbole_mllm``."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

PAIRWISE = ("Pop", "ItemKNN", "BPR", "LightGCN", "NGCF", "FPMC")
CROSS_ENTROPY = ("SASRec", "GRU4Rec", "BERT4Rec", "NARM", "SASRecF", "GRU4RecF", "LightSANs", "Caser")
MODELS = (*PAIRWISE, *CROSS_ENTROPY)
ALIKE = ("NGCF", "NARM", "GRU4Rec", "SASRecF", "LightSANs")  # what others meet of RecBole
ML_100K = Path(importlib.util.find_spec("recbole").origin).parent / "dataset_example/ml-100k/ml-100k.inter"


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """RecBole writes ``saved/``, ``log/`` and ``log_tensorboard/`` where it stands."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(model, **more):
    own = {"epochs": 1, "show_progress": False, "state": "ERROR", "worker": 0, **more}
    return own | ({"train_neg_sample_args": None} if model in CROSS_ENTROPY else {})


def write_slice(folder, users=60, rows=12):
    """Write the first `rows` interactions of `users` users of ml-100k, under a name of its own."""
    header, *lines = ML_100K.read_text(encoding="utf-8").splitlines()
    taken: dict[str, list[str]] = {}
    for line in sorted(lines, key=lambda line: float(line.split("\t")[3])):
        mine = taken.setdefault(line.split("\t")[0], [])
        if len(mine) < rows and (mine or len(taken) <= users):
            mine.append(line)
    (folder / "few").mkdir()
    kept = [line for mine in taken.values() for line in mine]
    (folder / "few/few.inter").write_text("\n".join([header, *kept]) + "\n", encoding="utf-8")
    items = sorted({line.split("\t")[1] for line in kept})
    named = [f"{item}\t{'odd' if int(item) % 2 else 'even'} film" for item in items]
    (folder / "few/few.item").write_text("\n".join(["item_id:token\tclass:token_seq", *named]) + "\n", encoding="utf-8")


def train_and_reload(model, dataset, config):
    """Run `model`, load its checkpoint again, and return the two test results."""
    from recbole.quick_start import load_data_and_model, run_recbole
    from recbole.utils import get_trainer

    trained = run_recbole(model=model, dataset=dataset, config_dict=config)
    (checkpoint,) = Path("saved").glob(f"{model}-*.pth")
    loaded, network, _, _, _, test = load_data_and_model(str(checkpoint))
    trainer = get_trainer(loaded["MODEL_TYPE"], loaded["model"])(loaded, network)
    return dict(trained["test_result"]), dict(trainer.evaluate(test, load_best_model=False))


@pytest.mark.parametrize(
    "model", [pytest.param(model, marks=[pytest.mark.slow] if model in ALIKE else []) for model in MODELS]
)
def test_a_model_trains_saves_and_reloads(model, workplace):
    write_slice(workplace)
    features = {"load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"], "item": ["item_id", "class"]}}
    short = {"MAX_ITEM_LIST_LENGTH": 12}  # as long as the longest; what is padded costs all the same
    config = settings(model, data_path=str(workplace), selected_features=["class"], **features, **short)
    trained, reloaded = train_and_reload(model, "few", config)
    assert reloaded == trained
    assert set(trained) == {"recall@10", "mrr@10", "ndcg@10", "hit@10", "precision@10"}


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_model_runs_on_all_of_ml_100k(model, workplace):
    trained, reloaded = train_and_reload(model, "ml-100k", settings(model))
    assert reloaded == trained and trained["hit@10"] > 0.005


def test_only_recbole_unpickles_a_checkpoint_in_full(workplace):
    write_slice(workplace)
    train_and_reload("Pop", "few", settings("Pop", data_path=str(workplace)))
    (checkpoint,) = Path("saved").glob("Pop-*.pth")
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(checkpoint)


def test_a_model_class_of_the_users_runs_and_hyper_tuning_calls_the_objective_without_ray(workplace):
    from recbole.model.general_recommender import BPR
    from recbole.quick_start import objective_function, run_recbole

    class Mine(BPR):
        pass

    write_slice(workplace)
    config = settings("BPR", data_path=str(workplace), embedding_size=8)
    result = run_recbole(model=Mine, dataset="few", config_dict=config, saved=False)
    assert 0 <= result["test_result"]["hit@10"] <= 1
    config = settings("BPR", data_path=str(workplace)) | {"model": "BPR", "dataset": "few"}
    assert objective_function(config_dict=config, saved=False)["model"] == "BPR"
    assert "ray" not in sys.modules
