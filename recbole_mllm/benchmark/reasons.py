"""Why a model cannot run, as a sentence: what RecBole raises names a symptom, and a row of a table needs the cause.

The rules go by what is raised and where, not by model: one of another library, or a new one, is told by the same few.
"""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import recbole

# What RecBole says -> what it means, where {0}, {1} … are the pattern's groups
_MEANINGS = (
    (
        r"(?:Additional feature file )?\[\S*\.(?:kg|link|ent|rel)\] not found.*",
        "needs a knowledge graph, in RecBole's files {dataset}.kg and {dataset}.link (some models: vectors in .ent and "
        ".rel), which the dataset does not have",
    ),
    (
        r"Field \[(\w+)\] not defined in dataset\.?",
        "reads the field {0!r}, which the dataset does not have; name fields it has (selected_features or "
        "item_attribute, and load_col)",
    ),
    (
        r"selected index k out of range",
        "takes the best k of all items while it trains, and this dataset has fewer items than its k",
    ),
    (
        r"Sample larger than population.*",
        "samples more users or items at a time than this dataset has; a smaller train_batch_size may help",
    ),
)


def reason_of(error: BaseException, model: str, dataset: str) -> str | None:
    """Return one sentence that says why `model` failed on `dataset`; None where the error speaks for itself."""
    place = _place(error)
    if isinstance(error, ModuleNotFoundError) and place:
        package = str(error.name).partition(".")[0]
        return f"{model} needs the Python package {package!r}, which is not installed"
    if isinstance(error, KeyError) and place and error.args and isinstance(error.args[0], str):
        return f"{model} {_field(error.args[0])}"
    said = str(error).partition("\n")[0].strip()
    for pattern, meaning in _MEANINGS:
        if place and (found := re.fullmatch(pattern, said)):
            return f"{model} {meaning.format(*found.groups(), dataset=dataset)}"
    if place and place.parts[0] in ("model", "trainer"):  # elsewhere RecBole speaks of settings, and says so
        return f"{model} stopped in RecBole's {place}: {type(error).__name__}: {said or 'no word'}"
    return None


def _field(name: str) -> str:
    if name == "label":
        # RecBole's context-aware models draw no negatives of their own (quick_start_config/context-aware.yaml)
        return ("learns from labels, which these interactions do not have; give it train_neg_sample_args, or a "
                "threshold on a rating")  # fmt: skip
    return (f"reads the field {name!r}, which the dataset does not have or load_col does not name; name fields it has "
            "(selected_features), or set item_features: [text] for a model that takes those")  # fmt: skip


def _place(error: BaseException) -> Path | None:
    """Return the innermost file of RecBole's that the error went through, in its package; None where there is none."""
    home = Path(recbole.__file__).resolve().parent
    paths = [Path(frame.filename).resolve() for frame in traceback.extract_tb(error.__traceback__)]
    inside = [path.relative_to(home) for path in paths if path.is_relative_to(home)]
    return inside[-1] if inside else None
