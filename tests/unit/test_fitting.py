"""Training seconds hold training alone, and whether it had converged is told from the validations it had."""

import time
from contextlib import nullcontext
from typing import Any

import pytest
import small_world
from recbole.model.general_recommender import itemknn
from recbole.quick_start import load_data_and_model
from recbole.trainer import Trainer

from recbole_mllm.cli import main
from recbole_mllm.common.fitting import Fit, validations_since_best
from recbole_mllm.evaluation.metrics import evaluate, joined, per_user
from recbole_mllm.quick_start import make_config, run

PAUSE = 0.3


@pytest.fixture
def planted(tmp_path, monkeypatch) -> Any:
    """Return what runs a model on the small world, in a folder of its own."""
    small_world.write(tmp_path, images=False)
    monkeypatch.chdir(tmp_path)

    def planted(model: str, **keys: Any) -> Any:
        own = {"data_path": str(tmp_path), "checkpoint_dir": "saved", "frozen_candidates": True, "state": "ERROR"}
        given = {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "show_progress": False}
        ranked = {"eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "uni20"}}
        metrics = {"metrics": ["NDCG"], "topk": [10], "valid_metric": "NDCG@10"}
        return make_config(model, "steps", [], {**own, **given, **ranked, **metrics, **keys})

    return planted


def slowly(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Let a method take `PAUSE` seconds more."""
    stock = getattr(owner, name)

    def method(self: Any, *arguments: Any, **keywords: Any) -> Any:
        time.sleep(PAUSE)
        return stock(self, *arguments, **keywords)

    monkeypatch.setattr(owner, name, method)


def test_validating_saving_and_testing_are_not_training(planted, monkeypatch):
    for name in ("_train_epoch", "_valid_epoch", "_save_checkpoint", "evaluate"):
        slowly(monkeypatch, Trainer, name)
    outcome = run(planted("BPR", epochs=2, eval_step=1))
    assert 2 * PAUSE <= outcome.train_s < 4 * PAUSE  # two validations and as many files to save
    assert outcome.score_s >= PAUSE


@pytest.mark.parametrize("curve", [[0.1, 0.5, 0.2], [0.5, 0.1, 0.5], [0.5]])
def test_what_is_kept_is_of_the_best_validation_the_last_of_equals(curve):
    class Planted:
        valid_metric_bigger, values, before = True, iter(curve), 0.0

        def fit(self) -> Any:
            return max([self.before, *(self._valid_epoch()[0] for _ in curve)]), {}

        def _valid_epoch(self) -> Any:
            return next(self.values), {}

        def _save_checkpoint(self) -> None: ...

    fit = Fit(Planted(), lambda: nullcontext(len(fit.scores)))
    fit.run()
    assert fit.recorded == len(curve) - 1 - curve[::-1].index(max(curve))
    resumed = Planted()
    resumed.values, resumed.before = iter(curve), 0.9
    fit = Fit(resumed, lambda: nullcontext(len(fit.scores)))
    fit.run()
    assert fit.recorded is None


def test_the_best_epochs_validation_is_kept_and_is_what_its_checkpoint_scores(planted):
    outcome = run(planted("BPR", epochs=4, eval_step=1), keep_valid=True)
    assert per_user(outcome.valid_pairs, outcome.config)["NDCG@10"].mean() == pytest.approx(
        outcome.valid["NDCG@10"], abs=1e-4
    )
    config, model, _, _, valid, _ = load_data_and_model(str(outcome.checkpoint))
    _, batches = evaluate(Trainer(config, model), valid, load_best_model=False)
    again = joined(batches)
    assert all((outcome.valid_pairs[name] == again[name]).all() for name in again)
    assert run(planted("Pop")).valid_pairs is None


@pytest.mark.parametrize(
    ("curve", "converged", "epochs"),
    [
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], False, 6),  # still rising at the cap
        ([0.1, 0.5, 0.4, 0.4, 0.4, 0.9], True, 5),  # RecBole stops before the last
        ([0.1, 0.2, 0.3, 0.5, 0.4, 0.4], False, 6),  # two without a rise, and patience for two
        ([0.5, 0.5, 0.5, 0.5, 0.5, 0.5], True, 6),  # equal scores reset RecBole's patience, but are no rise
    ],
)
def test_a_run_has_converged_if_validation_had_stopped_rising(planted, monkeypatch, curve, converged, epochs):
    seen = iter(curve)
    monkeypatch.setattr(Trainer, "_train_epoch", lambda self, data, epoch, **keywords: 0.0)
    monkeypatch.setattr(Trainer, "_valid_epoch", lambda self, data, **keywords: (next(seen), {"ndcg@10": 0.1}))
    outcome = run(planted("BPR", epochs=6, eval_step=1, stopping_step=2))
    assert outcome.converged is converged and len(curve) - len(list(seen)) == epochs


def test_a_lower_score_is_a_rise_where_lower_is_better():
    assert validations_since_best([0.9, 0.5, 0.7], bigger=False) == 1
    assert validations_since_best([0.9, 0.5, 0.7], bigger=True) == 2
    assert validations_since_best([], bigger=True) == 0


def test_what_learns_in_one_pass_has_seconds_and_what_learns_nothing_has_none(planted, monkeypatch):
    slowly(monkeypatch, itemknn.ComputeSimilarity, "compute_similarity")
    knn, random, untrained = run(planted("ItemKNN")), run(planted("Random")), run(planted("BPR", epochs=0))
    assert knn.train_s >= PAUSE and knn.converged is None  # its neighbours are found when it is made
    assert random.train_s is None and random.converged is None
    assert untrained.train_s is None and untrained.converged is None
    assert run(planted("Pop")).train_s > 0


def test_every_printed_result_names_its_protocol(planted, tmp_path, capsys):
    """The same command ranks all items for Pop and 1+20 for MLLMMSR, so neither may just say "test"."""
    words = ["--model=Pop", "--dataset=steps", f"--data_path={tmp_path}", "--state=ERROR", "--show_progress=false"]
    columns = "--load_col={inter: [user_id, item_id, timestamp]}"
    split = "split: {LS: valid_and_test}, order: TO"
    for mode in ("full", "uni20", "{valid: uni20, test: full}"):
        assert main([*words, columns, f"--eval_args={{{split}, mode: {mode}}}"]) == 0
        lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
        valid, test = (lines[lines.index(line) + 1] for line in lines if line.startswith(("best valid:", "test:")))
        for told, drawn in ((valid, "uni20" in mode), (test, mode == "uni20")):
            assert told.startswith("leave-one-out (valid_and_test), order TO, ")
            assert ("candidates uni20 (seed 2024)" in told, "all items ranked" in told) == (drawn, not drawn)
        assert test.endswith(", 30 users")
