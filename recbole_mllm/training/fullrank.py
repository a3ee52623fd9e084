"""A split ranked in full: which pairs it takes, how good it can get, what brute force would cost, the best fusion."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from recbole.utils import calculate_valid_score

SHARES = tuple(n / 10 for n in range(10, -1, -1))  # of equal ones the first is taken, so the MLLM's larger share
_PROBE = 64  # pairs scored to tell how long all will take

Row = tuple[int, int, int]


@torch.no_grad()
def rows_ahead(model: Any, eval_data: Any) -> tuple[list[Row], float]:
    """Return the (user, position, item) the split's shortlists ask about, and the share of targets in them.

    That share is a ceiling: no re-ranking moves a target into a shortlist it is not in.
    """
    rows: list[Row] = []
    found = total = 0
    for batch, _, owner, targets in eval_data:
        short = model.reranker.shortlist(batch)
        rows += model.rows_asked(batch, short)
        found += int((short.asked[owner.numpy()] == targets.numpy()[:, None]).any(1).sum())
        total += len(targets)
    return rows, found / max(1, total)


@torch.no_grad()
def tell_price(model: Any, eval_data: Any) -> None:
    """Log how many pairs brute force asks about and, from a few of them, how long that takes."""
    log = logging.getLogger()
    batch = next(iter(eval_data))[0]
    short = model.reranker.shortlist(batch)
    total = len(eval_data._dataset) * short.count
    pairs = sorted(model.rows_asked(batch, short), key=lambda row: (row[2], row[0], row[1]))[: _PROBE + 2]
    if not pairs:
        return
    log.info(f"full_sort: brute asks about {total:,} pairs ({len(eval_data._dataset):,} rows x {short.count:,} items)")
    model.ask(pairs[:2])  # the first call of a model is slower
    started = time.perf_counter()
    model.ask(pairs[2:])
    rate = max(1, len(pairs) - 2) / (time.perf_counter() - started)
    log.info(
        f"at {rate:.1f} pairs a second, about {_duration(total / rate)}; full_sort: rerank asks about top_k a row; "
        "`recbole-mllm plan` prices both before anything runs"
    )


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.1f} minutes"


def best_share(reranker: Any, evaluate: Callable[[], Mapping[str, float]], metric: str, bigger: bool) -> Any:
    """Set the MLLM's share that does best by `metric`, and return what `evaluate` gave with it."""
    results = []
    for share in SHARES:
        reranker.share = share
        results.append(evaluate())
    scores = np.array([calculate_valid_score(result, metric) for result in results])
    best = int(np.argmax(scores if bigger else -scores))
    reranker.share = SHARES[best]
    tried = ", ".join(f"{share:.1f}: {score:.4f}" for share, score in zip(SHARES, scores, strict=True))
    logging.getLogger().info(f"fusion: {SHARES[best]:.1f} is the MLLM's best share on validation ({tried})")
    return results[best]
