"""What each command does, once its words are read."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from recbole_mllm.api import DEMO_NOTE, run_benchmark
from recbole_mllm.arguments import (
    Options,
    check_takes,
    config_of,
    dataset_of,
    inspected_folder,
    named_folder,
    read_overrides,
)
from recbole_mllm.common import distributed
from recbole_mllm.common.config import benchmark_defaults, check_training, completed, file_keys
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.files import (
    BENCHMARK,
    EXPORT,
    check_file,
    check_folder,
    check_place,
    set_folder_aside,
    write_text,
)
from recbole_mllm.common.hub import check_can_push, push
from recbole_mllm.common.resources import MLLM
from recbole_mllm.common.settings import Count, checked, filters_of
from recbole_mllm.common.yaml_files import read_mapping
from recbole_mllm.data.schema import store_file
from recbole_mllm.demo.builtin import DEMO_SEED

DEMO_MODELS = "quick"

# One run, one dataset


def convert(args: Namespace, options: Options) -> int:
    """Turn a raw dump into atomic files; without torch, pandas or RecBole."""
    from recbole_mllm.common.resources import converters

    return int(converters("options").main(args.words))


def split(args: Namespace, options: Options) -> int:
    """Split a dataset's folder by another protocol into one of its own, whose store has the answers too."""
    from recbole_mllm.common.resources import converters
    from recbole_mllm.inspect.measure import find_layout
    from recbole_mllm.summaries.store_tools import copy_answers

    known, rest = converters("options").read_split(args.words)
    keys = read_overrides(rest)
    folder = Path(os.path.abspath(inspected_folder(known.dataset, keys, "split")))
    out, settings = Path(os.path.abspath(known.out)), converters("options").split_settings(known)
    layout, own = find_layout(folder, keys), folder / "dataset.yaml"
    found = filters_of(read_mapping(own)) if own.is_file() and settings.protocol != "loo" else []
    if found:
        raise UserError(
            f"{own} sets {' and '.join(found)}, which RecBole does not apply to the files of a split: rows would come "
            f"back that it leaves out; remove those from {folder.name}.inter (`convert` takes --k-core and "
            "--min-rating), and the key"
        )
    fields = converters("output").Fields(layout.user, layout.item, layout.time)
    given = converters("options").recorded_options(known)
    lines = converters("split").split_folder(folder, out, fields, settings, given)
    if store_file(folder).is_file():
        with _store(folder) as source, _store(out, new=True) as target:
            lines.append(f"{store_file(out).name}: {copy_answers(source, target)} answers of {store_file(folder).name}")
    print(*lines, sep="\n")
    return 0


def run_model(args: Namespace, options: Options) -> int:
    """Train and evaluate one model, as RecBole's ``run_recbole.py`` does."""
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
    from recbole_mllm.quick_start import write_summaries

    config = config_of(MLLM, dataset_of(args), options, recommends=False)
    if args.dry_run:
        lines = dry_run(config, args.stage, since=args.since)
    else:
        written = write_summaries(config, args.stage, since=args.since)
        lines = [*map(str, written.files), *written.left]
    if distributed.is_main():
        print("".join(f"{line}\n" for line in lines), end="")
    return 0


def probe_memory(args: Namespace, options: Options) -> int:
    """Ask the model that writes user summaries about the dataset, without any user's history."""
    from recbole_mllm.benchmark.memory_probe import probe_memory as probe

    count = checked("--questions", args.questions, Count)
    print(*probe(config_of(MLLM, args.where, options, recommends=False), count, args.name), sep="\n")
    return 0


def plan(args: Namespace, options: Options) -> int:
    """Say what a run of MLLMMSR would cost, before anything runs."""

    def is_plan(head: bytes) -> bool:
        return re.match(rb'\{\s*"schema": \d+,\s*"dataset": ', head) is not None

    dataset, path = dataset_of(args), None
    if args.json:
        path = check_file(Path(args.json), "--json", is_plan, "a plan that --json wrote")
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
    from recbole_mllm.inspect.health_page import format_health, is_page, write_health
    from recbole_mllm.inspect.measure import measure

    path = check_file(Path(args.output), "--output", is_page, "a page that `inspect` wrote") if args.output else None
    keys = file_keys(*options.config_files)
    health = measure(inspected_folder(args.directory, options.overrides, "inspect"), keys | dict(options.overrides))
    print(format_health(health))
    print("", *write_health(health, path), sep="\n")
    return 0


def export(args: Namespace, options: Options) -> int:
    """Write a run's model as a folder that transformers and servers load."""
    check_folder(out := Path(args.out), EXPORT, "--out")
    if args.push_to_hub:
        check_can_push(args.push_to_hub)
    from recbole_mllm.training.model_export import export as write
    from recbole_mllm.training.model_export import push_export

    folder = write(args.run, out, merge=args.merge, record=_record_of(args.run), shared=bool(args.push_to_hub))
    print(f"written: {folder}; its README.md says how to serve it")
    if args.push_to_hub:
        print(f"pushed: {push_export(args.push_to_hub, folder)}")
    return 0


def _record_of(run: str) -> dict[str, Any] | None:
    """Return what a benchmark recorded of the run whose checkpoint `run` names; None where it recorded nothing."""
    from recbole_mllm.benchmark.records import RECORDS, latest, read_records
    from recbole_mllm.common.checkpoint import find_checkpoint

    place = find_checkpoint(run).resolve().parent
    folder = place.parent if place.name == "saved" else place
    record = latest(read_records(folder.parent.parent / RECORDS)).get(folder.name)
    return asdict(record) if record is not None and record.ok else None


def recommend(args: Namespace, options: Options) -> int:
    """Print the best items for a user; also write them as JSON or CSV."""

    def is_ours(head: bytes) -> bool:
        return head.startswith((b'{\n  "model": ', b"rank,item_id,title,score"))

    check_takes(options, "recommend")
    files = {
        name: check_file(Path(path), f"--{name}", is_ours, "a file that `recommend` wrote")
        for name in ("json", "csv")
        if (path := getattr(args, name))
    }
    if len(files) > len({os.path.realpath(path) for path in files.values()}):
        raise UserError(f"--json and --csv both name {args.csv}; give two files")
    candidates = None if args.candidates is None else _lines(Path(args.candidates), "--candidates")
    if candidates == []:
        raise UserError(f"--candidates {args.candidates} is empty; give a text file with one item id a line")
    from recbole_mllm.recommender import Recommender  # loads torch

    history = None if args.history is None else next(csv.reader([args.history]), [])
    if history and not all(history):
        raise UserError(f"--history {args.history!r} holds an empty item id; give raw ids with one comma between two")
    found = Recommender(
        args.checkpoint,
        retriever_checkpoint=args.retriever_checkpoint,
        top_k=args.top_k,
        data_path=None if (home := options.overrides.get("data_path")) is None else str(home),
    )
    frame = found.recommend(args.user, history=history, top=args.top, candidates=candidates)
    about: dict[str, Any] = {"model": found.name, "checkpoint": str(found.checkpoint), "dataset": found.dataset_name}
    about |= {"user": args.user, "history": history if history is not None else found.history(args.user)}
    if found.name == MLLM:
        states = found.explain(args.user, history=history)
        about["preference"] = states["preference"].iloc[-1]
        about["states"] = states.to_dict("records")
        if args.explain:
            for items, text in states.itertuples(index=False):
                print(f"read {', '.join(found.items.title(item) or item for item in items)}\n  {text}")
        else:
            print(f"preference: {about['preference']}")
    elif args.explain:
        found.explain(args.user, history=history)  # says why it cannot
    print(frame.round({"score": 4, "p_yes": 4}).to_string(index=False))
    if "json" in files:
        about["recommendations"] = frame.to_dict("records")
        write_text(files["json"], json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    if "csv" in files:
        write_text(files["csv"], frame.to_csv(index=False))
    return 0


def _lines(path: Path, option: str) -> list[str]:
    """Return the lines of a text file without the empty ones."""
    try:
        # not by splitlines, which parts an id at U+2028 and the like
        return [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise UserError(f"{option} {path} cannot be read ({why}); give a text file with one item id a line") from error


def export_candidates(args: Namespace, options: Options) -> int:
    """Write the frozen candidates that every model meets on a dataset."""
    from recbole_mllm.evaluation.candidates_file import is_export

    dataset = dataset_of(args)
    path = check_file(Path(args.out), "--out", is_export, "a file that `candidates export` wrote")
    from recbole_mllm.quick_start import frozen_candidates  # loads torch

    config, wanted = config_of("Pop", dataset, options), benchmark_defaults()
    own = Path(config["data_path"]) / "dataset.yaml"
    for said in (read_mapping(own) if own.is_file() else {}, config.external_config_dict):  # the later wins
        wanted = completed(wanted, {key: said[key] for key in said if key in wanted})
    config = config_of("Pop", dataset, replace(options, overrides={**options.overrides, **wanted}))
    print(frozen_candidates(config, path))
    return 0


# Many runs, one leaderboard


def benchmark(args: Namespace, options: Options) -> int:
    """Run every model on the same candidates and write the leaderboard; 1 if a run has failed."""
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
    return _benchmark(dataset, args.models, folder, options, seeds=seeds, **more)


def _benchmark(dataset: str, models: str, folder: Path, options: Options, **more: Any) -> int:
    done = run_benchmark(
        dataset, models, config_file_list=options.config_files, config_dict=options.keys(), output_dir=folder, **more
    )
    if not distributed.is_main():
        return 0
    print(done, f"report: {done.path}", sep="\n", flush=True)
    if not done.failed:
        return 0
    names = ", ".join(done.failed)
    print(
        f"recbole-mllm: failed: {names}; the report says why, and the same command repeats only these", file=sys.stderr
    )
    return 1


def demo(options: Options) -> int:
    """Build the demo world and run the whole pipeline on it; another seed is another world.

    One leaderboard holds one set of candidates, so the results of another world are moved out of the way.
    """
    from recbole_mllm.benchmark.records import RECORDS, read_records

    world = "demo" if options.seed in (None, DEMO_SEED) else f"demo-{options.seed}"
    folder = Path("results/demo")
    if distributed.is_main():
        check_folder(folder, BENCHMARK, "the results folder")
        others = {record.dataset for record in read_records(folder / RECORDS)} - {world}
        if others:
            print(f"the results of {', '.join(sorted(others))} are now in {set_folder_aside(folder)}")
        print(f"dataset {world}: {DEMO_NOTE}")
    return _benchmark(world, DEMO_MODELS, folder, options)


def report(args: Namespace, options: Options) -> int:
    """Render the leaderboard again from its records."""
    from recbole_mllm.benchmark.report import render
    from recbole_mllm.benchmark.tables import format_table

    folder = Path(args.directory)
    if BENCHMARK.outputs(folder) is None:
        raise UserError(f"{folder} holds no runs.jsonl of a benchmark; give the folder a benchmark wrote")
    check_place(folder, "report")
    print(format_table(render(folder, embed_images=args.embed_images == "on")))
    return 0


def rerun(args: Namespace, options: Options) -> int:
    """Repeat a recorded run and say whether its numbers hold: 0 if they do, 1 if not."""
    from recbole_mllm.benchmark.rerun import find_run
    from recbole_mllm.benchmark.rerun import rerun as run_again

    check_takes(options, "rerun")
    folder, record = find_run(args.run_id, Path(args.output_dir) if args.output_dir else None)
    found = run_again(folder, record, options.overrides.get("data_path"))
    print(*found.lines, sep="\n")
    return 0 if found.agree else 1


def doctor(args: Namespace, options: Options) -> int:
    """Say what this installation is and can; 1 where it cannot run."""
    from recbole_mllm.cli.doctor import examine

    check_takes(options, "doctor")
    return examine(Path(str(options.overrides.get("data_path") or "dataset")), partial(print, flush=True))


def clean(args: Namespace, options: Options) -> int:
    """List what runs have left behind, and with ``--yes`` remove it."""
    from recbole_mllm.cli.clean import DEFAULT, KINDS
    from recbole_mllm.cli.clean import clean as remove

    kinds = DEFAULT if args.kind is None else [kind.strip() for kind in args.kind.split(",")]
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UserError(f"--kind {unknown[0]!r} is unknown; give some of {', '.join(KINDS)}")
    usual = [
        folder for name in ("dataset", "results", "saved", "log", "log_tensorboard") if (folder := Path(name)).is_dir()
    ]
    remove([Path(name) for name in args.folders] or usual, kinds, remove=args.yes, tell=print)
    return 0


# The summary store; no model is loaded


@contextmanager
def _store(folder: Path, *, new: bool = False, read: bool = False) -> Iterator[Any]:
    """Open the store in `folder`, only to `read` it, if so; unless it may be `new`, one must be there."""
    from recbole_mllm.summaries.store import ReadOnlyStore, opened_store

    if not new and not store_file(folder).is_file():
        raise UserError(f"{folder} holds no summary store yet ({store_file(folder).name}); `summarize` makes one")
    with closing(ReadOnlyStore(folder) if read else opened_store(folder)) as store:
        yield store


def store_stats(args: Namespace, options: Options) -> int:
    """Print answers, tokens and seconds by model, kind of prompt and origin."""
    from recbole_mllm.summaries.store_tools import groups, size

    folder = named_folder(args.where).resolve()
    with _store(folder, read=True) as store:
        found, megabytes = groups(store), size(store) / 1e6
    print(f"{store_file(folder)}: {sum(g.answers for g in found)} answers, {megabytes:.1f} MB")
    table = [["model", "kind", "origin", "answers", "prompt tokens", "new tokens", "seconds", "cut", "empty"]]
    for g in found:
        numbers = (g.answers, g.prompt_tokens, g.new_tokens, round(g.seconds, 1), g.truncated, g.empty)
        table.append([g.model, g.kind, g.origin or "-", *map(str, numbers)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table if found else ():
        cells = (c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        print("  ".join(cells).rstrip())
    return 0


def store_prune(args: Namespace, options: Options) -> int:
    """Delete the answers of a model, or those of long ago."""
    from recbole_mllm.summaries.store_tools import prune

    with _store(named_folder(args.where).resolve()) as store:
        done = prune(store, args.model, args.older_than, dry_run=args.dry_run)
    for name, answers in done.gone.items():
        print(f"{name}: {answers} answers {'would be deleted' if args.dry_run else 'deleted'}")
    end = "nothing was changed" if args.dry_run or not done.gone else f"{done.freed / 1e6:.1f} MB freed"
    print(f"{sum(done.gone.values())} in all, {done.left} {'would stay' if args.dry_run else 'stay'}; {end}")
    return 0


def store_export(args: Namespace, options: Options) -> int:
    """Write the answers to a file."""
    from recbole_mllm.summaries.store_tools import dataset_card, export, is_export

    if args.push_to_hub:
        check_can_push(args.push_to_hub)
    folder = named_folder(args.where).resolve()
    out = check_file(Path(args.out), "--out", is_export, "a file that `store export` wrote")
    with _store(folder, read=True) as store:
        answers = export(store, folder.name, out, args.model)
    print(f"{out}: {answers} answers")
    if args.push_to_hub:
        with TemporaryDirectory() as scratch:  # the file alone, and a page
            shutil.copyfile(out, Path(scratch) / out.name)
            write_text(Path(scratch) / "README.md", dataset_card(out))
            print(f"pushed: {push(args.push_to_hub, Path(scratch), [out.name, 'README.md'], kind='dataset')}")
    return 0


def store_import(args: Namespace, options: Options) -> int:
    """Add the answers of a file that `store export` wrote, or take in an edited ``.isum`` or ``.usum``."""
    from recbole_mllm.summaries.store_tools import import_answers
    from recbole_mllm.summaries.summary_files import import_file, is_summary_file

    path = Path(args.file)
    if not path.is_file():
        what = "is no file" if os.path.lexists(path) else "does not exist"
        raise UserError(f"{path} {what}; give a file that `store export` wrote, or an edited .isum or .usum")
    if is_summary_file(path):
        folder = (named_folder(args.where) if args.where else path.parent).resolve()
        with _store(folder) as store:
            print(import_file(store, folder, path, args.origin))
        return 0
    if not args.where:
        raise UserError(f"store import {path}: say into which dataset: `store import DATASET {path}`")
    folder = named_folder(args.where).resolve()
    with _store(folder, new=True) as store:
        done = import_answers(store, path, args.origin, replace=args.replace)
    others = (
        f"{done.replaced} replaced, {done.known} the same" if args.replace else f"{done.known} known already and left"
    )
    print(f"{store_file(folder)}: {done.added} answers added, {others}{'' if args.replace else ' as they were'}")
    return 0


def store_show(args: Namespace, options: Options) -> int:
    """Print an item's summaries, or each state of a user's, as the next run finds them."""
    from recbole_mllm.data.item_table import read_titles
    from recbole_mllm.summaries.summary_files import current, find

    folder, (kind, owner) = named_folder(args.where).resolve(), _whose(args)
    with _store(folder, read=True) as store:
        for tag, summaries in find(store, kind, owner, args.tag).items():
            print(f"tag {tag.name}")
            for found in current(store, folder, tag, summaries):
                place, read = found.summary.place, found.summary.read
                if kind == "item":
                    title = read_titles(folder, tag.about["item_field"], {owner}).get(owner, "")
                    head = f"item {owner}, title: {title or '-'}, image: {', '.join(read) or '-'}"
                else:
                    head = f"user {owner}, position {place.seen}, history {place.history}, has read {', '.join(read)}"
                    head += f" and what was written at {found.summary.continues.seen}" if found.summary.earlier else ""
                print(head)
                if args.prompt:
                    said = [line for prompt in found.prompts for line in prompt.text.splitlines()]
                    print(
                        *(f"  > {line}" for line in said or ["(title, image or wording has changed since)"]), sep="\n"
                    )
                print(f"  {'(the next run writes it again)' if found.text is None else found.text}")
    return 0


def store_set(args: Namespace, options: Options) -> int:
    """Put a text in the place of an item's summary, or of one state of a user's."""
    from recbole_mllm.summaries.summary_files import set_text

    folder, (kind, owner) = named_folder(args.where).resolve(), _whose(args)
    if args.position is not None and kind == "item":
        raise UserError("--position is a place in a user's history; an item has one summary")
    with _store(folder) as store:
        print(set_text(store, folder, kind, owner, args.position, args.text, args.tag))
    return 0


def _whose(args: Namespace) -> tuple[str, str]:
    return ("item", args.item) if args.item is not None else ("user", args.user)
