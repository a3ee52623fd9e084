"""Finished runs whose truth is known: each model's power to see the target is planted, and so are its arrays."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recbole_mllm.benchmark.records import Kind, RunRecord, write_arrays

CANDIDATES = "9f86d081884c7d65"
N_CANDIDATES = 21


def user_metrics(scores: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Return per-user metrics of ``[users, candidates]`` scores whose first column is the target."""
    rank = (scores > scores[:, :1]).sum(axis=1)
    metrics: dict[str, NDArray[Any]] = {}
    for k in (3, 5, 10):
        hit = (rank < k).astype(float)
        metrics |= {
            f"Hit@{k}": hit,
            f"Recall@{k}": hit,
            f"NDCG@{k}": hit / np.log2(rank + 2),
            f"MRR@{k}": hit / (rank + 1),
        }
    return metrics | {"GAUC": 1 - rank / (scores.shape[1] - 1)}


def plant_run(
    results: Path,
    label: str,
    power: float,
    kind: Kind = "baseline",
    seed: int = 2024,
    n_users: int = 120,
    digest: str = "0a1b2c3d",
    run_id: str = "",
    candidates: str = CANDIDATES,
    scores: NDArray[Any] | None = None,
    keep_valid: bool = False,
    **changes: Any,
) -> RunRecord:
    """Write the arrays of a run whose target scores `power` above the rest, and return its record.

    Its validation metric follows `power` alone, so that it has no share in the test split's luck. `scores`, ``[users,
    candidates]`` with the target first, take the place of drawn ones. With `keep_valid` those of validation, and
    training counts, are there too.
    """
    run_id = run_id or f"{label.replace(':', '-')}-{seed}-{digest}"
    rng = np.random.default_rng(zlib.crc32(f"{label}{seed}".encode()))
    train_count = np.arange(n_users) % 7
    if scores is None:
        scores = rng.normal(size=(n_users, N_CANDIDATES))
        scores[:, 0] += power
    metrics = user_metrics(scores)
    users = np.array([f"u{index}" for index in range(n_users)])
    shuffled = rng.permutation(n_users)  # every run has its own order of users, as different models do
    known = {
        "user": users, "item": np.array([f"i{index}" for index in range(n_users)]), "train_count": train_count,
        "tail": train_count < 2, "history_length": np.full(n_users, 9), "has_image": np.ones(n_users, bool),
    }  # fmt: skip
    folder = f"runs/{run_id}"
    write_arrays(
        results / folder / "per_user.npz", {name: column[shuffled] for name, column in (known | metrics).items()}
    )
    label_row = np.zeros((n_users, N_CANDIDATES))
    label_row[:, 0] = 1
    pairs = {"user": np.repeat(users, N_CANDIDATES), "label": label_row.ravel(), "score": scores.ravel()}
    pairs["item"] = np.array([f"i{index}" for index in range(n_users * N_CANDIDATES)])
    write_arrays(results / folder / "scores.npz", pairs)
    if keep_valid:
        before = np.random.default_rng(zlib.crc32(f"valid {label}{seed}".encode())).normal(size=scores.shape)
        before[:, 0] += power
        for name, values in (("scores", scores), ("valid_scores", before)):
            places = values.argsort(axis=1).argsort(axis=1).ravel()
            write_arrays(results / folder / f"{name}.npz", pairs | {"score": values.ravel(), "place": places})
        counts = np.where(label_row.ravel() > 0, np.repeat(train_count, N_CANDIDATES), np.arange(scores.size) % 3)
        write_arrays(results / folder / "train_counts.npz", {"item": pairs["item"], "count": counts})
        changes |= {name: f"{folder}/{name}.npz" for name in ("valid_scores", "train_counts")}
    values: dict[str, Any] = {
        "run_id": run_id, "model": label.partition(":")[0], "label": label, "kind": kind, "seed": seed,
        "dataset": "demo", "protocol": "leave-one-out, 1+20 frozen candidates", "candidates": candidates,
        "n_users": n_users,
        "config": {"epochs": 3, "seed": seed}, "metrics": {name: float(v.mean()) for name, v in metrics.items()},
        "valid": {"NDCG@10": 0.3 + power / 10}, "converged": None if label == "Pop" else True,
        "per_user": f"{folder}/per_user.npz", "scores": f"{folder}/scores.npz", "status": "ok",
        "summarize_s": 12.0 if kind == "mllm" else None, "train_s": 20.0, "score_s": 3.0, "pairs_per_s": 840.0,
        "peak_memory_mb": 512.0, "started": "2026-01-01T10:00:00+01:00",
    }  # fmt: skip
    return RunRecord(**(values | changes))
