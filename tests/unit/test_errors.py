"""What RecBole refuses is told in a line; what is wrong elsewhere stays what it is."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import small_world
import torch
from full_disk import files_up_to
from recbole.data import create_dataset, data_preparation
from recbole.utils import early_stopping, ensure_dir, get_model

from recbole_mllm.arguments import Options, config_of
from recbole_mllm.benchmark.worker import drawn_negatives
from recbole_mllm.common.errors import UserError, as_user_error, reason_of
from recbole_mllm.quick_start import make_config, run


def test_recboles_own_error_is_a_users_mistake(monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    words = r"^RecBole cannot stop: TypeError '>=' not supported .*\(--debug shows where\)$"
    with pytest.raises(UserError, match=words) as found, as_user_error("stop"):
        early_stopping("high", 1.0, 0, 3)
    assert isinstance(found.value.__cause__, TypeError)


def test_where_a_run_keeps_a_log_the_traceback_is_in_it_and_not_on_the_console(tmp_path, capsys):
    file = logging.FileHandler(tmp_path / "run.log")
    logging.getLogger().addHandler(file)
    try:
        with pytest.raises(UserError, match=r"\(the log file, or --debug, shows where\)$"), as_user_error("stop"):
            early_stopping("high", 1.0, 0, 3)
    finally:
        logging.getLogger().removeHandler(file)
        file.close()
    text = (tmp_path / "run.log").read_text()
    assert "in early_stopping" in text and "TypeError" in text and capsys.readouterr().err == ""


def test_an_error_deeper_than_recbole_is_recboles_too():
    with pytest.raises(UserError, match="^RecBole cannot read: TypeError stat: "), as_user_error("read"):
        ensure_dir([])  # raised by Python's library, which RecBole called


@pytest.mark.parametrize(
    "error", [ValueError("ours"), MemoryError(), torch.OutOfMemoryError("full"), UserError("ours")]
)
def test_ours_and_want_of_memory_go_through(error):
    def raises():
        raise error

    with pytest.raises(type(error)) as found, as_user_error("do it"):
        raises()
    assert found.value is error


@pytest.mark.parametrize(
    ("model", "keys", "said"),
    [
        ("SASRec", {"stopping_step": None}, "stopping_step is None; it must be a whole number"),
        ("SASRec", {"eval_args": {"mode": "uni20"}}, "SASRec needs eval_args.order TO"),
        ("BPR", {"train_neg_sample_args": None}, "BPR learns from drawn negatives"),
        ("BPR", {"clip_grad_norm": {"maxnorm": 5}}, "unknown key 'maxnorm' in clip_grad_norm; did you mean max_n"),
        ("BPR", {"learner": "sparse_adam"}, "SparseAdam does not support dense gradients"),
        ("BPR", {"checkpoint_dir": "dataset/steps/steps.inter/x"}, "steps.inter is no folder; give another name"),
        ("mllmmsr", {}, "did you mean MLLMMSR?"),
    ],
)
def test_a_wrong_option_is_one_line(model, keys, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_world.write(tmp_path / "dataset")
    load = {"inter": ["user_id", "item_id", "timestamp"]}
    options = Options({"epochs": 1, "load_col": load, "show_progress": False, **keys}, (), None)
    with pytest.raises(UserError, match=re.escape(said)) as found:
        run(config_of(model, "steps", options))
    assert "\n" not in str(found.value)


def test_a_full_disk_is_named_where_torch_speaks_of_its_own_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_world.write(tmp_path / "dataset", images=False)
    load = {"inter": ["user_id", "item_id", "timestamp"]}
    config = config_of("BPR", "steps", Options({"epochs": 1, "load_col": load, "show_progress": False}))
    with files_up_to(9_000), pytest.raises(UserError, match=r"^BPR could not write its checkpoint: the disk is full"):
        run(config)


# A model that cannot run says why in a sentence: real runs of RecBole's own models on data they are not made for


FIXED = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "uni20"}


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    small_world.write(tmp_path / "data", images=False)
    return {
        "data_path": str(tmp_path / "data"), "checkpoint_dir": str(tmp_path / "saved"), "epochs": 1, "state": "ERROR",
        "show_progress": False, "eval_args": FIXED, "frozen_candidates": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("KGAT", "KGAT needs a knowledge graph, in RecBole's files steps.kg and steps.link"),
        ("FDSA", "FDSA reads the field 'class', which the dataset does not have"),
        pytest.param("GRU4RecCPR", "GRU4RecCPR takes the best k of all items while it trains", marks=pytest.mark.slow),
        pytest.param("DGCF", "DGCF samples more users or items at a time than", marks=pytest.mark.slow),
        ("FM", "FM learns from labels, which these interactions do not have"),
    ],
)
def test_a_model_made_for_other_data_says_what_it_needs(keys: dict[str, Any], model: str, words: str) -> None:
    with pytest.raises(Exception) as caught:  # whatever RecBole raises
        run(make_config(model, "steps", [], keys))
    reason = str(caught.value) if isinstance(caught.value, UserError) else reason_of(caught.value, model, "steps")
    assert reason is not None and reason.startswith(words) and "\n" not in reason


def test_a_setting_that_reads_what_load_col_leaves_out_says_so(keys: dict[str, Any]) -> None:
    for setting in ({"val_interval": {"rating": "[3,inf)"}}, {"threshold": {"rating": 3}}):
        with pytest.raises(UserError, match="'rating', which the dataset does not have or load_col does not name"):
            run(make_config("Pop", "steps", [], keys | setting))


def test_a_missing_package_and_a_place_in_recbole_are_told() -> None:
    namespace: dict[str, Any] = {"__name__": "recbole.model.planted"}
    exec("def absent():\n    import no_such_package.part\n", namespace)
    exec("def wrong():\n    raise RuntimeError('shapes differ\\nat length')\n", namespace)
    told = {}
    for name in ("absent", "wrong"):
        try:
            namespace[name]()
        except Exception as error:
            told[name] = reason_of(error, "Mine", "steps")
    assert told["absent"] == "Mine needs the Python package 'no_such_package', which is not installed"
    assert told["wrong"] == "Mine stopped in RecBole's model/planted.py: RuntimeError: shapes differ"
    assert reason_of(RuntimeError("our own"), "Mine", "steps") is None


def test_a_context_aware_model_gets_negatives_and_others_are_left_alone(keys: dict[str, Any]) -> None:
    assert drawn_negatives("BPR") == {} == drawn_negatives("SASRec")
    keys |= drawn_negatives("FM") | {"metrics": ["NDCG"], "topk": [10], "valid_metric": "NDCG@10"}
    config = make_config("FM", "steps", [], keys)
    train, *_ = data_preparation(config, create_dataset(config))
    batch = next(iter(train))
    assert set(batch["label"].tolist()) == {0.0, 1.0}
    assert get_model("FM")(config, train._dataset).calculate_loss(batch).item() > 0
    assert 0 <= run(make_config("FM", "steps", [], keys)).test["NDCG@10"] <= 1
