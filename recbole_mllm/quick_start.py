"""One run from configuration to metrics, in a straight line, with its times and the scored pairs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from recbole.data import create_dataset
from recbole.evaluator.register import metrics_dict
from recbole.trainer import TraditionalTrainer
from recbole.utils import get_model, get_trainer, init_seed

from recbole_mllm.common import distributed
from recbole_mllm.common.config import check_keys, check_training, per_model, recbole_config, sections
from recbole_mllm.common.errors import UserError, as_user_error
from recbole_mllm.common.files import check_place
from recbole_mllm.common.fitting import Fit
from recbole_mllm.common.resources import MLLM
from recbole_mllm.common.settings import Settings
from recbole_mllm.data.checking import nothing_left
from recbole_mllm.data.schema import isum_file, usum_file
from recbole_mllm.evaluation.candidates import Loaders, prepare_loaders
from recbole_mllm.evaluation.candidates_file import write_candidates
from recbole_mllm.evaluation.full_ranking import loader_of_all_items
from recbole_mllm.evaluation.loader import FrozenEvalDataLoader
from recbole_mllm.evaluation.metrics import evaluate, joined, per_user, pooled_auc, recording
from recbole_mllm.evaluation.protocol import protocol_line
from recbole_mllm.recbole_patches.processes import open_log
from recbole_mllm.retrieval.baseline import write_ids


@dataclass(slots=True)
class Outcome:
    """What a run ended with.

    `candidates` is the digest of what was asked, "" where that was not frozen. `pairs` holds internal ids, labels,
    scores and places of every scored test pair.

    Under full ranking it holds each user's best items and target, with ``among``, how many were ranked, and ``answer``,
    the log-odds of an MLLM that was asked about the pair; `pairs_scored` counts all.

    `train_s` holds no validation and no test, and is None where nothing was trained; `converged` says whether
    validation had stopped rising when training ended, None where that is no question (one pass, zero-shot).

    `retrieval`, where all items were ranked, says by what: ``retriever``, ``top_k``, ``recall`` (the share of test
    targets among its best, a ceiling) and ``fusion`` (the MLLM's share). `scores_reused` is how many of the test scores
    earlier evaluations had left, `world_size` how many processes worked on it.

    `valid_pairs` are those of the validation split by the state that was tested; None unless they are asked for.

    `load_s` is what loading the models took, None of a baseline; `summarize_s` is without it: the seconds that writing
    the summaries took, of `summarize_reused` of them in an earlier run, as the store has recorded them.

    `full_ranking`, where it was asked for beside drawn candidates, holds the ``metrics`` of ranking all items for
    ``n_users``, and of MLLMMSR the ``retrieval`` whose best it re-ranked.

    `preferences` are what MLLMMSR's rows have read of their users, `tokens` how many of its prompts were scored.
    """

    config: Any
    dataset: Any
    train_data: Any
    test_data: Any
    model: Any
    checkpoint: Path
    candidates: str
    valid: dict[str, float]
    test: dict[str, float]
    users: dict[str, Any]
    pairs: dict[str, Any] | None
    valid_pairs: dict[str, Any] | None
    summarize_s: float
    train_s: float | None
    score_s: float
    retrieval: dict[str, Any] | None = None
    scores_reused: int = 0
    world_size: int = 1
    converged: bool | None = None
    load_s: float | None = None
    summarize_reused: int = 0
    full_ranking: dict[str, Any] | None = None
    preferences: Any = None
    tokens: int | None = None

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


def run(
    config: Any, check: Callable[[Loaders], None] | None = None, *, keep_valid: bool = False, rank_all: bool = False
) -> Outcome:
    """Run what `config` says, as RecBole's ``run_recbole`` does (quick_start.py:94-178).

    Args:
        config: RecBole's.
        check: May refuse the split, before anything is trained.
        keep_valid: Whether the outcome holds the scored pairs of validation too.
        rank_all: Whether all items are ranked too where candidates are drawn; by MLLMMSR only if it has a retriever.
    """
    _begin(config)
    dataset, loaders = _data(config)
    if check is not None:
        check(loaders)
    summaries = _summaries(config, loaders.train)
    model, build_s = _model(config, loaders.train, summaries)
    fitted = _fit(config, model, build_s, loaders, saved=True, keep_valid=keep_valid)
    scored = _score(config, fitted.trainer, loaders.test)
    metrics, users, pairs = _metrics(config, scored.result, scored.batches)
    retrieval = _retrieval(scored.batches, summaries)
    tokens = model.tokens_read if summaries else None  # of what `score_s` and training took
    full_ranking = _rank_all(config, fitted.trainer, loaders.test, summaries) if rank_all else None
    return Outcome(
        config=config,
        dataset=dataset,
        train_data=loaders.train,
        test_data=loaders.test,
        model=model,
        checkpoint=Path(fitted.trainer.saved_model_file),
        candidates=loaders.candidates,
        valid=fitted.valid,
        test=metrics,
        users=users,
        pairs=pairs,
        valid_pairs=joined(fitted.valid_batches),
        summarize_s=summaries.preferences.spent.seconds if summaries else 0.0,
        train_s=_with_retriever(fitted.train_s, summaries if retrieval else None),
        score_s=scored.seconds,
        retrieval=retrieval,
        full_ranking=full_ranking,
        scores_reused=scored.reused,
        world_size=distributed.world_size() if summaries else 1,
        converged=fitted.converged,
        load_s=summaries.preferences.load_s + model.load_s if summaries else None,
        summarize_reused=summaries.preferences.spent.reused if summaries else 0,
        preferences=summaries.preferences if summaries else None,
        tokens=tokens,
    )


def validate(config: Any) -> float:
    """Train as `run` does and return the best validation score, leaving the test split and the disk alone."""
    _begin(config)
    dataset, loaders = _data(config)
    if not len(loaders.valid):
        raise nothing_left(dataset, "validate on")
    model, build_s = _model(config, loaders.train, _summaries(config, loaders.train))
    return _fit(config, model, build_s, loaders, saved=False).score


def _begin(config: Any) -> None:
    """Seed, refuse keys and places that cannot be, and open the log, before the dataset is read."""
    init_seed(config["seed"], config["reproducibility"])
    check_keys(config.external_config_dict, "the configuration")
    check_training(config)
    for key in ("checkpoint_dir", "retriever_dir"):
        if config[key]:
            check_place(Path(str(config[key])), f"{key}:")
    open_log(config)


def read_and_split(config: Any) -> tuple[Any, Loaders]:
    """Return the dataset of `config`, and its loaders with the candidates that every model is asked about.

    Raises:
        UserError: RecBole can do neither with what it is given.
    """
    refused = config["model"], config["dataset"]
    with as_user_error("read the dataset", *refused):
        dataset = create_dataset(config)
    with as_user_error("split the dataset", *refused):
        return dataset, prepare_loaders(config, dataset)


def _data(config: Any) -> tuple[Any, Loaders]:
    """Return the dataset and its loaders, and seed what comes next."""
    dataset, loaders = read_and_split(config)
    log = logging.getLogger()
    log.info(dataset)
    for phase in ("valid", "test"):  # what RecBole's lines below are results of
        log.info(f"{phase}: {protocol_line(config, phase=phase)}")
    init_seed(config["seed"] + config["local_rank"], config["reproducibility"])  # as run_recbole, before its model
    return dataset, loaders


class _Summaries(NamedTuple):
    """What MLLMMSR is built from: what its rows read of their users, and under full ranking what is re-ranked."""

    preferences: Any
    reranker: Any


def _summaries(config: Any, train: Any) -> _Summaries | None:
    """Return the summaries that rows read, generating what the store lacks; None of a baseline, which reads none.

    The retriever of a full ranking is found or trained first, as a wrong checkpoint is better known before the texts
    are paid for.
    """
    if config["model"] != MLLM:
        return None
    from recbole_mllm.model.summarizers import check_recommender, prepare_summaries  # loads transformers
    from recbole_mllm.retrieval.reranker import obtain_reranker

    with as_user_error("write the summaries", config["model"], config["dataset"]):
        check_recommender(config, Settings.from_config(config), train._dataset)
        reranker = obtain_reranker(config, train._dataset)
        return _Summaries(prepare_summaries(config, train._dataset), reranker)


def _model(config: Any, train: Any, summaries: _Summaries | None) -> tuple[Any, float]:
    """Return the model on its device, and the seconds it took: of a model solved in one pass, its training."""
    started = time.perf_counter()
    with as_user_error(f"make the model {config['model']}", config["model"], config["dataset"]):
        model = get_model(config["model"])(config, train._dataset, *(summaries or ())).to(config["device"])
    logging.getLogger().info(model)
    return model, time.perf_counter() - started


class _Fitted(NamedTuple):
    trainer: Any
    score: float
    valid: dict[str, float]
    train_s: float | None
    converged: bool | None
    valid_batches: list[dict[str, Any]]


def _fit(
    config: Any, model: Any, build_s: float, loaders: Loaders, *, saved: bool, keep_valid: bool = False
) -> _Fitted:
    """Train `model` with validation as its configuration says; `saved` writes the best state to the disk.

    What validation has scored of that state is returned with `keep_valid`; a resumed run whose best epoch came
    before scores it once more.
    """
    refused = config["model"], config["dataset"]
    with as_user_error("make the trainer", *refused):
        trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    one_pass = isinstance(trainer, TraditionalTrainer)
    if one_pass:  # one epoch whatever `epochs` says, so an eval_step of 2 saves nothing
        trainer.eval_step = min(trainer.eval_step, trainer.epochs)
    fit = Fit(trainer, recording) if keep_valid else Fit(trainer)
    with as_user_error("train", *refused):
        score, best = fit.run(loaders.train, loaders.valid, saved=saved, show_progress=config["show_progress"])
    if config["model"] != MLLM and (checkpoint := Path(trainer.saved_model_file)).is_file():
        write_ids(checkpoint, loaders.train._dataset)
    seconds: float | None = None
    if trainer.epochs and config["model"] != "Random":  # which learns nothing
        # ours counts the seconds itself, those before a run was resumed included
        seconds = trainer.train_s if config["model"] == MLLM else fit.seconds + (build_s if one_pass else 0.0)
    valid = {metric_name(key): float(value) for key, value in (best or {}).items()}
    batches = fit.recorded or []
    if keep_valid and valid and fit.recorded is None and config["model"] == MLLM:
        with recording() as batches:
            trainer.validate_best(loaders.valid, show_progress=config["show_progress"])
    return _Fitted(trainer, float(score), valid, seconds, None if one_pass else fit.converged, batches)


class _Scored(NamedTuple):
    """RecBole's result of the test split; what was scored for it; the seconds; scores that a killed run had left."""

    result: dict[str, float]
    batches: list[dict[str, Any]]
    seconds: float
    reused: int


def _score(config: Any, trainer: Any, test: Any) -> _Scored:
    """Score and rank the test split with the best state of the model."""
    reused, started = _reused(config, trainer.model), time.perf_counter()
    result, batches = evaluate(trainer, test, load_best_model=True, show_progress=config["show_progress"])
    seconds = time.perf_counter() - started
    return _Scored(result, batches, seconds, _reused(config, trainer.model) - reused)


def _rank_all(config: Any, trainer: Any, test: Any, summaries: _Summaries | None) -> dict[str, Any] | None:
    """Return what `Outcome.full_ranking` holds, None where candidates are not drawn or nothing ranks all items."""
    if not isinstance(test, FrozenEvalDataLoader) or (summaries is not None and summaries.reranker is None):
        return None
    try:
        found = evaluate(trainer, loader_of_all_items(config, test), load_best_model=False, show_progress=False)
        metrics, users, _ = _metrics(config, *found)
    except Exception:  # what stands beside a result must not cost the hours that made it
        if distributed.is_launched():  # the other processes would wait for this one
            raise
        logging.getLogger().exception("all items could not be ranked; the report goes without")
        return None
    retrieval = _retrieval(found[1], summaries)
    return {"metrics": metrics, "n_users": len(users["user"]), "retrieval": retrieval} if users else None


def _reused(config: Any, model: Any) -> int:
    return int(model.scores_reused) if config["model"] == MLLM else 0


def _metrics(
    config: Any, result: dict[str, float], batches: list[dict[str, Any]]
) -> tuple[dict[str, float], dict[str, Any], dict[str, Any] | None]:
    """Return the metrics, each user's part in them, and the pairs they are of (None where rows give no one ranking)."""
    metrics = {metric_name(key): float(value) for key, value in result.items()}
    pairs = joined(batches)
    if pairs is None:
        return metrics, {}, None
    users = per_user(pairs, config)
    targets = np.unique(pairs["user_id"][pairs["label"] > 0], return_counts=True)[1]
    _agree(metrics, users, targets, config["metric_decimal_place"])
    # ours, as RecBole has it only beside no top-k; where all of a user's pairs are there
    if "among" not in pairs and "GAUC" in metrics:
        metrics["AUC"] = pooled_auc(pairs["label"], pairs["score"])
    return metrics, users, pairs


def _with_retriever(train_s: float | None, summaries: _Summaries | None) -> float | None:
    """Return `train_s` and the retriever's: what many runs share each of them would have paid."""
    learnt = summaries.reranker.train_s if summaries and summaries.reranker else 0.0
    return (train_s or 0.0) + learnt if train_s is not None or learnt else None


def _retrieval(batches: list[dict[str, Any]], summaries: _Summaries | None) -> dict[str, Any] | None:
    """Return by what all items were ranked, None where they were not; the MLLM has answered for what was retrieved."""
    if summaries is None or summaries.reranker is None or not batches or "answer" not in batches[0]:
        return None
    by = summaries.reranker
    found = np.concatenate([~np.isnan(batch["answer"][batch["label"] > 0]) for batch in batches])
    return {"retriever": by.identity, "top_k": by.count, "recall": float(found.mean()), "fusion": by.share}


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

    Files count in order, each with its ``per_model`` section for this model; `overrides` win over all of them.
    """
    keys = {"per_model": sections(files)} if files else {}
    return recbole_config(model, dataset, files, keys | per_model(files, model) | overrides)


class WrittenSummaries(NamedTuple):
    """The files that hold the summaries of a run, and lines on who is left without."""

    files: tuple[Path, ...]
    left: list[str]


def write_summaries(config: Any, stage: str, *, since: str | None = None) -> WrittenSummaries:
    """Write the summaries a run of `config` would read (``items``, ``users``, ``all``).

    With `since` only users with an interaction at or after it get theirs (`users_since`); a line says who else has
    none.
    """
    # here, as every run of a baseline would wait seconds for transformers
    from recbole_mllm.model.summarizers import make_summary_setup, summary_requests
    from recbole_mllm.summaries.preferences import make_item_summaries, refresh
    from recbole_mllm.summaries.since import users_since

    init_seed(config["seed"], config["reproducibility"])
    open_log(config)
    check_keys(config.external_config_dict, "the configuration")
    dataset, loaders = read_and_split(config)
    train = loaders.train._dataset
    settings = Settings.from_config(config)
    setup = make_summary_setup(config, settings, config["device"])
    requests = summary_requests(train, settings, config["finetune"])
    users = users_since(dataset, since) if since is not None else None
    lines = []
    if stage != "items":
        lines = _left(refresh(setup, requests, users)[1], since)
    else:
        make_item_summaries(setup, requests)
    files = [isum_file(setup.folder, setup.tag), *([usum_file(setup.folder, setup.tag)] if stage != "items" else [])]
    return WrittenSummaries(tuple(path for path in files if path.is_file()), lines)


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
    open_log(config, to_file=False)
    dataset, loaders = read_and_split(config)
    phases = {"valid": loaders.valid, "test": loaders.test}
    frozen = {phase: loader for phase, loader in phases.items() if isinstance(loader, FrozenEvalDataLoader)}
    if not frozen:
        raise UserError("full ranking has no candidates to export; set eval_args.mode to uniN or popN")
    users, items = (np.asarray(dataset.field2id_token[f]).astype(str) for f in (dataset.uid_field, dataset.iid_field))
    header = {
        "dataset": dataset.dataset_name,
        "protocol": protocol_line(config, len(frozen["test"].rows.users) if "test" in frozen else 0),
        "seed": config["candidate_seed"],
        "digest": loaders.candidates,
    }
    lines = write_candidates(out, header, frozen, users, items)
    return f"{out}: {lines} lines of users, digest {loaders.candidates}; {header['protocol']}"
