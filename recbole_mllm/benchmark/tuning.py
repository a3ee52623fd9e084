"""The same search budget for every model: seeded random search over a small file of choices, judged on validation.

RecBole's own ``HyperTuning`` needs hyperopt, which is an extra of RecBole's and not installed with it; what it calls
`choice` is what the files in properties/tuning hold, and a trial does what its ``objective_function`` does
(quick_start.py:193-231), but for the test split, which is not touched before the choice is made.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import yaml

from recbole_mllm.errors import UserError
from recbole_mllm.resources import resource

Settings = dict[str, Any]


def space_of(model: str, fixed: Container[str] = ()) -> dict[str, list[Any]]:
    """Return the choices for `model`, but for the keys that are `fixed` already.

    Raises:
        UserError: The file does not hold a list of choices for each key.
    """
    path = resource("tuning", model) or resource("tuning", "default")
    found = yaml.safe_load(Path(str(path)).read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not all(isinstance(choices, list) and choices for choices in found.values()):
        raise UserError(f"{path} must hold `key: [choice, …]` lines")
    return {str(key): list(choices) for key, choices in found.items() if key not in fixed}


def trials(space: Mapping[str, list[Any]], budget: int, seed: int, default: Mapping[str, Any]) -> list[Settings]:
    """Return `budget` distinct settings, the default (nothing changed) first; fewer where there are no more."""
    every = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
    others = [one for one in every if any(default[key] != value for key, value in one.items())]
    return [{}, *random.Random(seed).sample(others, min(budget - 1, len(others)))]


def search(
    settings: list[Settings], score: Callable[[Settings], float], bigger: bool, tell: Callable[[str], None] = print
) -> dict[str, Any]:
    """Try each of `settings`; return what was tried, with which validation score, and what won (the first of equals).

    A trial that fails has spent its part of the budget, and the reason stands in its place.

    Raises:
        UserError: A setting cannot be run at all.
        RuntimeError: Every trial failed.
    """
    started, tried = time.perf_counter(), []
    for number, chosen in enumerate(settings, start=1):
        entry: dict[str, Any] = {"settings": chosen, "valid": None}
        try:
            entry["valid"] = float(score(chosen))
        except UserError:
            raise
        except Exception as error:  # whatever RecBole or torch raises for settings that do not go together
            entry["error"] = f"{type(error).__name__}: {error}".partition("\n")[0]
        tried.append(entry)
        tell(f"trial {number}/{len(settings)} {chosen or 'defaults'}: {entry['valid'] or entry.get('error')}")
    done = [entry for entry in tried if entry["valid"] is not None]
    if not done:
        raise RuntimeError(f"all {len(tried)} trials failed, the first with {tried[0]['error']}")
    best = (max if bigger else min)(done, key=lambda entry: entry["valid"])
    return {"trials": tried, "chosen": best["settings"], "seconds": time.perf_counter() - started}
