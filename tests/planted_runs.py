"""Finished runs whose truth is known: each model's power to see the target is planted, and so are its arrays."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

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


# Case studies whose truth is known: what a run of the planted MLLM kept of its users, with pictures


TEXTS = ("The user likes red lamps and old maps.", "The user likes green lamps and old maps.")


def plant_cases(
    results: Path,
    record: RunRecord,
    n_users: int = 10,
    titles: Mapping[str, str] | None = None,
    texts: tuple[str, ...] = TEXTS,
) -> dict[str, Any]:
    """Write ``cases.json`` beside the run's arrays: six items of history, a text after every third."""
    users = [f"u{index}" for index in range(n_users)]
    candidates = [f"i{index}" for index in range(n_users * N_CANDIDATES)]
    history = [f"h{index}" for index in range(6)]
    names = {item: f"Title of {item}" for item in (*history, *candidates)} | dict(titles or {})
    steps = [{"since": 3 * n, "seen": 3 * n + 3, "text": text} for n, text in enumerate(texts)]
    kept = {
        "version": 1,
        "seed": 2024,
        "users": [
            {"user": user, "target": f"i{n * N_CANDIDATES}", "start": 0, "position": 6, "history": history,
             "steps": steps, "read": texts[-1]}
            for n, user in enumerate(users)
        ],
        "items": {item: {"title": title, "image": f"images/{item}.png"} for item, title in names.items()},
    }  # fmt: skip
    path = results / str(record.per_user)
    path.with_name("cases.json").write_text(json.dumps(kept))
    return kept


def plant_images(folder: Path, items: list[str], side: int = 300) -> None:
    """Write one picture an item, of a colour of its own."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, item in enumerate(items):
        colour = (37 * number % 256, 91 * number % 256, 173 * number % 256)
        Image.new("RGB", (side, side // 2), colour).save(folder / "images" / f"{item}.png")
