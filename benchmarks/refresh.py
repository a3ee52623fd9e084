"""What a refresh asks after 1 % new interactions, as a share of the first run's prompts, for many settings.

Pure index arithmetic over a made world of 5 to 35 interactions a user, 20 on average: which states the rows of
leave-one-out read, before and after (tests hold it against real runs). The new interactions fall on users at random, 1,
3 or 10 to each of them. Items' own summaries are left out, in both. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import numpy as np
import yaml

from recbole_mllm.common.resources import PROPERTIES
from recbole_mllm.common.settings import SummarySettings
from recbole_mllm.summaries.chains import State, state_at, steps

DEFAULT = SummarySettings.from_config(yaml.safe_load((PROPERTIES / "model" / "MLLMMSR.yaml").read_text()))
SETTINGS = {
    "block_size: 3": DEFAULT,
    "block_size: 5": replace(DEFAULT, block_size=5),
    "block_size: 10": replace(DEFAULT, block_size=10),
    "block_size: 20": replace(DEFAULT, block_size=20),
    "block_size: 10, partial_block: false": replace(DEFAULT, block_size=10, partial_block=False),
    "max_history: 10": replace(DEFAULT, max_history=10),
    "max_history: 20": replace(DEFAULT, max_history=20),
    "summary_mode: direct": replace(DEFAULT, summary_mode="direct"),
}
LAST = (None, 10, 3, 1)


def positions(length: int, last_k: int | None) -> set[int]:
    """Return where the rows of a user with `length` interactions stand: training, validation and test."""
    first = 1 if last_k is None else max(1, length - 2 - last_k)
    return set(range(first, length))


@cache
def states(length: int, last_k: int | None, settings: SummarySettings) -> frozenset[State]:
    """Return the states that the rows of such a user read, and those they build on: a prompt each."""
    read = (state_at(place, settings) for place in positions(length, last_k))
    return frozenset(s for level in steps((s for s in read if s is not None), settings) for s in level)


def prompts(lengths: Any, more: Any, last_k: int | None, settings: SummarySettings) -> tuple[int, int]:
    """Return the prompts of a first run over users with `lengths` interactions, and of a refresh after `more` each."""
    first = sum(len(states(int(n), last_k, settings)) for n in lengths)
    grown = ((int(n), int(n + m)) for n, m in zip(lengths, more, strict=True) if m)
    return first, sum(len(states(b, last_k, settings) - states(a, last_k, settings)) for a, b in grown)


def shares(users: int, each: int) -> dict[str, dict[str, float]]:
    """Return a refresh's share in percent, by setting and `train_last_k`, if an active user has `each` new ones."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(5, 36, users)
    more = np.zeros(users, int)
    more[rng.choice(users, int(lengths.sum() * 0.01) // each, replace=False)] = each
    out: dict[str, dict[str, float]] = {}
    for name, settings in SETTINGS.items():
        counted = {str(k): prompts(lengths, more, k, settings) for k in LAST}
        out[name] = {k: round(100 * again / first, 1) for k, (first, again) in counted.items()}
    return out


def main() -> None:
    """Print a table for each number of new interactions an active user."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=20_000)
    users, found = parser.parse_args().users, {}
    for each in (1, 3, 10):
        found[str(each)] = table = shares(users, each)
        print(f"\n{each} new an active user, % of the first run | " + " | ".join(f"train_last_k {k}" for k in LAST))
        for name, row in table.items():
            print(f"{name} | " + " | ".join(f"{value:.1f}" for value in row.values()))
    print(json.dumps({"percent": found}))


if __name__ == "__main__":
    main()
