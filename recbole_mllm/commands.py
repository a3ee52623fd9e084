"""What each command does, once its words are read."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from recbole_mllm import ranks
from recbole_mllm.errors import UserError

DEMO_MODELS = "quick"
DEMO_NOTE = (
    "This world is made so that the images carry the taste and some items are new: it shows that the machine works, "
    "not that MLLMs beat SASRec."
)
POSTERS_NOTE = "The bundled tiny MLLM has never seen a film poster: its row shows that every stage runs on real data."
DEFAULT_SEED = 2024
OURS = "MLLMMSR"


@dataclass(frozen=True, slots=True)
class Options:
    """What every command takes: configuration keys, config files or presets, a seed, whether reports show images."""

    overrides: Mapping[str, Any] = field(default_factory=dict)
    config_files: tuple[str, ...] = ()
    seed: int | None = None
    embed_images: bool = True

    def keys(self) -> dict[str, Any]:
        """Return the overrides with the seed among them."""
        return {**self.overrides, **({"seed": self.seed} if self.seed is not None else {})}


def _config(model: str, dataset: str, options: Options) -> Any:
    """Return RecBole's Config of one run, with the process's own arguments out of its sight.

    Raises:
        UserError: A key, a value, the model or the dataset is not what it should be; nothing has run yet.
    """
    from recbole_mllm.config import check_keys, config_paths
    from recbole_mllm.quick_start import make_config
    from recbole_mllm.settings import EvaluationSettings, Settings

    check_keys(options.overrides, "the command line")
    sys.argv = sys.argv[:1]
    files = config_paths(_with_preset(dataset, options.config_files))
    try:
        config = make_config(model, dataset, files, {"frozen_candidates": True, **options.keys()})
    except ValueError as error:  # RecBole's word for a model, mode or metric it does not know
        raise UserError(f"{error}".strip().replace("\n", " ") + _nearest_model(model)) from error
    EvaluationSettings.from_config(config)
    if model == OURS:
        Settings.from_config(config)
    _check_dataset(Path(config["data_path"]), config)
    return config


def _nearest_model(name: str) -> str:
    """Return a hint where RecBole has no model `name`; its models are the files of its properties/model."""
    import recbole

    from recbole_mllm.benchmark.field import SETS

    files = (Path(recbole.__file__).parent / "properties" / "model").glob("*.yaml")
    names = sorted({path.stem for path in files} | {"Random", "MLLMMSR", "TALLRec", *SETS})
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near and name not in names else ""


def _check_dataset(folder: Path, config: Any) -> None:
    """Refuse a dataset that is not there; one that RecBole knows how to download is RecBole's business."""
    import recbole

    urls = yaml.safe_load((Path(recbole.__file__).parent / "properties" / "dataset" / "url.yaml").read_text())
    if folder.is_dir() or config["dataset"] in urls:
        return
    near = sorted(path.name for path in folder.parent.glob("*") if path.is_dir() and not path.name.startswith("."))
    there = f"there are {', '.join(near)}" if near else "there is none yet"
    raise UserError(
        f"no dataset {folder.name!r} in {folder.parent} ({there}); give its folder's name, or --data_path=DIR"
    )


def _with_preset(dataset: str, files: tuple[str, ...]) -> list[str]:
    """Return `files` behind the preset of a built-in dataset, whose settings they may change."""
    from recbole_mllm.demo.builtin import preset_of

    preset = preset_of(dataset)
    return [*([preset] if preset and preset not in files else []), *files]


def run_model(model: str, dataset: str, options: Options) -> int:
    """Train and evaluate one model, as RecBole's ``run_recbole.py`` does."""
    from recbole_mllm.quick_start import run

    if model != OURS and not ranks.is_main():
        return 0  # RecBole's own models run in one process
    outcome = run(_config(model, dataset, options))
    if not ranks.is_main():
        return 0
    print(f"best valid: {_metrics(outcome.valid)}\ntest:       {_metrics(outcome.test)}")
    print(f"checkpoint: {outcome.checkpoint}")
    return 0


def _metrics(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items()) or "-"


def summarize(dataset: str, stage: str, dry: bool, since: str | None, options: Options) -> int:
    """Make the summaries that a training of MLLMMSR with the same settings would read, no more; or say their cost."""
    from recbole_mllm.quick_start import prepare_summaries

    lines = prepare_summaries(_config(OURS, dataset, options), stage, dry=dry, since=since)
    for line in lines if ranks.is_main() else []:
        print(line)
    return 0


def plan(dataset: str, json_path: str | None, request: Mapping[str, Any], options: Options) -> int:
    """Say what a run of MLLMMSR would cost, before anything runs."""
    from recbole_mllm.planning.plan import make_plan
    from recbole_mllm.planning.request import Request
    from recbole_mllm.planning.text import format_plan

    asked = Request(**request)
    found = make_plan(_config("MLLMMSR", dataset, options), asked)
    if json_path:
        path = Path(json_path)
        if not path.parent.is_dir():
            raise UserError(f"--json {json_path}: there is no folder {path.parent}; make it first")
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(format_plan(found))
    return 0


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
    """Run every model on the same candidates and write the leaderboard."""
    from recbole_mllm.benchmark.field import expand
    from recbole_mllm.benchmark.launched import follow
    from recbole_mllm.benchmark.report import format_leaderboard
    from recbole_mllm.benchmark.run import BenchmarkPlan
    from recbole_mllm.benchmark.run import benchmark as run_benchmark
    from recbole_mllm.config import config_paths

    labels = expand(models)
    _check_models(labels, dataset, options)
    keys = dict(options.overrides)
    folder = Path(output or f"results/{dataset}")
    plan = BenchmarkPlan(
        dataset=dataset,
        labels=labels,
        seeds=_seeds(seeds, options.seed),
        output_dir=folder,
        config_files=tuple(config_paths(_with_preset(dataset, options.config_files))),
        limit_users=keys.pop("limit_users", None),
        note=str(keys.pop("note", _note(dataset))),
        overrides=keys,
        jobs=jobs,
        force=force,
        tune=tune,
        embed_images=options.embed_images,
    )
    if not ranks.is_main():
        return follow()
    html = run_benchmark(plan)
    print(format_leaderboard(folder), f"report: {html}", sep="\n")
    return 0


def _check_models(labels: tuple[str, ...], dataset: str, options: Options) -> None:
    """Refuse what could not run before hours are spent on the rest."""
    from recbole_mllm.benchmark.field import resolve

    for model in dict.fromkeys(resolve(label).model for label in labels):
        with suppress(ModuleNotFoundError):  # a model that lacks its library gets a row that says so
            _config(model, dataset, options)


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


def inspect(directory: str, output: str | None, options: Options) -> int:
    """Print a dataset's health and write it as a page; a poor dataset is no error, one that cannot be read is."""
    from recbole_mllm.health.measure import measure
    from recbole_mllm.health.report import write_health
    from recbole_mllm.health.text import format_health

    image_dir = options.overrides.get("image_dir")
    health = measure(_dataset_folder(directory, options.overrides), Path(image_dir) if image_dir else None)
    print(format_health(health))
    print("", *write_health(health, Path(output) if output else None), sep="\n")
    return 0


def _dataset_folder(given: str, overrides: Mapping[str, Any]) -> Path:
    """Return the folder that `given` is, or names under data_path; a built-in dataset is built there."""
    from recbole_mllm.demo.builtin import ensure_builtin

    if unknown := set(overrides) - {"data_path", "image_dir"}:
        raise UserError(f"inspect takes no --{min(unknown)}; it takes --image_dir, --output and --data_path")
    if Path(given).is_dir():
        return Path(given)
    data_path = Path(str(overrides.get("data_path") or "dataset"))
    folder = data_path / given
    if Path(given).name == given:
        ensure_builtin(folder)
    if not folder.is_dir():
        raise UserError(f"no dataset {given!r}: it is neither a folder nor in {data_path}{_near(data_path)}")
    return folder


def _near(data_path: Path) -> str:
    near = sorted(path.name for path in data_path.glob("*") if path.is_dir() and not path.name.startswith("."))
    return f" ({', '.join(near)})" if near else ""


def export(run: str, out: str, merge: bool) -> int:
    """Write a run's model as a folder that transformers and servers load."""
    from recbole_mllm.training.export import export as write

    folder = write(run, Path(out), merge=merge)
    print(f"written: {folder}; its README.md says how to serve it")
    return 0


def report(directory: str, embed_images: bool = True) -> int:
    """Render the leaderboard again from its records."""
    from recbole_mllm.benchmark.report import format_leaderboard, render

    folder = Path(directory)
    if not (folder / "runs.jsonl").is_file():
        raise UserError(f"{folder} holds no runs.jsonl; give the folder a benchmark wrote")
    render(folder, embed_images=embed_images)
    print(format_leaderboard(folder))
    return 0


def export_candidates(dataset: str, out: str, options: Options) -> int:
    """Write the frozen candidates that every model meets on `dataset`."""
    from recbole_mllm.config import benchmark_defaults
    from recbole_mllm.quick_start import frozen_candidates

    shown = _config("Pop", dataset, options)
    chosen = shown.external_config_dict
    defaults = {key: value for key, value in benchmark_defaults().items() if key not in chosen}
    config = _config("Pop", dataset, replace(options, overrides={**defaults, **options.overrides}))
    print(frozen_candidates(config, Path(out)))
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

    others = {record.dataset for record in read_records(folder / RECORDS)} - {world}
    if others:
        taken = (folder.with_name(f"{folder.name}.{n}") for n in count(1))
        old = next(path for path in taken if not path.exists())
        folder.replace(old)
        print(f"the results of {', '.join(sorted(others))} are now in {old}")
