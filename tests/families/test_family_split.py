"""Every family with its layers split among processes, by FSDP: its own scores, gradients and texts."""

import json

import pytest
import split_over_ranks
from launching import FSDP, ROOT, launched

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("count", [2, 4])  # of four, the last has no prompt of its own
def test_scores_gradients_and_texts_are_those_of_the_whole_model(count, tmp_path):
    words = [ROOT / "tests" / "split_over_ranks.py", tmp_path / "told.json"]
    done = launched(count, words, tmp_path, limit_s=600, **FSDP)
    assert done.returncode == 0, done.stderr[-3000:]
    every = json.loads((tmp_path / "told.json").read_text())
    assert [set(told) for told in every] == [set(split_over_ranks.FAMILIES)] * count
    for process, told in enumerate(every):
        for family, found in told.items():
            assert found["prompts"] == max(0, 5 - 2 * process) and found["moved"] > 0.01, family
            assert found["written"] == [True, True] and found["tokens"] >= found["prompts"], family
            assert found["scores"] < 1e-5 and found["half"] == 0 and found["held"] < 0.9 * found["whole"], family
            assert max(found["gradients"], found["recomputed"]) < 1e-5, family
        assert sum(found["tokens"] for found in told.values()) >= 3 * len(told) * max(0, 5 - 2 * process)
