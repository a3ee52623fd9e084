"""The same search budget for every model: seeded random search over a small file of choices, judged on validation.

RecBole's own ``HyperTuning`` needs hyperopt, which is an extra of RecBole's and not installed with it; what it calls
`choice` is what the files in properties/tuning hold, and a trial does what its ``objective_function`` does
(quick_start.py:193-231), but for the test split, which is not touched before the choice is made.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from recbole_mllm.benchmark.records import said_anywhere
from recbole_mllm.common import distributed
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.resources import resource
from recbole_mllm.common.yaml_files import read_mapping

Choice = dict[str, Any]

TRIALS = "trials.jsonl"
"""What a search has finished, in the run's folder."""


def space_of(model: str, fixed: Container[str] = ()) -> dict[str, list[Any]]:
    """Return the choices for `model`, but for the keys that are `fixed` already.

    Raises:
        UserError: The file does not hold a list of choices for each key.
    """
    path = Path(str(resource("tuning", model) or resource("tuning", "default")))
    found = read_mapping(path)
    if not all(isinstance(choices, list) and choices for choices in found.values()):
        raise UserError(f"{path} must hold `key: [choice, …]` lines")
    return {str(key): list(choices) for key, choices in found.items() if key not in fixed}


def trials(space: Mapping[str, list[Any]], budget: int, seed: int, default: Mapping[str, Any]) -> list[Choice]:
    """Return `budget` distinct choices, the default (nothing changed) first; fewer where there are no more."""
    every = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
    others = [one for one in every if any(default[key] != value for key, value in one.items())]
    return [{}, *random.Random(seed).sample(others, min(budget - 1, len(others)))]


def search(
    choices: list[Choice],
    score: Callable[[Choice], float],
    bigger: bool,
    tell: Callable[[str], None] = print,
    journal: Path | None = None,
    measure: str = "validation",
) -> dict[str, Any]:
    """Try each of `choices`; return what was tried, with which validation score, and what won (the first of equals).

    A trial that fails has spent its part of the budget, and the reason stands in its place, without folders of this
    machine. What `journal` has as tried is not tried again, so a search that was killed resumes where it was.

    Raises:
        UserError: A setting cannot be run at all.
        RuntimeError: Every trial failed.
    """
    known = {json.dumps(entry["settings"], sort_keys=True): entry for entry in read_journal(journal)}
    tried = []
    for number, choice in enumerate(choices, start=1):
        entry = known.get(json.dumps(choice, sort_keys=True))
        before = " (from before)" if entry else ""
        if entry is None:
            entry = _tried(choice, score)
            if journal is not None and distributed.is_main():
                with journal.open("a", encoding="utf-8") as file:
                    file.write(f"\n{json.dumps(entry)}\n")  # the newline in front ends a line that was torn
        tried.append(entry)
        said = entry.get("error") if entry["valid"] is None else f"{measure} {entry['valid']}"
        tell(f"trial {number}/{len(choices)} {choice or 'defaults'}: {said}{before}")
    done = [entry for entry in tried if entry["valid"] is not None]
    if not done:
        raise RuntimeError(f"all {len(tried)} trials failed, the first with {tried[0]['error']}")
    best = (max if bigger else min)(done, key=lambda entry: entry["valid"])
    return {"trials": tried, "chosen": best["settings"], "seconds": sum(entry["seconds"] for entry in tried)}


def _tried(choice: Choice, score: Callable[[Choice], float]) -> dict[str, Any]:
    entry: dict[str, Any] = {"settings": choice, "valid": None}
    started = time.perf_counter()
    try:
        entry["valid"] = float(score(choice))
    except UserError:
        raise
    except Exception as error:  # whatever RecBole or torch raises for settings that do not go together
        if distributed.is_launched():
            raise  # the other processes are in the middle of the trial that failed here
        entry["error"] = said_anywhere(f"{type(error).__name__}: {error}".partition("\n")[0])
    return entry | {"seconds": time.perf_counter() - started}


def read_journal(path: Path | None) -> list[dict[str, Any]]:
    """Return the trials a search has finished; a line that was torn when it was killed, or damaged, counts as none."""
    entries = []
    for line in path.read_bytes().splitlines() if path is not None and path.is_file() else []:
        with suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict) and {"settings", "valid", "seconds"} <= entry.keys():
                entries.append(entry)
    return entries
