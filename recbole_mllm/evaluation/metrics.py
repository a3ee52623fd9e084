"""The pairs an evaluation scores, and metrics from them: RecBole's for each user, and the pooled AUC beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import signature
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import rankdata

Log = Mapping[str, Any]


class Metric(NamedTuple):
    """One metric of the tables; their columns follow the order of `METRICS` within each cut-off.

    Args:
        name: RecBole's name of it; a key is ``name@k`` or, without cut-offs, the name alone.
        per_cutoff: Whether it is RecBole's metric class of that name, at each k (metrics.py:39-205).
        short: At which cut-offs ("" for none) it stands in the short tables, of the terminal and of LaTeX.
        gain: What a user's one target is worth at rank r (``[users]``, 0 = best), for the curves; None = not drawn.
    """

    name: str
    per_cutoff: bool = True
    short: tuple[str, ...] = ()
    gain: Callable[[Any], Any] | None = None


METRICS = (
    Metric("NDCG", short=("10", "5"), gain=lambda rank: 1 / np.log2(rank + 2)),
    Metric("Hit", short=("10", "5"), gain=lambda rank: np.ones_like(rank, dtype=float)),
    Metric("Recall"),
    Metric("MRR", short=("10",), gain=lambda rank: 1 / (rank + 1)),
    Metric("GAUC", per_cutoff=False, short=("",)),
    Metric("AUC", per_cutoff=False, short=("",)),
)


HEAD_SHARE = 0.2  # the most popular fifth of the trained items is the head, the rest the long tail


def popular_head(counts: Any) -> Any:
    """Return ``[items]`` whether each item is in the head of popularity, from its training interactions."""
    trained = np.flatnonzero(counts)
    inside = np.zeros(len(counts), bool)
    best_first = trained[np.argsort(-counts[trained], kind="stable")]
    inside[best_first[: max(1, round(len(trained) * HEAD_SHARE))]] = True
    return inside


_RECORDED: ContextVar[list[dict[str, Any]] | None] = ContextVar("recorded", default=None)


def evaluate(trainer: Any, loader: Any, **options: Any) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return RecBole's result of a `loader`, and what was scored and ranked for it, batch by batch (`joined`).

    No pairs are returned where candidates are not frozen. The `options` are those of ``Trainer.evaluate``.
    """
    with recording() as batches:
        return dict(trainer.evaluate(loader, **options) or {}), batches


@contextmanager
def recording() -> Iterator[list[dict[str, Any]]]:
    """Yield a list that receives each batch that is scored and ranked within (`joined`)."""
    batches: list[dict[str, Any]] = []
    token = _RECORDED.set(batches)
    try:
        yield batches
    finally:
        _RECORDED.reset(token)


def record_scores(columns: dict[str, Any]) -> None:
    """Add a batch's columns to what the innermost `recording` yields, if there is one."""
    if (batches := _RECORDED.get()) is not None:
        batches.append(columns)


def joined(batches: Sequence[Log]) -> dict[str, Any] | None:
    """Return the batches of `evaluate` as one set of columns, sorted by user, best place first; None without any.

    None too where users have several rankings, of which no one value could come: a sequential model ranks all items for
    each row of a user, and a split by rows leaves several.
    """
    if not batches:
        return None
    columns = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    order = np.lexsort((-columns["place"], columns["user_id"]))
    log = {name: column[order] for name, column in columns.items()}
    user, place = log["user_id"], log["place"]
    several = "among" in log and bool(((user[1:] == user[:-1]) & (place[1:] == place[:-1])).any())
    return None if several else log


def per_user(log: Log, config: Any) -> dict[str, Any]:
    """Return ``{"user": ids, "Hit@5": values, …, "GAUC": values}``, one value a user, from a `joined` log.

    Of these metrics those that `config` asks for; all of them where it asks for none, as rows are ranked by one.
    Top-k values come from RecBole's metric classes (metrics.py:39-205) over the ranking without ties. A log of a full
    ranking holds each user's best items alone, and says in ``among`` how many were ranked.
    """
    users, starts, counts = np.unique(log["user_id"], return_index=True, return_counts=True)
    depth = max(config["topk"])
    places = starts[:, None] + np.arange(depth)
    inside = np.arange(depth) < counts[:, None]
    hits = np.where(inside, log["label"][np.minimum(places, len(log["label"]) - 1)] > 0, False)
    positives = np.add.reduceat(log["label"] > 0, starts).astype(int)
    out: dict[str, Any] = {"user": users}
    from recbole.evaluator import metrics as recbole_metrics  # loads torch, which the reports do without

    for metric in sorted((metric for metric in METRICS if metric.per_cutoff), key=lambda metric: metric.name):
        metric_info = getattr(recbole_metrics, metric.name)(config).metric_info
        read = (hits, positives)[: len(signature(metric_info).parameters)]  # some ask how many targets there are
        values = metric_info(*read)
        out |= {f"{metric.name}@{k}": np.asarray(values[:, k - 1], dtype=float) for k in config["topk"]}
    counts = log["among"][starts] if "among" in log else counts
    below = np.add.reduceat(np.where(log["label"] > 0, log["place"], 0), starts) - positives * (positives - 1) / 2
    out["GAUC"] = below / (positives * (counts - positives))
    asked = {name.lower() for name in config["metrics"]}
    shown = {name: values for name, values in out.items() if name.partition("@")[0].lower() in asked}
    return {"user": users, **shown} if shown else out


def pooled_auc(label: Any, score: Any) -> float:
    """Return the AUC over all pairs of all users, as the paper reports it; ties count half."""
    positive = np.asarray(label) > 0
    rank = rankdata(score)
    n, m = int(positive.sum()), int((~positive).sum())
    return float((rank[positive].sum() - n * (n + 1) / 2) / (n * m))
