"""One run from configuration to metrics, in a straight line, with times and the scored pairs kept."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from recbole.data import create_dataset, data_preparation
from recbole.evaluator.register import metrics_dict
from recbole.trainer import TraditionalTrainer
from recbole.utils import get_model, get_trainer, init_logger, init_seed

from recbole_mllm.config import check_training, per_model, recbole_config, sections
from recbole_mllm.data.checking import nothing_left
from recbole_mllm.data.schema import isum_file, usum_file
from recbole_mllm.errors import UserError
from recbole_mllm.evaluation.candidates_file import write_candidates
from recbole_mllm.evaluation.metrics import has_several_rows, joined, per_user, pooled_auc
from recbole_mllm.evaluation.protocol import protocol_line
from recbole_mllm.evaluation.tie_breaking import evaluate
from recbole_mllm.files import check_place
from recbole_mllm.fitting import Fit
from recbole_mllm.keys import check_keys
from recbole_mllm.refusals import told_in_a_line
from recbole_mllm.settings import Settings


@dataclass(slots=True)
class Outcome:
    """What a run ended with. `pairs` holds internal ids, labels, scores and places of every scored test pair.

    Under full ranking it holds each user's best items and target, with ``among``, how many were ranked, and ``answer``,
    the log-odds of an MLLM that was asked about the pair; `pairs_scored` counts all.

    `train_s` holds no validation and no test, and is None where nothing was trained; `converged` says whether
    validation had stopped rising when training ended, None where that is no question (one pass, zero-shot).

    `retrieval`, where all items were ranked, says by what: ``retriever``, ``top_k``, ``recall`` (the share of test
    targets among its best, a ceiling) and ``fusion`` (the MLLM's share). `scores_reused` is how many of the test scores
    earlier evaluations had left, `world_size` how many processes worked on it.

    `load_s` is what loading the models took, None of a baseline; `summarize_s` is without it: the seconds that writing
    the summaries took, of `summarize_reused` of them in an earlier run, as the store has kept them.
    """

    config: Any
    dataset: Any
    train_data: Any
    test_data: Any
    model: Any
    checkpoint: Path
    valid: dict[str, float]
    test: dict[str, float]
    users: dict[str, Any]
    pairs: dict[str, Any] | None
    summarize_s: float
    train_s: float | None
    score_s: float
    retrieval: dict[str, Any] | None = None
    scores_reused: int = 0
    world_size: int = 1
    converged: bool | None = None
    load_s: float | None = None
    summarize_reused: int = 0

    @property
    def pairs_scored(self) -> int:
        """How many test pairs the run's own model has scored."""
        if self.pairs is None:
            return 0
        if "among" not in self.pairs:
            return len(self.pairs["score"])
        ranked = self.pairs["among"][np.unique(self.pairs["user_id"], return_index=True)[1]]
        return int(np.minimum(ranked, self.retrieval["top_k"] if self.retrieval else ranked).sum())


def metric_name(key: str) -> str:
    """Return RecBole's lower-case ``averagepopularity@5`` as its class is called, ``AveragePopularity@5``."""
    name, at, k = key.partition("@")
    return (metrics_dict[name].__name__ if name in metrics_dict else name) + at + k


@dataclass(slots=True)
class _Trained:
    dataset: Any
    train: Any
    test: Any
    model: Any
    trainer: Any
    score: float
    valid: Any
    spent: Any  # on summaries, none of a baseline
    train_s: float | None
    converged: bool | None


Check = Callable[[Any, Any], None]
"""Called with the dataset and its test loader once it is split, before anything is trained; may raise."""


def _train(config: Any, saved: bool, check: Check | None = None) -> _Trained:
    init_seed(config["seed"], config["reproducibility"])
    init_logger(config)
    log = logging.getLogger()
    check_keys(config.external_config_dict, "the configuration")
    check_training(config)
    for key in ("checkpoint_dir", "retriever_dir"):
        if config[key]:
            check_place(Path(str(config[key])), f"{key}:")
    refused = config["model"], config["dataset"]
    with told_in_a_line("read the dataset", *refused):
        dataset = create_dataset(config)
    log.info(dataset)
    with told_in_a_line("split the dataset", *refused):
        train, valid, test = data_preparation(config, dataset)
    if not saved and not len(valid):
        raise nothing_left(dataset, "validate on")
    if check is not None:
        check(dataset, test)
    for phase in ("valid", "test"):  # what RecBole's lines below are results of
        log.info(f"{phase}: {protocol_line(config, phase=phase)}")
    started = time.perf_counter()
    init_seed(config["seed"] + config["local_rank"], config["reproducibility"])
    with told_in_a_line(f"make the model {config['model']}", *refused):
        model = get_model(config["model"])(config, train._dataset).to(config["device"])
    log.info(model)
    made = time.perf_counter()
    with told_in_a_line("make the trainer", *refused):
        trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    one_pass = isinstance(trainer, TraditionalTrainer)
    if one_pass:  # one epoch whatever `epochs` says, so an eval_step of 2 saves nothing
        trainer.eval_step = min(trainer.eval_step, trainer.epochs)
    fit = Fit(trainer)
    with told_in_a_line("train", *refused):
        score, best = fit.run(train, valid, saved=saved, show_progress=config["show_progress"])
    reranker = getattr(model, "reranker", None)
    learnt = getattr(reranker, "train_s", 0.0)
    trained = _train_seconds(config["model"], trainer, fit, made - started if one_pass else 0.0)
    # A retriever's training is training, whichever run did it: what many runs share each of them would have paid
    train_s = (trained or 0.0) + learnt if trained is not None or learnt else None
    converged = None if one_pass else fit.converged
    spent = getattr(model, "summaries_spent", None)
    return _Trained(dataset, train, test, model, trainer, score, best, spent, train_s, converged)


def _train_seconds(name: str, trainer: Any, fit: Fit, making: float) -> float | None:
    """Return what a run's own model took to train, None if nothing of it was.

    Args:
        name: RecBole's name of the model; `Random` learns nothing.
        trainer: Ours counts the seconds itself, those before a run was resumed included.
        fit: What RecBole's spent.
        making: What making the model took, where that is its training (ItemKNN, EASE: all but Pop of the one-pass).
    """
    if not trainer.epochs or name == "Random":
        return None
    return float(getattr(trainer, "train_s", making + fit.seconds))


def validate(config: Any) -> float:
    """Train as `run` does and return the best validation score, leaving the test split and the disk alone."""
    return float(_train(config, saved=False).score)


def run(config: Any, check: Check | None = None) -> Outcome:
    """Run what `config` says, as RecBole's ``run_recbole`` does (quick_start.py:94-178)."""
    done = _train(config, saved=True, check=check)
    trainer, started = done.trainer, time.perf_counter()
    reused = getattr(done.model, "scores_reused", 0)
    result, scored = evaluate(trainer, done.test, load_best_model=True, show_progress=config["show_progress"])
    score_s = time.perf_counter() - started
    pairs = joined(scored) if scored else None
    pairs = None if pairs and has_several_rows(pairs) else pairs
    users = per_user(pairs, config) if pairs else {}
    metrics = {metric_name(key): float(value) for key, value in result.items()}
    if pairs:
        targets = np.unique(pairs["user_id"][pairs["label"] > 0], return_counts=True)[1]
        _agree(metrics, users, targets, config["metric_decimal_place"])
        # ours, as RecBole has it only beside no top-k; where all of a user's pairs are there
        if "among" not in pairs and "GAUC" in metrics:
            metrics["AUC"] = pooled_auc(pairs["label"], pairs["score"])
    return Outcome(
        config,
        done.dataset,
        done.train,
        done.test,
        done.model,
        Path(trainer.saved_model_file),
        {metric_name(key): float(value) for key, value in (done.valid or {}).items()},
        metrics,
        users,
        pairs,
        done.spent.seconds if done.spent else 0.0,
        done.train_s,
        score_s,
        _retrieval(trainer),
        getattr(done.model, "scores_reused", 0) - reused,
        getattr(done.model, "processes", 1),
        done.converged,
        load_s=getattr(done.model, "load_s", None),
        summarize_reused=done.spent.reused if done.spent else 0,
    )


def _retrieval(trainer: Any) -> dict[str, Any] | None:
    found: dict[str, Any] | None = getattr(trainer, "retrieval", None)
    return found and {**found, "fusion": trainer.model.reranker.share}


def _agree(metrics: dict[str, float], users: dict[str, Any], targets: Any, decimals: int) -> None:
    """Hold the per-user values against what RecBole's evaluator reports; they are two ways to one number.

    Its GAUC weighs a user by how many targets they have (metrics.py:272-318), its other metrics do not.
    """
    for name, value in metrics.items():
        mean = np.average(users[name], weights=targets if name == "GAUC" else None) if name in users else value
        if abs(float(mean) - value) > 10**-decimals + 1e-6:
            raise AssertionError(f"{name}: RecBole reports {value}, the users' mean is {mean}")


def make_config(model: str, dataset: str, files: list[str], overrides: dict[str, Any]) -> Any:
    """Return RecBole's Config, to which the command line of this process says nothing.

    A file's ``per_model`` section for this model wins over the plain keys of all files, `overrides` win over both.
    """
    keys = {"per_model": sections(files)} if files else {}
    return recbole_config(model, dataset, files, keys | per_model(files, model) | overrides)


def read_and_split(config: Any) -> tuple[Any, tuple[Any, Any, Any]]:
    """Return the dataset of `config`, and its loaders for training, validation and test.

    Raises:
        UserError: RecBole can do neither with what it is given.
    """
    with told_in_a_line("read and split the dataset"):
        dataset = create_dataset(config)
        train, valid, test = data_preparation(config, dataset)
    return dataset, (train, valid, test)


def prepare_summaries(config: Any, stage: str, *, since: str | None = None) -> list[str]:
    """Make the summaries a run of `config` would read (``items``, ``users``, ``all``); return the files they are in.

    With `since` only users with an interaction at or after it get theirs (`users_since`); a line says who else has
    none.
    """
    # here, as every run of a baseline would wait seconds for transformers
    from recbole_mllm.model.stages import make_stage
    from recbole_mllm.summaries.prepare import make_item_summaries, refresh
    from recbole_mllm.summaries.since import users_since
    from recbole_mllm.summaries.users import Plan

    init_seed(config["seed"], config["reproducibility"])
    init_logger(config)
    check_keys(config.external_config_dict, "the configuration")
    dataset, (train, *_) = read_and_split(config)
    settings = Settings.from_config(config)
    made = make_stage(config, settings, config["device"])
    plan = Plan(train._dataset.histories, train._dataset.positions)
    users = users_since(dataset, since) if since is not None else None
    lines = []
    if stage != "items":
        lines = _left(refresh(made, plan, users), since)
    else:
        make_item_summaries(made, plan)
    files = (isum_file(made.folder, made.tag), usum_file(made.folder, made.tag))
    return [str(path) for path in files if path.is_file()] + lines


def _left(users: list[str], since: str | None) -> list[str]:
    """Return the line about those whom `since` left without a summary that their rows read."""
    if not users:
        return []
    named = ", ".join(users[:5]) + ", …" * (len(users) > 5)
    return [
        f"{len(users)} users have summaries to write from before --since {since} ({named}); the same command without "
        "--since writes those too, and with summarize: off no model runs until then"
    ]


def frozen_candidates(config: Any, out: Path) -> str:
    """Write the candidates a run of `config` would meet to `out`; say what was written.

    Raises:
        UserError: Every phase ranks all items, so there are none.
    """
    config["show_progress"], config["state"] = False, "ERROR"
    init_seed(config["seed"], config["reproducibility"])  # as `run`: a random split draws from it
    init_logger(config)
    dataset, (_, *loaders) = read_and_split(config)
    frozen = {p: made for p, made in zip(("valid", "test"), loaders, strict=True) if hasattr(made, "negatives")}
    if not frozen:
        raise UserError("full ranking has no candidates to export; set eval_args.mode to uniN or popN")
    users, items = (np.asarray(dataset.field2id_token[f]).astype(str) for f in (dataset.uid_field, dataset.iid_field))
    header = {
        "dataset": dataset.dataset_name,
        "protocol": protocol_line(config, len(frozen["test"].rows.users) if "test" in frozen else 0),
        "seed": config["candidate_seed"],
        "digest": dataset.candidates_digest,
    }
    lines = write_candidates(out, header, frozen, users, items)
    return f"{out}: {lines} lines of users, digest {dataset.candidates_digest}; {header['protocol']}"
