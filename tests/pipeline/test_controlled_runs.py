"""A fine-tuned run under a control reads what the control puts there, in training and in scoring alike."""

import re

import pytest
import small_world

from recbole_mllm.benchmark.variants import resolve
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.model.sequential_recommender.mllmmsr import MLLMMSR
from recbole_mllm.quick_start import make_config, run

KEYS = {
    "mllm": "tiny", "prompt_style": "demo", "summary_mode": "none", "history_titles": 4, "epochs": 1, "lora_r": 1,
    "train_last_k": 2, "limit_users": 8, "frozen_candidates": True, "state": "ERROR", "show_progress": False,
    "use_gpu": False, "metrics": ["Hit"], "topk": 5, "valid_metric": "Hit@5", "seed": 3,
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "uni3", "group_by": "user"},
}  # fmt: skip


@pytest.fixture(scope="module")
def data_path(tmp_path_factory):
    return small_world.write(tmp_path_factory.mktemp("world") / "data").parent


def questions(monkeypatch, keys):
    """Return what a run asks about each (user, position, item) in training and in scoring, and its model."""
    rows, asked = {}, {"training": [], "scoring": []}
    prompt_of = MLLMMSR._prompt_of

    def noting_rows(self, row):
        rows[prompt := prompt_of(self, row)] = (self.history_names.name(row[0]), row[1], str(self.tokens[row[2]]))
        return prompt

    def noting(phase, stock):
        def called(self, prompts, *args, **keywords):
            asked[phase] += prompts
            return stock(self, prompts, *args, **keywords)

        return called

    monkeypatch.setattr(MLLMMSR, "_prompt_of", noting_rows)
    monkeypatch.setattr(HFModel, "examples", noting("training", HFModel.examples))
    monkeypatch.setattr(HFModel, "yes_scores", noting("scoring", HFModel.yes_scores))
    outcome = run(make_config("MLLMMSR", "steps", [], keys))
    return {phase: [(prompt, *rows[prompt]) for prompt in prompts] for phase, prompts in asked.items()}, outcome.model


def titles(prompt, candidate):
    """Return the items whose titles a question lists besides its candidate's."""
    found = re.findall(r"title of (i\d\d)", prompt.text)
    found.remove(candidate)
    return found


@pytest.mark.parametrize("control", ["shuffled-history", "wrong-summary", "wrong-image"])
def test_training_and_scoring_read_the_control(control, data_path, tmp_path, monkeypatch):
    keys = KEYS | dict(resolve(f"MLLMMSR:{control}").overrides)
    keys |= {"data_path": str(data_path), "checkpoint_dir": str(tmp_path)}
    asked, model = questions(monkeypatch, keys)
    assert any(weight.abs().sum() > 0 for name, weight in model.state_dict().items() if "lora_B" in name)
    for found in asked.values():
        assert len(found) >= 8
        changed = 0
        for prompt, user, position, item in found:
            first = 2 * int(user[1:])
            own = [small_world.item(first + n) for n in range(max(0, position - 4), position)]
            read, image = titles(prompt, item), prompt.images[0].stem
            if control == "shuffled-history":
                assert sorted(read) == sorted(own) and image == item
                changed += read != own
            elif control == "wrong-summary":
                start = int(read[0][1:])
                assert read == [small_world.item(start + n) for n in range(len(read))] and image == item
                changed += read != own
            else:
                assert read == own
                changed += image != item
        assert changed > len(found) / 2 if control == "shuffled-history" else changed == len(found)
