"""What a benchmark is to run: its plan, the jobs that come of it, and the name of each by what decides its outcome."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recbole_mllm.benchmark.records import DECISIVE_FILES, plain_json
from recbole_mllm.benchmark.variants import Entry, baseline_defaults, resolve
from recbole_mllm.common import distributed
from recbole_mllm.common.config import config_paths, file_keys, sections
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.resources import MLLM
from recbole_mllm.common.settings import Count, Seed, Whole, checked


@dataclass(frozen=True, slots=True)
class BenchmarkPlan:
    """What to run, where, and with which settings.

    Args:
        labels: Model names or variants, see `variants.resolve`.
        config_files: As RecBole takes them; they and `overrides` apply to every model.
        force: Run again what is finished.
        embed_images: Whether the report's case studies show thumbnails.
        limit_users: Evaluate a seeded sample of this many users.
        tune: How many configurations each model may try on validation first; 0 = none.
        quick: Whether baselines train for a few epochs alone (baselines.yaml, `quick`): a first look.
        note: A sentence about the data that every report must carry.
    """

    dataset: str
    labels: tuple[str, ...]
    seeds: tuple[int, ...]
    output_dir: Path
    config_files: tuple[str, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    jobs: int = 1
    force: bool = False
    embed_images: bool = True
    limit_users: int | None = None
    tune: int = 0
    quick: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        """Refuse a plan that could not run, before anything does."""
        if not self.labels or not self.seeds:
            raise UserError("a benchmark needs at least one model and one seed: --models Pop,SASRec --seeds 2024")
        checked("--jobs", self.jobs, Count)
        if self.jobs > 1 and distributed.is_launched():
            raise UserError(f"--jobs {self.jobs}: processes of a launcher share one run at a time; leave --jobs out")
        checked("--tune", self.tune, Whole)
        if self.limit_users is not None:
            checked("--limit_users", self.limit_users, Count)
        for seed in self.seeds:
            checked("--seeds", seed, Seed)
        for label in self.labels:
            resolve(label)


@dataclass(frozen=True, slots=True)
class BenchmarkJob:
    """One (model, seed) of a plan and its place in the order."""

    number: int
    entry: Entry
    seed: int
    run_id: str
    plan: BenchmarkPlan

    @property
    def name(self) -> str:
        """How the job is called on the screen."""
        return f"{self.entry.label} seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Where the job's own files lie: its order, log, checkpoints and arrays."""
        return self.plan.output_dir / "runs" / self.run_id

    @property
    def parts(self) -> list[str]:
        """The ids of the runs that a fused one is made of."""
        return [run_id(part, self.seed, self.plan) for part in self.entry.parts]

    def order(self) -> dict[str, Any]:
        """Return the worker's order: `defaults` stand below the config files, `overrides` above them.

        What is fused has the run ids of its ``parts`` instead, and the folder of ``results`` that they stand in.
        """
        who = {
            "run_id": self.run_id,
            "model": self.entry.model,
            "label": self.entry.label,
            "kind": self.entry.kind,
            "seed": self.seed,
            "dataset": self.plan.dataset,
            "output_dir": str(self.plan.output_dir),
        }
        if self.entry.parts:
            return who | {"parts": self.parts, "results": str(self.plan.output_dir)}
        return who | {
            "config_files": list(self.plan.config_files),
            "defaults": dict(self.entry.defaults),
            "overrides": {**_few_epochs(self.entry, self.plan), **self.plan.overrides, **self.entry.overrides},
            "limit_users": self.plan.limit_users,
            "tune": self.plan.tune,
            "keep_valid": True,
            "jobs": self.plan.jobs,
        }


def jobs_of(plan: BenchmarkPlan) -> list[BenchmarkJob]:
    """Return the plan's jobs in order, one seed after the other, so that a whole table stands early."""
    pairs = [(resolve(label), seed) for seed in dict.fromkeys(plan.seeds) for label in dict.fromkeys(plan.labels)]
    return [BenchmarkJob(n, *pair, run_id(*pair, plan), plan) for n, pair in enumerate(pairs, start=1)]


def run_id(entry: Entry, seed: int, plan: BenchmarkPlan) -> str:
    """Name a run readably; the digest covers everything that decides its outcome except the seed, which stands beside.

    So the seeds of one configuration share the digest and are averaged, and another configuration is another row.
    Config files count by the keys that the run reads, so a comment or another model's section leaves it finished; files
    that decide what is ranked and how count by what they hold, and none by where it lies. Its parts decide what is
    fused. Earlier versions hashed the bytes of config files; a run that `plan.output_dir` has by such a name keeps it.
    """
    if entry.parts:
        return _named(entry, seed, [run_id(part, seed, plan).rpartition("-")[2] for part in entry.parts])
    by_bytes = _decisive(entry, plan, None)
    if any((plan.output_dir / "runs").glob(_named(entry, "*", by_bytes))):
        return _named(entry, seed, by_bytes)
    return _named(entry, seed, _decisive(entry, plan, _own_sections(entry, plan)))


def _own_sections(entry: Entry, plan: BenchmarkPlan) -> dict[str, Any]:
    """Return the sections below ``per_model`` that the run reads: its model's, and its retriever's."""
    found = sections(config_paths(plan.config_files))
    own = found.get(entry.model, {})
    given = {**file_keys(*plan.config_files), **own, **plan.overrides, **entry.overrides}
    return {name: keys for name, keys in found.items() if keys and name in (entry.model, given.get("retriever"))}


def _decisive(entry: Entry, plan: BenchmarkPlan, own: Mapping[str, Any] | None) -> list[Any]:
    """Return what decides a run's outcome; with None for its `own` sections, config files count by their bytes."""
    config_files = [name for name in plan.config_files if Path(name).is_file()]
    given = [*map(file_keys, config_files), *(own or {}).values(), plan.overrides]
    named = [str(keys[key]) for keys in given for key in DECISIVE_FILES if keys.get(key)]
    files = [*plan.config_files, *(name for name in named if Path(name).is_file())]

    def content(name: str) -> str:
        if own is not None and name in config_files:
            return _sha256(_json(file_keys(name)))
        return _sha256(Path(name).read_bytes()) if Path(name).is_file() else name

    keys = {key: value for key, value in plan.overrides.items() if str(value) not in files or key not in DECISIVE_FILES}
    settings = {**_few_epochs(entry, plan), **keys, **entry.overrides}
    decisive = [entry.model, plan.dataset, entry.defaults, settings, [*map(content, files)], plan.limit_users]
    return [*decisive, *([own] if own else []), *([plan.tune] if plan.tune else [])]


def _named(entry: Entry, seed: int | str, decisive: list[Any]) -> str:
    readable = re.sub(r"[^A-Za-z0-9]+", "-", entry.label)
    return f"{readable}-{seed}-{_sha256(_json(decisive))[:8]}"


def _json(value: Any) -> bytes:
    return json.dumps(plain_json(value), sort_keys=True).encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _few_epochs(entry: Entry, plan: BenchmarkPlan) -> dict[str, Any]:
    """Return what a quick look changes of a baseline; the command line wins over it, and it over config files."""
    return baseline_defaults(entry.model, "quick") if plan.quick and entry.model != MLLM else {}
