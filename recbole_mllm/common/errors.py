"""Errors in one line: the one kind that is the user's to fix, and what RecBole refuses or trips over, as such.

RecBole's errors name a symptom, and a user needs the cause. The rules go by what is raised and where, not by model: one
of another library, or a new one, meets the same few rules.
"""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class UserError(Exception):
    """A mistake in what the user gave: one line says what, where and what to do next; the command line exits with 2."""


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """Return a question for the one of `known` that is most like `word` in any case; `otherwise` where none is."""
    small = {name.lower(): name for name in known}
    near = get_close_matches(word.lower(), small, n=1)
    return f"did you mean {small[near[0]]}?" if near else otherwise


def first_line(error: BaseException) -> str:
    """Return the first words of what an error says: a line; the error's type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


# What RecBole says -> what it means, where {0}, {1} … are the pattern's groups
_MEANINGS = (
    (
        r"(?:Additional feature file )?\[\S*\.(?:kg|link|ent|rel)\] not found.*",
        "needs a knowledge graph, in RecBole's files {dataset}.kg and {dataset}.link (some models: vectors in .ent and "
        ".rel), which the dataset does not have",
    ),
    (
        r"Field \[(\w+)\] (?:not defined in dataset|not in \w+_feat|does not exist)\.?",
        "reads the field {0!r}, which the dataset does not have or load_col does not name; add it to load_col, or name "
        "another (selected_features, item_attribute, val_interval, threshold, …)",
    ),
    (
        r"The ordering args for sequential recommendation has to be 'TO'",
        "needs eval_args.order TO: eval_args that are given replace the model's own, and what they leave out becomes "
        "RecBole's default, such as order: RO; write split, order, group_by and mode",
    ),
    (
        r"selected index k out of range",
        "takes the best k of all items while it trains, and this dataset has fewer items than its k",
    ),
    (
        r"Sample larger than population.*",
        "samples more users or items at a time than this dataset has; a smaller train_batch_size may help",
    ),
    (
        # torch's writers of files, which do not pass on the errno
        r".*inline_container\.cc.* unexpected pos .*|basic_ios::clear: iostream error",
        "could not write its checkpoint: the disk is full, or files may not grow so large; make room there, or give "
        "another folder with --checkpoint_dir=DIR",
    ),
)


def reason_of(error: BaseException, model: str, dataset: str) -> str | None:
    """Return one sentence that says why `model` failed on `dataset`; None where the error speaks for itself."""
    place = next((name for name in reversed(_modules(error)) if not _is_ours(name)), "")
    if isinstance(error, ModuleNotFoundError) and place:
        package = str(error.name).partition(".")[0]
        return f"{model} needs the Python package {package!r}, which is not installed"
    if isinstance(error, KeyError) and place and error.args and isinstance(error.args[0], str):
        return f"{model} {_field(str(error.args[0]))}"  # str: numpy's is shown as np.str_(…)
    said = str(error).partition("\n")[0].strip()
    for pattern, meaning in _MEANINGS:
        if place and (found := re.fullmatch(pattern, said)):
            return f"{model} {meaning.format(*found.groups(), dataset=dataset)}"
    if place.startswith(("recbole.model.", "recbole.trainer.")):  # elsewhere RecBole speaks of settings, and says so
        file = place.removeprefix("recbole.").replace(".", "/") + ".py"
        return f"{model} stopped in RecBole's {file}: {type(error).__name__}: {said or 'no word'}"
    return None


def _field(name: str) -> str:
    if name == "label":
        # RecBole's context-aware models draw no negatives of their own (quick_start_config/context-aware.yaml)
        return ("learns from labels, which these interactions do not have; give it train_neg_sample_args, or a "
                "threshold on a rating")  # fmt: skip
    if name == "neg_item_id":
        return (
            "learns from drawn negatives, which train_neg_sample_args turns off; give it a distribution and sample_num"
        )
    return (f"reads the field {name!r}, which the dataset does not have or load_col does not name; name fields it has "
            "(selected_features), or set item_features: [text] for a model that takes those")  # fmt: skip


def _modules(error: BaseException) -> list[str]:
    """Return the modules of RecBole's and ours that the error went through, the innermost last."""
    names = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return [name for name in names if _is_ours(name) or name.partition(".")[0] == "recbole"]


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == "recbole_mllm"


# RecBole checks what it is given with exceptions of all kinds, or trips over it
_COMPLAINTS = (
    AssertionError, AttributeError, FileExistsError, FileNotFoundError, IndexError, KeyError, NotADirectoryError,
    NotImplementedError, PermissionError, RuntimeError, TypeError, ValueError, ZeroDivisionError,
)  # fmt: skip


@contextmanager
def as_user_error(what: str, model: str = "", dataset: str = "") -> Iterator[None]:
    """Turn what RecBole itself raises within into a complaint that it cannot do `what`, or why `model` cannot run.

    What this project's code raises goes through as it is, and so does a subclass of those errors, such as want of
    memory.

    Raises:
        UserError: Says RecBole's own words.
    """
    try:
        yield
    except _COMPLAINTS as error:
        if type(error) not in _COMPLAINTS or _is_ours((_modules(error) or ["recbole_mllm"])[-1]):
            raise
        reason = reason_of(error, model, dataset) if model else None
        where = "the log file, or --debug," if _logged(error) else "--debug"
        raise UserError(reason or f"RecBole cannot {what}: {_words(error)} ({where} shows where)") from error


def _logged(error: Exception) -> bool:
    """Write the traceback into the run's log file, if there is one; the console gets the line alone.

    What happens after hours of training is not to be had again just to see where.
    """
    files = [handler for handler in logging.getLogger().handlers if isinstance(handler, logging.FileHandler)]
    trace = "".join(traceback.format_exception(error)).rstrip()
    for file in files:
        file.handle(logging.makeLogRecord({"levelno": logging.ERROR, "levelname": "ERROR", "msg": trace}))
    return bool(files)


def _words(error: Exception) -> str:
    said = " ".join(str(error).split())
    if isinstance(error, KeyError):
        return f"there is no {said}" if " " not in said else said
    plain = isinstance(error, NotImplementedError | OSError) or type(error) in (ValueError, RuntimeError)
    return said if plain and said else f"{type(error).__name__} {said}"
