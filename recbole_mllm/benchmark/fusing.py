"""A row ``A+B``: an MLLM's finished run and a baseline's as one ranking, made from the scores that both have saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from recbole_mllm.benchmark.records import (
    PAIR_COLUMNS,
    PER_USER,
    RECORDS,
    SCORES,
    USER_COLUMNS,
    WHO,
    RunRecord,
    config_digest,
    latest,
    read_arrays,
    read_records,
    write_arrays,
)
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.resources import MLLM
from recbole_mllm.evaluation.fusion import align_candidates, choose_fusion, ndcg, sorted_scores
from recbole_mllm.evaluation.metrics import per_user, pooled_auc

_SUMMED = (
    *("load_s", "summarize_s", "summarize_reused", "features_s", "train_s", "score_s"),
    *("tokens", "parameters_trained"),
)


def fuse_runs(job: Mapping[str, Any], results: Path, folder: Path, surroundings: Mapping[str, Any]) -> RunRecord:
    """Fuse the two runs whose ids are the job's ``parts``; write the arrays into `folder` and return the record.

    Its ``fusion`` says what `evaluation.fusion.Fusion` does, with ``parts``: when each of the two was started, by id.
    Costs are those of both. Its config holds what both share, and below ``per_model`` what each has for itself.

    Raises:
        UserError: One of them has not finished, keeps no validation scores, or ranked other candidates.
    """
    known = latest(read_records(results / RECORDS))
    first, second = (_part(known.get(part), part) for part in job["parts"])
    if first.candidates != second.candidates:
        raise UserError(f"{first.label} and {second.label} ranked different candidates; run both again with --force")
    learnt = _learnt(second, results)
    try:
        valid, test = (
            align_candidates(_scores(results, mine), _scores(results, theirs), learnt)
            for mine, theirs in ((first.valid_scores, second.valid_scores), (first.scores, second.scores))
        )
        fusion = choose_fusion(valid)
    except UserError as error:
        raise UserError(f"{first.label} and {second.label} cannot be fused: {error}") from error
    alone = {"first": first, "second": second}.get(fusion.chosen)
    pairs = sorted_scores(_scores(results, (alone or first).scores))
    if alone is None:
        place = fusion.places(test)
        # of a full ranking, what the MLLM was not asked about has no fused score, but its place
        score = place if "among" in pairs else fusion.scores(test)
        pairs |= {"score": score.astype("float32"), "place": place.astype("int32")}
    users, metrics = _metrics(pairs, first)
    about = read_arrays(results / str(first.per_user), USER_COLUMNS)
    order = np.argsort(about["user"].astype(str))
    write_arrays(folder / PER_USER, {name: about[name][order] for name in USER_COLUMNS} | users)
    write_arrays(folder / SCORES, pairs)
    valid_place = {"first": valid.place, "second": valid.second_place}.get(fusion.chosen)
    ndcg_valid = ndcg(valid, fusion.places(valid) if valid_place is None else valid_place).mean()
    config = _config(first, second)
    converged = [part.converged for part in (first, second) if part.converged is not None]
    costs = {name: [v for part in (first, second) if (v := getattr(part, name)) is not None] for name in _SUMMED}
    place_of_run = f"runs/{job['run_id']}"
    return RunRecord(
        **{key: job[key] for key in WHO},
        **{key: getattr(first, key) for key in ("protocol", "candidates", "candidate_rules", "n_users")},
        **surroundings,
        **{name: sum(values) for name, values in costs.items() if values},
        status="ok",
        config_digest=config_digest(config),
        config=config,
        metrics=metrics,
        valid={"NDCG@10": float(ndcg_valid)},
        per_user=f"{place_of_run}/{PER_USER}",
        scores=f"{place_of_run}/{SCORES}",
        train_counts=second.train_counts,
        peak_memory_mb=max((part.peak_memory_mb or 0.0 for part in (first, second)), default=None),
        converged=all(converged) if converged else None,
        retrieval=None if fusion.chosen == "second" else first.retrieval,  # a ceiling is of what the MLLM re-ranks
        data={**(second.data or {}), **(first.data or {})} or None,
        fusion={**asdict(fusion), "parts": {part.run_id: part.started for part in (first, second)}},
    )


def _part(record: RunRecord | None, run_id: str) -> RunRecord:
    if record is None:
        raise UserError(f"there is no run {run_id} to fuse; run its model first")
    if not record.ok:
        raise UserError(f"{record.label} has failed, so nothing is fused with it: {record.status}")
    if record.valid_scores is None or record.train_counts is None:
        raise UserError(
            f"run {run_id} keeps no validation scores, as an earlier version recorded it or its validation has no one "
            f"ranking a user; run it again: the same command with --models {record.label} --seeds {record.seed} --force"
        )
    return record


def _scores(results: Path, path: str | None) -> Mapping[str, Any]:
    return read_arrays(results / str(path), (*PAIR_COLUMNS, "place"))


def _learnt(record: RunRecord, results: Path) -> Any:
    """Return what says of raw item ids which of them the model has met in training: all, if it is an MLLM too."""
    if record.model == MLLM:
        return lambda items: np.ones(len(items), dtype=bool)
    counts = read_arrays(results / str(record.train_counts), ("item", "count"))
    met = counts["item"][counts["count"] > 0]
    return lambda items: np.isin(items, met)


def _metrics(pairs: Mapping[str, Any], record: RunRecord) -> tuple[dict[str, Any], dict[str, float]]:
    """Return every user's metrics, in the order of raw ids, and their means, as a run of `record`'s config has them."""
    order = np.lexsort((-pairs["place"], pairs["user"]))
    log = {name: column[order] for name, column in pairs.items()} | {"user_id": pairs["user"][order]}
    users = per_user(log, record.config)
    del users["user"]
    decimals = int(record.config["metric_decimal_place"])
    metrics = {name: round(float(values.mean()), decimals) for name, values in users.items()}
    if "AUC" in record.metrics:
        metrics["AUC"] = pooled_auc(log["label"], log["score"])
    return users, metrics


def _config(first: RunRecord, second: RunRecord) -> dict[str, Any]:
    shared = {key: value for key, value in first.config.items() if second.config.get(key, ...) == value}
    parts = {first.model: first, second.label if second.model == first.model else second.model: second}  # as TALLRec is
    own = {
        name: {key: value for key, value in part.config.items() if key not in (*shared, "per_model", "model")}
        for name, part in parts.items()
    }
    return shared | {"per_model": own}
