"""Scores of a killed evaluation: found again for the same state and prompt alone, and never a reason to stop."""

import os
from dataclasses import replace

import pytest
import torch

from recbole_mllm.common.prompts import Prompt
from recbole_mllm.model.score_cache import ScoreCache, state_digest

PROMPTS = [Prompt(f"question {n}") for n in range(50)]


@pytest.fixture
def score(tmp_path):
    """Return a function that scores prompts as a new process does; it gives the scores and how many were asked for."""

    def call(prompts, state="one", folder=tmp_path):
        asked = []

        def ask(missing):
            asked.extend(missing)
            return [hash(prompt.text) / 7 for prompt in missing]

        cache = ScoreCache(folder)
        cache.use(True)
        found = [cache.scores(part, ask, lambda: state) for part in (prompts[:20], prompts[20:])]
        assert cache.reused == len(prompts) - len(asked)
        return found[0] + found[1], len(asked), cache

    return call


def test_scores_come_back_bit_for_bit_for_their_own_state(score, tmp_path):
    first, asked, _ = score(PROMPTS[:30])
    assert asked == 30
    again, asked, cache = score(PROMPTS)
    assert asked == 20 and again[:30] == first
    assert score(PROMPTS, "other")[1] == 50
    assert score([replace(prompt, system="Judge.") for prompt in PROMPTS])[1] == 50
    cache.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["scores-other.0"]
    cache.use(False)
    assert cache.scores(PROMPTS[:1], lambda prompts: [3.0], lambda: "one") == [3.0]


def test_every_process_reads_what_all_have_left(score, tmp_path, monkeypatch):
    for index in "10":
        monkeypatch.setenv("RANK", index)
        monkeypatch.setenv("WORLD_SIZE", "2")
        score(PROMPTS[:10] if index == "1" else PROMPTS[10:20])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores-one.0", "scores-one.1"]
    monkeypatch.delenv("RANK")
    assert score(PROMPTS[:20])[1] == 0


def test_a_torn_record_is_dropped_and_the_file_goes_on_behind_it(score, tmp_path):
    score(PROMPTS[:30])
    file = tmp_path / "scores-one.0"
    os.truncate(file, 24 * 10 + 5)
    assert score(PROMPTS[:30])[1] == 20 and score(PROMPTS[:30])[1] == 0
    assert file.stat().st_size == 24 * 30


def test_a_file_that_cannot_be_made_is_done_without(score, tmp_path, caplog):
    (tmp_path / "file").touch()
    assert score(PROMPTS, folder=tmp_path / "file")[1] == 50
    assert len(caplog.records) == 1 and "scores are not cached in" in caplog.text


def test_a_state_is_its_names_settings_and_every_trained_bit():
    weights = {"a": torch.zeros(2, 2), "b": torch.ones(3, dtype=torch.bfloat16)}
    base = state_digest(["model#1", 8], weights)
    assert state_digest(["model#1", 8], dict(reversed(weights.items()))) == base
    others = [
        state_digest(["model#2", 8], weights),
        state_digest(["model#1", 16], weights),
        state_digest(["model#1", 8], {}),
        state_digest(["model#1", 8], weights | {"a": torch.tensor([[0.0, 0.0], [0.0, 1e-38]])}),
        state_digest(["model#1", 8], weights | {"a": torch.zeros(4)}),
        state_digest(["model#1", 8], weights | {"b": torch.ones(3)}),
    ]
    assert len({base, *others}) == 7
