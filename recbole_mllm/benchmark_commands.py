"""The commands that make a leaderboard, show it and hold it to its records."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from recbole_mllm import ranks
from recbole_mllm.errors import UserError
from recbole_mllm.files import BENCHMARK, check_folder, check_place, set_folder_aside
from recbole_mllm.options import Options, config_of, with_preset

DEMO_MODELS = "quick"
DEMO_NOTE = (
    "This world is made so that the images carry the taste and some items are new: it shows that the machine works, "
    "not that MLLMs beat SASRec."
)
POSTERS_NOTE = "The bundled tiny MLLM has never seen a film poster: its row shows that every stage runs on real data."
DEFAULT_SEED = 2024


def benchmark(
    dataset: str,
    models: str,
    seeds: str | None,
    output: str | None,
    jobs: int,
    force: bool,
    options: Options,
    tune: int = 0,
) -> int:
    """Run every model on the same candidates and write the leaderboard; 1 if not one run has finished."""
    folder = Path(output or f"results/{dataset}")
    check_folder(folder, BENCHMARK, "--output_dir")
    from recbole_mllm.benchmark.field import expand
    from recbole_mllm.benchmark.jobs import BenchmarkPlan
    from recbole_mllm.benchmark.launched import follow
    from recbole_mllm.benchmark.records import RECORDS, latest, read_records
    from recbole_mllm.benchmark.report import format_leaderboard
    from recbole_mllm.benchmark.run import benchmark as run_benchmark
    from recbole_mllm.benchmark.worker import digests_of
    from recbole_mllm.config import config_paths

    labels = expand(models)
    keys = dict(options.overrides)
    plan = BenchmarkPlan(
        dataset=dataset,
        labels=labels,
        seeds=_seeds(seeds, options.seed),
        output_dir=folder,
        config_files=tuple(config_paths(with_preset(dataset, options.config_files))),
        limit_users=keys.pop("limit_users", None),
        note=str(keys.pop("note", _note(dataset))),
        overrides=keys,
        jobs=jobs,
        force=force,
        tune=tune,
        quick=options.quick,
        embed_images=options.embed_images,
    )
    _check_models(labels, dataset, options)
    if not ranks.is_main():
        return follow()
    html = run_benchmark(plan, digests=digests_of)
    print(format_leaderboard(folder), f"report: {html}", sep="\n")
    return 0 if any(record.ok for record in latest(read_records(folder / RECORDS)).values()) else 1


def _check_models(labels: tuple[str, ...], dataset: str, options: Options) -> None:
    """Refuse what could not run, with the settings that each run will have, before hours are spent on the rest."""
    from recbole_mllm.benchmark.field import resolve
    from recbole_mllm.config import benchmark_defaults, check_training

    for entry in map(resolve, labels):
        with suppress(ModuleNotFoundError):  # a model that lacks its library gets a row that says so
            given = config_of(entry.model, dataset, options).external_config_dict
            defaults = {k: v for k, v in {**benchmark_defaults(), **entry.defaults}.items() if k not in given}
            settings = {**defaults, **options.overrides, **entry.overrides}
            check_training(config_of(entry.model, dataset, replace(options, overrides=settings)))


def _seeds(text: str | None, seed: int | None) -> tuple[int, ...]:
    if text is None:
        return (DEFAULT_SEED if seed is None else seed,)
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise UserError(f"--seeds {text!r} must be whole numbers separated by commas") from None


def _note(dataset: str) -> str:
    from recbole_mllm.demo.builtin import is_builtin

    if not is_builtin(dataset):
        return ""
    return POSTERS_NOTE if dataset == "ml-100k-posters" else DEMO_NOTE


def report(directory: str, embed_images: bool = True) -> int:
    """Render the leaderboard again from its records."""
    from recbole_mllm.benchmark.report import format_leaderboard, render

    folder = Path(directory)
    if BENCHMARK.outputs(folder) is None:
        raise UserError(f"{folder} holds no runs.jsonl of a benchmark; give the folder a benchmark wrote")
    check_place(folder, "report")
    render(folder, embed_images=embed_images)
    print(format_leaderboard(folder))
    return 0


def rerun(run_id: str, output: str | None, options: Options) -> int:
    """Repeat a recorded run and say whether its numbers hold: 0 if they do, 1 if not."""
    from recbole_mllm.benchmark.rerun import find_run
    from recbole_mllm.benchmark.rerun import rerun as run_again

    if unknown := set(options.overrides) - {"data_path"}:
        raise UserError(f"rerun takes no --{min(unknown)}; the run's record says everything but --data_path")
    folder, record = find_run(run_id, Path(output) if output else None)
    found = run_again(folder, record, options.overrides.get("data_path"))
    print(*found.lines, sep="\n")
    return 0 if found.agree else 1


def demo(options: Options) -> int:
    """Build the demo world and run the whole pipeline on it; another seed is another world."""
    from recbole_mllm.demo.builtin import DEMO_SEED

    world = "demo" if options.seed in (None, DEMO_SEED) else f"demo-{options.seed}"
    folder = Path("results/demo")
    if ranks.is_main():
        _set_aside(folder, world)
        print(f"dataset {world}: {DEMO_NOTE}")
    return benchmark(world, DEMO_MODELS, None, str(folder), 1, False, options)


def _set_aside(folder: Path, world: str) -> None:
    """Move the results of another world out of the way: one leaderboard holds one set of candidates."""
    from recbole_mllm.benchmark.records import RECORDS, read_records

    check_folder(folder, BENCHMARK, "the results folder")
    others = {record.dataset for record in read_records(folder / RECORDS)} - {world}
    if others:
        old = set_folder_aside(folder)
        print(f"the results of {', '.join(sorted(others))} are now in {old}")
