"""Stock RecBole finds our model, dataset, trainer and settings, in the right order of precedence."""

import importlib.util
import sys
from types import ModuleType

import pytest

import recbole_mllm
from recbole_mllm import UserError, registry


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Return a function that builds RecBole's Config in an empty folder, with the words of a command line."""
    from recbole.config import Config

    monkeypatch.chdir(tmp_path)

    def build(model, dataset, words=(), files=(), **more):
        monkeypatch.setattr(sys, "argv", ["x", *words])
        return Config(model, dataset, config_file_list=list(files), config_dict={"gpu_id": "", **more})

    return build


def test_the_model_is_found_without_being_imported():
    spec = importlib.util.find_spec("recbole.model.sequential_recommender.mllmmsr")
    assert spec is not None and spec.name.endswith("mllmmsr")


def test_our_protocol_wins_over_recboles_for_sequential_models(config):
    found = config("MLLMMSR", "nothing")
    assert found["eval_args"]["mode"] == {"valid": "uni20", "test": "uni20"}
    assert found["frozen_candidates"] is True


def test_a_users_file_dictionary_and_command_line_win_in_this_order(config, tmp_path):
    (tmp_path / "mine.yaml").write_text("lora_r: 3\nlora_alpha: 3\nepochs: 3\n")
    found = config("MLLMMSR", "nothing", ["--epochs=5"], [tmp_path / "mine.yaml"], lora_alpha=4, epochs=4)
    assert (found["lora_r"], found["lora_alpha"], found["epochs"]) == (3, 4, 5)


def test_a_stock_model_keeps_recboles_settings(config):
    found = config("SASRec", "nothing", train_neg_sample_args=None)
    assert found["frozen_candidates"] is None
    assert found["eval_args"]["mode"] == {"valid": "full", "test": "full"}
    assert found["topk"] == [10]


@pytest.mark.parametrize("model", ["MLLMMSR", "SASRec", "BPR"])
def test_a_datasets_own_yaml_is_read_for_every_model(config, tmp_path, model):
    (tmp_path / "dataset/mine").mkdir(parents=True)
    text = "TIME_FIELD: moment\neval_args: {split: {LS: valid_and_test}, order: TO, mode: uni7}\n"
    (tmp_path / "dataset/mine/dataset.yaml").write_text(text)
    assert config(model, "mine", train_neg_sample_args=None)["TIME_FIELD"] == "moment"
    assert config(model, "mine", train_neg_sample_args=None)["eval_args"]["mode"]["test"] == "uni7"
    assert config(model, "mine", train_neg_sample_args=None, TIME_FIELD="t")["TIME_FIELD"] == "t"


def test_a_class_of_ours_that_cannot_be_imported_is_no_silent_fallback(monkeypatch):
    package = ModuleType("recbole_like")
    monkeypatch.setitem(sys.modules, "ours_broken", ModuleType("ours_broken"))
    registry._offer(package, {"MineTrainer": "ours_broken"})
    with pytest.raises(ImportError, match="ours_broken"):
        _ = package.MineTrainer
    assert not hasattr(package, "OtherTrainer")


def test_dataset_and_trainer_are_offered():
    pytest.importorskip("recbole_mllm.trainer")
    import recbole.data.dataset
    import recbole.trainer

    assert recbole.data.dataset.MLLMMSRDataset.__module__ == "recbole_mllm.data.dataset"
    assert recbole.trainer.MLLMMSRTrainer.__module__ == "recbole_mllm.trainer"
    assert hasattr(recbole.trainer.Trainer._neg_sample_batch_eval, "breaks_ties")


def test_a_preset_is_a_path_and_an_unknown_one_names_the_nearest():
    assert recbole_mllm.preset("MLLMMSR").endswith("MLLMMSR.yaml")
    with pytest.raises(UserError, match="did you mean 'MLLMMSR'"):
        recbole_mllm.preset("MLLMSR")
