"""What the commands of one run or one dataset do, once their words are read."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from recbole_mllm.benchmark.variants import MLLM
from recbole_mllm.cli.arguments import Options, config_of, dataset_of
from recbole_mllm.common import distributed
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.files import CONVERTED, EXPORT, check_file, check_folder, recover, write_text


def convert(args: Namespace, options: Options) -> int:
    """Turn a raw dump into atomic files; without torch, pandas or RecBole."""
    from recbole_mllm.common.resources import converters

    return int(converters("options").main(args.words))


def run_model(args: Namespace, options: Options) -> int:
    """Train and evaluate one model, as RecBole's ``run_recbole.py`` does."""
    from recbole_mllm.common.config import check_training
    from recbole_mllm.evaluation.protocol import protocol_line
    from recbole_mllm.quick_start import run

    if args.model != MLLM and distributed.is_launched():
        if not distributed.is_main():
            return 0  # RecBole's own models run in one process
        from recbole_mllm.mllm.sharding import keep_whole

        keep_whole()  # what may read their items for them
    config = config_of(args.model, dataset_of(args), options)
    check_training(config)
    outcome = run(config)
    if distributed.is_main():
        users = len(outcome.users["user"]) if outcome.users else None
        print(f"best valid: {_metrics(outcome.valid)}\n            {protocol_line(outcome.config, phase='valid')}")
        print(f"test:       {_metrics(outcome.test)}\n            {protocol_line(outcome.config, users, 'test')}")
        print(f"checkpoint: {outcome.checkpoint}")
    return 0


def _metrics(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items()) or "-"


def summarize(args: Namespace, options: Options) -> int:
    """Make the summaries that a training of MLLMMSR with the same settings would read, no more; or say their cost."""
    from recbole_mllm.plan.counting import dry_run
    from recbole_mllm.quick_start import prepare_summaries

    config = config_of(MLLM, dataset_of(args), options)
    if args.dry_run:
        lines = dry_run(config, args.stage, args.since)
    else:
        lines = prepare_summaries(config, args.stage, since=args.since)
    if distributed.is_main():
        print("".join(f"{line}\n" for line in lines), end="")
    return 0


def _is_plan(head: bytes) -> bool:
    return re.match(rb'\{\s*"schema": \d+,\s*"dataset": ', head) is not None


def plan(args: Namespace, options: Options) -> int:
    """Say what a run of MLLMMSR would cost, before anything runs."""
    dataset, path = dataset_of(args), None
    if args.json:
        path = check_file(Path(args.json), "--json", _is_plan, "a plan that --json wrote")
        if not path.parent.is_dir():
            raise UserError(f"--json {args.json}: there is no folder {path.parent}; make it first")
    from recbole_mllm.plan import make_plan  # loads transformers
    from recbole_mllm.plan.plan_text import format_plan

    request = {"device": args.device, "nodes": args.nodes, "devices_per_node": args.devices_per_node}
    found = make_plan(config_of(MLLM, dataset, options), **request)
    if path is not None:
        write_text(path, json.dumps(found, indent=2) + "\n")
    print(format_plan(found))
    return 0


def inspect(args: Namespace, options: Options) -> int:
    """Print a dataset's health and write it as a page; a poor dataset is no error, one that cannot be read is."""
    from recbole_mllm.common.config import file_keys
    from recbole_mllm.inspect.health_page import format_health, is_page, write_health
    from recbole_mllm.inspect.measure import measure

    path = check_file(Path(args.output), "--output", is_page, "a page that `inspect` wrote") if args.output else None
    keys = {key: value for name in options.config_files for key, value in file_keys(name).items()}
    health = measure(_dataset_folder(args.directory, options.overrides), keys | dict(options.overrides))
    print(format_health(health))
    print("", *write_health(health, path), sep="\n")
    return 0


def _dataset_folder(given: str, overrides: Mapping[str, Any]) -> Path:
    """Return the folder that `given` is, or names under data_path; a built-in dataset is built there."""
    from recbole_mllm.demo.builtin import ensure_builtin
    from recbole_mllm.inspect.measure import LAYOUT_KEYS

    if unknown := set(overrides) - {"data_path", *LAYOUT_KEYS}:
        takes = ", ".join(f"--{name}" for name in ("output", "data_path", "config_files", *LAYOUT_KEYS))
        raise UserError(f"inspect takes no --{min(unknown)}; it takes {takes}")
    if Path(given).is_dir():
        with suppress(OSError):  # a folder that is only read
            recover(Path(given), CONVERTED)
        return Path(given)
    data_path = Path(str(overrides.get("data_path") or "dataset"))
    folder = data_path / given
    if Path(given).name == given:
        ensure_builtin(folder)
    if not folder.is_dir():
        near = sorted(path.name for path in data_path.glob("*") if path.is_dir() and not path.name.startswith("."))
        there = f" ({', '.join(near)})" if near else ""
        raise UserError(f"no dataset {given!r}: it is neither a folder nor in {data_path}{there}")
    return folder


def export(args: Namespace, options: Options) -> int:
    """Write a run's model as a folder that transformers and servers load."""
    out = Path(args.out)
    check_folder(out, EXPORT, "--out")
    from recbole_mllm.training.model_export import export as write

    folder = write(args.run, out, merge=args.merge)
    print(f"written: {folder}; its README.md says how to serve it")
    return 0


def export_candidates(args: Namespace, options: Options) -> int:
    """Write the frozen candidates that every model meets on a dataset."""
    from recbole_mllm.evaluation.candidates_file import is_export

    dataset = dataset_of(args)
    path = check_file(Path(args.out), "--out", is_export, "a file that `candidates export` wrote")
    from recbole_mllm.common.config import benchmark_defaults
    from recbole_mllm.quick_start import frozen_candidates  # loads torch

    chosen = config_of("Pop", dataset, options).external_config_dict
    defaults = {key: value for key, value in benchmark_defaults().items() if key not in chosen}
    config = config_of("Pop", dataset, replace(options, overrides={**defaults, **options.overrides}))
    print(frozen_candidates(config, path))
    return 0
