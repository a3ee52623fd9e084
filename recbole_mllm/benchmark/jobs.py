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
from recbole_mllm.common.config import benchmark_defaults, completed, config_paths, file_keys, keys_for, sections
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.resources import MLLM
from recbole_mllm.common.settings import Count, Seed, Whole, checked, mllm_keys
from recbole_mllm.common.yaml_files import read_mapping
from recbole_mllm.demo.builtin import is_builtin

LAYOUT = {
    *("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD", "load_col", "benchmark_filename", "alias_of_item_id"),
    *("train_on_histories", "temporal_split", "global_times"),
}
"""Keys of a ``dataset.yaml`` that say where its data stand, and not what a run makes of them."""


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
    entries = [resolve(label) for label in dict.fromkeys(plan.labels)]
    digests = {entry.label: _configuration(entry, plan) for entry in entries}
    pairs = [(entry, seed) for seed in dict.fromkeys(plan.seeds) for entry in entries]
    return [
        BenchmarkJob(n, entry, seed, _named(entry, seed, digests[entry.label]), plan)
        for n, (entry, seed) in enumerate(pairs, start=1)
    ]


def run_id(entry: Entry, seed: int, plan: BenchmarkPlan) -> str:
    """Name a run readably; the digest covers everything that decides its outcome except the seed, which stands beside.

    So the seeds of one configuration share the digest and are averaged, and another configuration is another row.
    Config files count by the keys that the run reads: a comment, another model's section or a backbone beside a
    baseline leaves it finished. Files that decide what is ranked and how count by what they hold, and none by where it
    lies. Its parts decide what is fused.
    """
    return _named(entry, seed, _configuration(entry, plan))


def _configuration(entry: Entry, plan: BenchmarkPlan) -> str:
    """Return the digest in a run's name."""
    if entry.parts:
        return _digest([_configuration(part, plan) for part in entry.parts])
    if entry.model == MLLM and MLLM not in sections(_given_files(plan)):  # whose place in the order was another
        earlier = _digest(_decisive_by_bytes(entry, plan))  # of before: what it has begun keeps its name
        if any((plan.output_dir / "runs").glob(_named(entry, "*", earlier))):
            return earlier
    return _digest(_decisive(entry, plan))


def shared_rates(plan: BenchmarkPlan) -> str:
    """Return a line about what MLLMMSR and baselines are both trained with, as a key meant for one may be; else ""."""
    entries = [entry for label in plan.labels if not (entry := resolve(label)).parts]
    ours, others = ([given_to(e, plan) for e in entries if (e.model == MLLM) == mine] for mine in (True, False))
    plain = {**file_keys(*plan.config_files), **plan.overrides}
    shared = {
        f"{key}: {plain[key]}"
        for key in ("epochs", "learning_rate", "train_batch_size", "weight_decay")
        if key in plain and all(any(given[key] == plain[key] for given in side) for side in (ours, others))
    }
    if not shared:
        return ""
    said = " and ".join(sorted(shared))
    return f"{MLLM} and baselines are both trained with {said}; what is meant for one goes below its name in per_model"


def given_to(entry: Entry, plan: BenchmarkPlan) -> dict[str, Any]:
    """Return the keys that a run is given above its defaults: by dataset, config files, the command line and its label.

    A built-in dataset's file holds none that decide, and may not be there yet.
    """
    settings = keys_for(config_paths(plan.config_files), entry.model)
    settings |= {**_few_epochs(entry, plan), **plan.overrides, **entry.overrides}
    own = Path(str(settings.get("data_path", "dataset"))) / plan.dataset / "dataset.yaml"
    known = read_mapping(own) if own.is_file() and not is_builtin(plan.dataset) else {}
    parts, defaults = settings.get("eval_args"), benchmark_defaults()
    if isinstance(parts, dict) and defaults["eval_args"].keys() - {"group_by"} - parts.keys():  # a part of them alone
        settings["eval_args"] = completed(completed(defaults, known), {"eval_args": parts})["eval_args"]
    return {key: value for key, value in known.items() if key not in LAYOUT} | settings


def _given_files(plan: BenchmarkPlan) -> list[str]:
    """Return the plan's config files that are no preset's name."""
    return [name for name in plan.config_files if Path(name).is_file()]


def _decisive(entry: Entry, plan: BenchmarkPlan) -> list[Any]:
    """Return what decides a run's outcome."""
    files, settings = config_paths(plan.config_files), given_to(entry, plan)
    if entry.model != MLLM and not {**entry.defaults, **settings}.get("item_features"):
        unread = mllm_keys() - {"image_dir"}  # which tells whose target has an image
        settings = {key: value for key, value in settings.items() if key not in unread}
    by_content = {key: path for key in DECISIVE_FILES if (path := Path(str(settings.get(key)))).is_file()}
    settings = {key: value for key, value in settings.items() if key not in by_content}
    contents = [_sha256(path.read_bytes()) for path in by_content.values()]
    ranked_by = sections(files).get(settings.get("retriever", ""), {})
    decisive = [entry.model, plan.dataset, entry.defaults, settings, contents, plan.limit_users]
    return [*decisive, *([ranked_by] if ranked_by else []), *([plan.tune] if plan.tune else [])]


def _decisive_by_bytes(entry: Entry, plan: BenchmarkPlan) -> list[Any]:
    given = [*map(file_keys, _given_files(plan)), plan.overrides]
    named = [str(keys[key]) for keys in given for key in DECISIVE_FILES if keys.get(key)]
    files = [*plan.config_files, *(name for name in named if Path(name).is_file())]
    contents = [_sha256(Path(f).read_bytes()) if Path(f).is_file() else f for f in files]
    keys = {key: value for key, value in plan.overrides.items() if str(value) not in files or key not in DECISIVE_FILES}
    settings = {**_few_epochs(entry, plan), **keys, **entry.overrides}
    decisive = [entry.model, plan.dataset, entry.defaults, settings, contents, plan.limit_users]
    return [*decisive, *([plan.tune] if plan.tune else [])]


def _named(entry: Entry, seed: int | str, digest: str) -> str:
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', entry.label)}-{seed}-{digest}"


def _digest(decisive: list[Any]) -> str:
    return _sha256(json.dumps(plain_json(decisive), sort_keys=True).encode())[:8]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _few_epochs(entry: Entry, plan: BenchmarkPlan) -> dict[str, Any]:
    """Return what a quick look changes of a baseline; the command line wins over it, and it over config files."""
    return baseline_defaults(entry.model, "quick") if plan.quick and entry.model != MLLM else {}
