"""The search is seeded, spends its budget and no more, and picks by validation."""

import os
import signal

import pytest

from recbole_mllm.benchmark.search import TRIALS, read_journal, search, space_of, trials
from recbole_mllm.benchmark.variants import resolve
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.resources import named
from recbole_mllm.quick_start import make_config

SPACE = {"rate": [0.1, 0.01, 0.001], "size": [8, 16]}
DEFAULT = {"rate": 0.01, "size": 8}


def test_trials_start_with_the_default_and_repeat_nothing():
    drawn = trials(SPACE, 6, 3, DEFAULT)
    assert drawn[0] == {} and len(drawn) == 6
    tried = [DEFAULT | one for one in drawn]
    assert all(one not in tried[:n] for n, one in enumerate(tried)), "all six settings, each once"
    assert trials(SPACE, 4, 3, DEFAULT) == trials(SPACE, 4, 3, DEFAULT)
    assert len({str(trials(SPACE, 3, seed, DEFAULT)) for seed in range(20)}) > 5
    assert len(trials(SPACE, 100, 3, DEFAULT)) == 6
    assert trials(SPACE, 1, 3, DEFAULT) == [{}] == trials({}, 9, 3, {})


@pytest.mark.parametrize(("bigger", "best"), [(True, {"rate": 1}), (False, {"rate": 2})])
def test_the_best_on_validation_is_chosen_and_a_failure_costs_its_trial(bigger, best, tmp_path):
    journal = tmp_path / TRIALS
    planted = {"{}": 0.5, "{'rate': 1}": 0.9, "{'rate': 2}": 0.1}

    def score(settings):
        if settings == {"rate": 3}:
            raise ValueError(f"does not fit {tmp_path}/x.inter\nat all")
        return planted[str(settings)]

    lines: list[str] = []
    found = search([{}, {"rate": 3}, {"rate": 1}, {"rate": 2}], score, bigger, lines.append, journal)
    assert found["chosen"] == best and len(lines) == len(found["trials"]) == 4
    failed = {"settings": {"rate": 3}, "valid": None, "error": "ValueError: does not fit …/x.inter"}
    assert found["trials"][1].items() >= failed.items() and read_journal(journal) == found["trials"]
    assert str(tmp_path) not in journal.read_text() + str(lines)


def test_a_killed_search_is_resumed_where_it_was_and_ends_alike(tmp_path):
    """Another process is killed within its third trial; what it had tried is not tried again."""
    drawn, journal, asked = trials(SPACE, 6, 3, DEFAULT), tmp_path / TRIALS, []

    def score(settings):
        asked.append(settings)
        return -abs(settings.get("rate", 0.01) - 0.001) + settings.get("size", 8) / 1e6

    def until_killed(settings):
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return score(settings)

    if (child := os.fork()) == 0:
        search(drawn, until_killed, True, str, journal)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]) and len(read_journal(journal)) == 2
    torn = b'{"settings": {"rate": 0.1, "si'  # the line it was writing; before it what a bad disk left
    journal.write_bytes(journal.read_bytes() + b"7\n\xff\x00\n{}\n" + torn)
    lines: list[str] = []
    resumed = search(drawn, score, True, lines.append, journal)
    assert asked == drawn[2:] and sum("from before" in line for line in lines) == 2
    straight = search(drawn, score, True, str)
    results = [[(one["settings"], one["valid"]) for one in found["trials"]] for found in (resumed, straight)]
    assert results[0] == results[1] and resumed["chosen"] == straight["chosen"] == {"rate": 0.001, "size": 16}
    assert len(read_journal(journal)) == 6


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (ValueError("no"), RuntimeError, "all 2 trials failed, the first with ValueError: no"),
        (UserError("no such dataset"), UserError, "no such dataset"),
    ],
)
def test_a_search_in_which_nothing_runs_fails_and_a_mistake_stops_it(error, kind, words):
    def fail(settings):
        raise error

    with pytest.raises(kind, match=words):
        search([{}, {"rate": 1}], fail, True, str)


@pytest.mark.parametrize("model", sorted(set(named("tuning")) - {"default"}))
def test_each_choice_is_a_setting_its_model_reads(model, demo_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = make_config(model, "demo", [], {"data_path": str(demo_data), **resolve(model).defaults})
    for key, choices in space_of(model).items():
        assert key in config and config[key] is not None, key
        assert len(choices) > 1 and all(isinstance(choice, type(config[key])) for choice in choices), key
        assert len({str(choice) for choice in choices}) == len(choices)


def test_what_the_user_has_set_is_not_searched():
    assert "learning_rate" in space_of("SASRec") and "learning_rate" not in space_of("SASRec", {"learning_rate"})
    assert space_of("STAMP") == space_of("default") and "learning_rate" in space_of("STAMP")
