"""The commands that make a leaderboard, show it and hold it to its records."""

from __future__ import annotations

from argparse import Namespace
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from recbole_mllm.benchmark.variants import expand, resolve
from recbole_mllm.cli.arguments import Options, config_of, dataset_of, with_preset
from recbole_mllm.common import distributed
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.files import BENCHMARK, check_folder, check_place, set_folder_aside

DEMO_MODELS = "quick"
DEMO_NOTE = (
    "This world is made so that the images carry the taste and some items are new: it shows that the machine works, "
    "not that MLLMs beat SASRec."
)
POSTERS_NOTE = "The bundled tiny MLLM has never seen a film poster: its row shows that every stage runs on real data."
DEFAULT_SEED = 2024


def benchmark(args: Namespace, options: Options) -> int:
    """Run every model on the same candidates and write the leaderboard; 1 if not one run has finished."""
    dataset = dataset_of(args)
    check_folder(folder := Path(args.output_dir or f"results/{dataset}"), BENCHMARK, "--output_dir")
    seeds = None
    if args.seeds is not None:
        try:
            seeds = tuple(int(word) for word in args.seeds.split(","))
        except ValueError:
            raise UserError(f"--seeds {args.seeds!r} must be whole numbers separated by commas") from None
    more = {name: getattr(args, name) for name in ("jobs", "force", "tune", "quick")}
    more["embed_images"] = args.embed_images == "on"
    return run_benchmark(dataset, args.models, folder, options, seeds, **more)


def run_benchmark(
    dataset: str, models: str, folder: Path, options: Options, seeds: tuple[int, ...] | None = None, **more: Any
) -> int:
    """Run `models`, as ``--models`` names them, into `folder`; `more` are fields of a `jobs.BenchmarkPlan`."""
    from recbole_mllm.benchmark.jobs import BenchmarkPlan
    from recbole_mllm.benchmark.records import RECORDS, latest, read_records
    from recbole_mllm.benchmark.report import format_leaderboard
    from recbole_mllm.benchmark.runner import benchmark, follow
    from recbole_mllm.benchmark.worker import digests_of
    from recbole_mllm.common.config import config_paths

    keys = dict(options.overrides)
    plan = BenchmarkPlan(
        dataset=dataset,
        labels=expand(models),
        seeds=seeds or (DEFAULT_SEED if options.seed is None else options.seed,),
        output_dir=folder,
        config_files=tuple(config_paths(with_preset(dataset, options.config_files))),
        limit_users=keys.pop("limit_users", None),
        note=str(keys.pop("note", _note(dataset))),
        overrides=keys,
        **more,
    )
    _check_models(plan.labels, dataset, options)
    if not distributed.is_main():
        return follow()
    html = benchmark(plan, digests=digests_of)
    print(format_leaderboard(folder), f"report: {html}", sep="\n")
    return 0 if any(record.ok for record in latest(read_records(folder / RECORDS)).values()) else 1


def _check_models(labels: tuple[str, ...], dataset: str, options: Options) -> None:
    """Refuse what could not run, with the settings that each run will have, before hours are spent on the rest."""
    from recbole_mllm.common.config import benchmark_defaults, check_training

    for entry in map(resolve, labels):
        with suppress(ModuleNotFoundError):  # a model that lacks its library gets a row that says so
            given = config_of(entry.model, dataset, options).external_config_dict
            defaults = {k: v for k, v in {**benchmark_defaults(), **entry.defaults}.items() if k not in given}
            settings = {**defaults, **options.overrides, **entry.overrides}
            check_training(config_of(entry.model, dataset, replace(options, overrides=settings)))


def _note(dataset: str) -> str:
    from recbole_mllm.demo.builtin import is_builtin

    if not is_builtin(dataset):
        return ""
    return POSTERS_NOTE if dataset == "ml-100k-posters" else DEMO_NOTE


def report(args: Namespace, options: Options) -> int:
    """Render the leaderboard again from its records."""
    from recbole_mllm.benchmark.report import format_leaderboard, render

    folder = Path(args.directory)
    if BENCHMARK.outputs(folder) is None:
        raise UserError(f"{folder} holds no runs.jsonl of a benchmark; give the folder a benchmark wrote")
    check_place(folder, "report")
    render(folder, embed_images=args.embed_images == "on")
    print(format_leaderboard(folder))
    return 0


def rerun(args: Namespace, options: Options) -> int:
    """Repeat a recorded run and say whether its numbers hold: 0 if they do, 1 if not."""
    from recbole_mllm.benchmark.rerun import find_run
    from recbole_mllm.benchmark.rerun import rerun as run_again

    if unknown := set(options.overrides) - {"data_path"}:
        raise UserError(f"rerun takes no --{min(unknown)}; the run's record says everything but --data_path")
    folder, record = find_run(args.run_id, Path(args.output_dir) if args.output_dir else None)
    found = run_again(folder, record, options.overrides.get("data_path"))
    print(*found.lines, sep="\n")
    return 0 if found.agree else 1


def demo(options: Options) -> int:
    """Build the demo world and run the whole pipeline on it; another seed is another world.

    One leaderboard holds one set of candidates, so the results of another world are moved out of the way.
    """
    from recbole_mllm.benchmark.records import RECORDS, read_records
    from recbole_mllm.demo.builtin import DEMO_SEED

    world = "demo" if options.seed in (None, DEMO_SEED) else f"demo-{options.seed}"
    folder = Path("results/demo")
    if distributed.is_main():
        check_folder(folder, BENCHMARK, "the results folder")
        others = {record.dataset for record in read_records(folder / RECORDS)} - {world}
        if others:
            print(f"the results of {', '.join(sorted(others))} are now in {set_folder_aside(folder)}")
        print(f"dataset {world}: {DEMO_NOTE}")
    return run_benchmark(world, DEMO_MODELS, folder, options)
