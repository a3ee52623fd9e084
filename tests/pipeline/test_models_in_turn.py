"""A run's models are large: each is loaded once, and gone before the next one comes."""

import weakref

import launched_runs
import small_world
import tiny_models

from recbole_mllm.mllm import hf
from recbole_mllm.quick_start import make_config, run

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
