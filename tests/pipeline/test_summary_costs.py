"""What a run says its summaries took is what writing them took, whichever run wrote them; loading is told apart."""

import sqlite3
import weakref
from contextlib import closing

import launched_runs
import pytest
import small_world
import tiny_models

from recbole_mllm.mllm import hf
from recbole_mllm.quick_start import make_config, run, write_summaries
from recbole_mllm.summaries.summary_files import read_rows


@pytest.fixture
def outcome(tmp_path, monkeypatch):
    """Run MLLMMSR as it is on a small world, whose store is as the last run left it."""
    monkeypatch.chdir(tmp_path)
    folder = small_world.write(tmp_path / "dataset")
    keys = {"data_path": str(tmp_path / "dataset"), "limit_users": 4, "finetune": "none", "epochs": 0, "use_gpu": False}
    keys |= {"item_summary_tokens": 4, "user_summary_tokens": 5, "metrics": ["Hit"], "topk": 5, "valid_metric": "Hit@5"}
    keys |= {"eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "uni5", "group_by": "user"}}
    keys |= {"frozen_candidates": True, "state": "ERROR", "mllm": "tiny"}
    return folder, lambda **more: run(make_config("MLLMMSR", "steps", [], keys | more))


def _store(folder, query):
    with closing(sqlite3.connect(folder / "steps.mllm.sqlite")) as db:
        found = db.execute(query).fetchone()
        db.commit()
    return found and found[0]


def test_a_run_from_a_full_store_tells_the_seconds_of_the_one_that_filled_it(outcome):
    folder, again = outcome
    first = again()
    count, took = (_store(folder, f"SELECT {what} FROM answers") for what in ("COUNT(*)", "SUM(seconds)"))
    assert first.summarize_s == pytest.approx(took) and first.summarize_reused == 0 and first.load_s > 0
    second = again()  # users' texts come from the export, items' from the store
    assert second.summarize_s == pytest.approx(first.summarize_s) and second.summarize_reused == count
    for path in folder.glob("*.usum"):
        path.unlink()
    _store(folder, "DELETE FROM answers WHERE kind = 'item'")
    _store(folder, "UPDATE answers SET seconds = 100")
    third = again()  # users' texts come from the store, items' from the model
    users = _store(folder, "SELECT COUNT(*) FROM answers WHERE kind = 'user'")
    assert third.summarize_reused == users < count and 100 * users < third.summarize_s < 100 * users + 60
    assert third.load_s > second.load_s / 10


def test_zero_shot_writes_nothing_for_training_rows_and_exports_what_is_known_of_them(outcome):
    """Of seven interactions training reads after 1, 2, 3 and 4, validation after 5 and the test after 6."""
    folder, again = outcome

    def exported():
        (path,) = folder.glob("*.usum")
        return sorted(place.seen for place, _ in read_rows(path, "user"))

    again()
    assert exported() == sorted(4 * [3, 5, 6])  # after a block of three stands a state that both continue
    assert _store(folder, "SELECT COUNT(*) FROM answers WHERE kind = 'user'") == 4 * 3
    again(finetune="lora", lora_r=1, epochs=1)
    every = sorted(4 * [1, 2, 3, 4, 5, 6])
    assert exported() == every
    again()
    assert exported() == every


def test_summaries_written_before_a_recommender_is_named_are_those_of_its_training_too(outcome):
    folder, _ = outcome
    keys = {"data_path": str(folder.parent), "limit_users": 4, "use_gpu": False, "state": "ERROR"}
    keys |= {"item_summarizer": "tiny", "user_summarizer": "tiny", "item_summary_tokens": 4, "user_summary_tokens": 5}
    _, path = write_summaries(make_config("MLLMMSR", "steps", [], keys), "all").files
    assert sorted(place.seen for place, _ in read_rows(path, "user")) == sorted(4 * [1, 2, 3, 4, 5, 6])


# A run's models are large: each is loaded once, and gone before the next one comes


KEYS = {
    "mllm": "llava", "use_image": True, "summary_mode": "recurrent", "item_summary": "fused", "item_summary_tokens": 4,
    "user_summary_tokens": 4, "limit_users": 4, "train_last_k": 1, "epochs": 1,
}  # fmt: skip


def test_one_summariser_at_a_time_and_none_beside_what_is_trained(tmp_path, monkeypatch):
    small_world.write(tmp_path / "data")
    tiny_models.llava(tmp_path / "llava")
    stock, models, alive = hf.load, [], []

    def load(*args, **kwargs):
        alive.append(sum(model() is not None for model in models))
        loaded = stock(*args, **kwargs)
        models.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(hf, "load", load)
    monkeypatch.chdir(tmp_path)
    run(make_config("MLLMMSR", "steps", [], launched_runs.settings(tmp_path, tmp_path, KEYS)))
    assert alive == [0, 0, 0]  # items' (three kinds of prompts), users', and the recommender
