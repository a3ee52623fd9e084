"""What RecBole refuses is told in a line; what is wrong elsewhere stays what it is."""

import logging
import re

import pytest
import small_world
import torch
from full_disk import files_up_to
from recbole.utils import early_stopping, ensure_dir

from recbole_mllm.arguments import Options, config_of
from recbole_mllm.common.errors import UserError, as_user_error
from recbole_mllm.quick_start import run


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
