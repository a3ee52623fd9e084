"""What a run leaves behind: one line in ``runs.jsonl`` and its arrays; enough to rank it, test it and reproduce it.

The file only ever grows, one whole line at a time under a lock, so any number of processes may write it and a crash
costs at most the line being written. A line torn by ``kill -9`` is ignored when reading and cut off by the next writer.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recbole_mllm.benchmark.variants import Kind
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.files import digest as file_digest
from recbole_mllm.common.files import whole_file
from recbole_mllm.common.model_names import identity_of
from recbole_mllm.common.progress import warn_once
from recbole_mllm.common.settings import MODELS

RECORDS = "runs.jsonl"
PER_USER, SCORES, VALID_SCORES, TRAIN_COUNTS = "per_user.npz", "scores.npz", "valid_scores.npz", "train_counts.npz"
CANDIDATE_RULES = 2
"""How candidates are worked out; 1 read a model's own rows, which changed them on benchmark files and under popN."""

OK = "ok"

WHO = ("run_id", "model", "label", "kind", "seed", "dataset")
"""Which run a record is of; the worker's order names it by the same fields."""

Arrays = Mapping[str, NDArray[Any]]

USER_COLUMNS = ("user", "item", "train_count", "tail", "history_length", "has_image")
"""What a per-user file holds beside one float array for each per-user metric."""

PAIR_COLUMNS = ("user", "item", "label", "score")
"""What a scores file holds: one entry for each scored (user, item) pair.

Beside them ``place`` where it is recorded: the pair's place among its user's, 0 for the worst, without ties. Under
full ranking a file holds each user's best items and target alone, with ``among``, how many items were ranked, and
``answer``, the log-odds of an MLLM that was asked about the pair, else NaN.
"""


_SINCE_0_2 = (
    *("valid_scores", "train_counts", "fusion", "full_ranking", "energy_kwh", "energy_of", "future_share"),
    "data",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One finished or failed run.

    Args:
        run_id: Readable label, seed and a digest of what decides the outcome; the run's folder is ``runs/<run_id>``.
        label: The row's name, e.g. ``MLLMMSR:direct``; `model` is RecBole's name for it.
        protocol: How it was evaluated, in one line for people.
        candidates: Digest of the frozen candidates.
        candidate_rules: By which rules they were worked out, see `CANDIDATE_RULES`.
        per_user: Path of the per-user arrays (`USER_COLUMNS`), relative to the results folder.
        scores: Path of the pair scores (`PAIR_COLUMNS`), relative to the results folder.
        valid_scores: Path of the same of the validation split, by the state that was tested; None of a run that an
            earlier version recorded, and where validation has no one ranking a user.
        train_counts: Path of how often each item occurs in the training split (``item``, ``count``).
        fusion: Of a row ``A+B`` what it was made of and how, see `fusing.fuse_runs`.
        status: ``ok``, or what went wrong, in one line.
        started: Local time in ISO format.
        metrics: On the test split.
        valid: On the validation split, of the state that was tested; None of a run that an earlier version
            recorded, whose `train_s` includes validating and whose `summarize_s` loading.
        load_s: What loading the models took; `summarize_s` is without it.
        summarize_reused: How many summaries the store had already; `summarize_s` has the seconds they took then.
        train_s: Without validation and test; None where nothing was trained.
        converged: Whether validation had stopped rising when training ended; None where that is no question.
        retrieval: Under full ranking, whose best `top_k` items an MLLM re-ranked, which share of the targets is among
            them (``recall``, a ceiling), and ``fusion``, the MLLM's share of the score.
        full_ranking: Beside drawn candidates, the ``metrics`` of ranking all items for ``n_users``; of MLLMMSR those of
            re-ranking what ``retrieval`` says.
        features_s: What making the item features took, whichever run made them; None of a model that reads none.
        energy_kwh: What the machine took while the run was at work, read by codecarbon from the meters of `energy_of`
            (CPU, GPU); None where there is no meter, or several runs shared the machine.
        scores_reused: How many of the test scores earlier evaluations had left; their seconds are not in `score_s`.
        future_share: The share of test targets with a later interaction in training; None where times do not tell.
        data: SHA-256 of the files of interactions, and of items where it reads texts, by their names (`data_digests`).
        tuning: What ``--tune`` tried, with its validation scores, and what it chose; `config` has the choice in it.
    """

    run_id: str
    model: str
    label: str
    kind: Kind
    seed: int
    dataset: str
    status: str
    started: str
    protocol: str = ""
    candidates: str = ""
    candidate_rules: int = 1
    n_users: int = 0
    config_digest: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    valid: Mapping[str, float] | None = None
    per_user: str | None = None
    scores: str | None = None
    valid_scores: str | None = None
    train_counts: str | None = None
    fusion: Mapping[str, Any] | None = None
    load_s: float | None = None
    summarize_s: float | None = None
    summarize_reused: int = 0
    features_s: float | None = None
    train_s: float | None = None
    score_s: float | None = None
    pairs_per_s: float | None = None
    tokens: int | None = None
    parameters_trained: int | None = None
    peak_memory_mb: float | None = None
    energy_kwh: float | None = None
    energy_of: str | None = None
    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str = ""
    world_size: int = 1
    tuning: Mapping[str, Any] | None = None
    retrieval: Mapping[str, Any] | None = None
    full_ranking: Mapping[str, Any] | None = None
    scores_reused: int = 0
    converged: bool | None = None
    future_share: float | None = None
    data: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        """Refuse a success without finite metrics, and a status that would break the one-line-a-run rule."""
        bad = [name for name, value in self.metrics.items() if not math.isfinite(value)]
        if self.ok and (bad or not self.metrics):
            raise ValueError(f"run {self.run_id}: no finite value for {', '.join(bad) or 'any metric'}")
        if not self.status or "\n" in self.status:
            raise ValueError(f"run {self.run_id}: the status must be one line, not {self.status!r}")

    @property
    def ok(self) -> bool:
        """Whether the run finished and its numbers may be ranked."""
        return self.status == OK

    @property
    def weights(self) -> Mapping[str, str]:
        """What names the weights of each model it asked; empty of a baseline, and of a run of an earlier version.

        Those of what is fused are its parts'.
        """
        parts = (self.config.get("per_model") or {}).values() if self.fusion else ()
        known = [config.get("provenance", {}).get("weights", {}) for config in (self.config, *parts)]
        return {key: weights for one in known for key, weights in one.items()}

    @property
    def ranking_metric(self) -> str | None:
        """The metric of its ``valid_metric``, else NDCG@10 or the first there is; None of a run without metrics."""
        wanted, given = self.config.get("valid_metric"), {name.lower(): name for name in self.metrics}
        own = given.get(str(wanted).lower()) if self.config.get("valid_metric_bigger", True) else None
        return own or given.get("ndcg@10") or next(iter(self.metrics), None)

    def to_line(self) -> str:
        """Return the record as one line of JSON, without those of the fields of 0.2.0 that say nothing."""
        known = {name: value for name, value in asdict(self).items() if value is not None or name not in _SINCE_0_2}
        return json.dumps(plain_json(known), ensure_ascii=False, allow_nan=False, sort_keys=True)

    @classmethod
    def from_line(cls, line: str) -> RunRecord:
        """Read a line; fields that a later version has added are left out."""
        values = json.loads(line)
        record = cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
        texts = (record.run_id, record.model, record.label, record.dataset, record.status, record.candidates)
        numbers = (record.seed, record.n_users)
        if not all(isinstance(text, str) for text in texts) or not all(type(number) is int for number in numbers):
            raise ValueError("a name is no text, or the seed or the number of users no whole number")
        return record


def append(path: Path, record: RunRecord) -> None:
    """Add `record` to `path` for good: it is on the disk, whole, when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        written = file.read()
        file.truncate(written.rfind(b"\n") + 1)  # what a killed writer left after the last newline
        file.write(f"{record.to_line()}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def read_records(path: Path) -> list[RunRecord]:
    """Return every record in `path`, oldest first; none if there is no such file.

    A line that is no record is left out, and a warning says so: it must not cost the others.
    """
    if not path.exists():
        return []
    records = []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline was torn, or is being written
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                records.append(RunRecord.from_line(line.decode()))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            why = " ".join(str(error).split())[:120]
            warn_once(f"{path}:{number}: this line is no run record ({why}) and is left out; delete it")
    return records


def one_set_of_candidates(records: Iterable[RunRecord], expected: Mapping[str, str] | None = None) -> None:
    """Refuse a leaderboard of runs that ranked different candidates: their numbers are no comparison.

    Args:
        records: Finished runs.
        expected: The digests that other runs will have, by run id.

    Raises:
        UserError: There is more than one digest.
    """
    sets: dict[str, list[str]] = {}
    older = set()
    for record in records:
        sets.setdefault(record.candidates, []).append(record.run_id)
        older |= {record.candidates} if record.candidate_rules < CANDIDATE_RULES else set()
    for run, digest in (expected or {}).items():
        sets.setdefault(digest, []).append(run)
    if len(sets) < 2:
        return
    which = "; ".join(f"{digest or '(none)'}: {', '.join(runs)}" for digest, runs in sets.items())
    past = ", ".join(sorted(older)) if len(older) < len(sets) else ""
    why = f"{past} was drawn by the rules of an older version, so run those models again with --force, or "
    raise UserError(
        f"these runs ranked different candidates and cannot share a leaderboard ({which}); {why if past else ''}"
        "give one of them another --output_dir"
    )


def data_digests(config: Mapping[str, Any], *, reads_items: bool) -> dict[str, str]:
    """Return the SHA-256 of each file that a run of `config` takes interactions from, by name.

    Args:
        config: A run's, with RecBole's ``data_path``: the dataset's folder.
        reads_items: Whether the texts of ``.item`` count too.
    """
    folder, parts = Path(str(config["data_path"])), config["benchmark_filename"] or ()
    whole = () if parts and not config["temporal_split"] else (f"{folder.name}.inter",)
    names = (*(f"{folder.name}.{part}.inter" for part in parts), *whole)
    names = (*names, f"{folder.name}.item") if reads_items else names
    return {name: file_digest(folder / name) for name in names if (folder / name).is_file()}


def changed_data(record: RunRecord, folder: Path) -> list[str]:
    """Return the names of the files in `folder` that are others than the run has read."""
    known = (record.data or {}).items()
    return [name for name, was in known if (folder / name).is_file() and file_digest(folder / name) != was]


def one_set_of_data(records: Iterable[RunRecord]) -> None:
    """Refuse finished runs of a dataset whose files have other contents now, or had in another of them.

    Raises:
        UserError: Names the run and the file.
    """
    first: dict[str, tuple[RunRecord, str]] = {}  # a run that has read each file, and what it was
    for record in records:
        for name, was in (record.data or {}).items():
            one, known = first.setdefault(name, (record, was))
            if was != known:
                raise _other_data(record, name, f"{one.run_id} was")
    for record in {one.run_id: one for one, _ in first.values() if "data_path" in one.config}.values():
        folder = Path(str(record.config["data_path"]))  # what is fused of two places has none
        for name in changed_data(record, folder):
            raise _other_data(record, name, f"{folder} holds now")


def _other_data(record: RunRecord, name: str, than: str) -> UserError:
    return UserError(
        f"{record.run_id} was run on another {name} than {than}, and a leaderboard is of one; run it again with "
        "--force, or give another --output_dir"
    )


def records_of(path: Path, run_id: str) -> list[RunRecord]:
    """Return the records of one run in `path`, oldest first."""
    return [record for record in read_records(path) if record.run_id == run_id]


def latest(records: Iterable[RunRecord]) -> dict[str, RunRecord]:
    """Return the last record of each run id: a run that was repeated counts once, as it went the last time."""
    return {record.run_id: record for record in records}


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write an ``.npz``, whole or not at all; texts become unicode arrays, so that nothing is pickled."""
    plain: dict[str, Any] = {name: np.asarray(values) for name, values in arrays.items()}
    plain = {name: values.astype(str) if values.dtype == object else values for name, values in plain.items()}
    with whole_file(path, binary=True) as file:
        np.savez_compressed(file, **plain)  # numpy 1.26 would take allow_pickle for an array


def read_arrays(path: Path, required: Iterable[str]) -> dict[str, NDArray[Any]]:
    """Read an ``.npz`` whose arrays are all of one length and include `required`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # of a damaged file zipfile, zlib and numpy raise a dozen kinds
        raise UserError(f"cannot read {path} ({error}); run that model again") from error
    missing = [name for name in required if name not in arrays]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; run that model again")
    if len({values.shape for values in arrays.values()}) != 1:
        raise UserError(f"{path} holds arrays of different lengths; run that model again")
    return arrays


def plain_json(value: Any) -> Any:
    """Turn what a configuration may hold (paths, NumPy numbers, sets, torch devices) into what JSON can."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(entry) for entry in value]
    if isinstance(value, set | frozenset):
        return sorted(str(entry) for entry in value)
    value = value.item() if isinstance(value, np.generic) else value
    plain = value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    return value if plain else str(value)


_PLACES = ("data_path", "checkpoint_dir", "retriever_dir", "image_dir", "note")
"""Keys that say where files lie, or what is said beside them."""

DECISIVE_FILES = ("candidates_file", "retriever_checkpoint", "prompt_style")
"""Keys that may name a file which decides what is ranked, and how: it counts by what it holds."""

NAMED_MODELS = (*MODELS, "feature_encoder")
"""Keys that may name a model in a local folder, which counts by its weights."""

# Not what follows a letter, a digit or another slash: addresses and fractions are no paths
_PATH = re.compile(r"(?<![\w:/.~…-])/(?:[^\s/:'\"`,;()\[\]]+/)+([^\s/:'\"`,;()\[\]]*)")


def config_digest(config: Mapping[str, Any]) -> str:
    """Return 16 hex digits of a run's whole configuration, files and local models counting by what they hold."""
    decisive = {key: value for key, value in config.items() if key not in _PLACES}
    decisive |= {key: _content(key, decisive[key]) for key in (*DECISIVE_FILES, *NAMED_MODELS) if key in decisive}
    return hashlib.sha256(json.dumps(plain_json(decisive), sort_keys=True).encode()).hexdigest()[:16]


def _content(key: str, value: Any) -> Any:
    """Return a digest for a path that is there, and `value` itself for anything else (a hub id, a style's name)."""
    if not isinstance(value, str | Path) or not Path(value).exists():
        return value
    if key in NAMED_MODELS:
        return identity_of(str(value))
    return hashlib.sha256(Path(value).read_bytes()).hexdigest() if Path(value).is_file() else value


def said_anywhere(words: str) -> str:
    """Return a sentence with its absolute paths cut: to what follows the working directory, elsewhere to the name."""
    here = f"{Path.cwd()}/"
    return _PATH.sub(lambda found: f"…/{found[1]}", words.replace(here, "") if here != "//" else words)
