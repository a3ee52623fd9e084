"""One conversion in a straight line: read, sort, narrow, write; files appear when all of them are made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.files import CONVERTED, publish, whole_file
from recbole_mllm.common.model_names import PRESETS
from recbole_mllm.data.atomic import impossible_times
from recbole_mllm.data.splits import SplitSettings

from . import output
from .interactions import Interactions, Limits, Row, Step, collect, in_time_order, narrow
from .item_rows import MISSING, URLS, Catalog, Fetch, ImageSource, ItemRow, noting_urls, plain_rows, write_items
from .output import REJECTED
from .source import Intake, check_counts, check_lines


class Source(ABC):
    """One kind of raw dump: which files it has, and what their rows are.

    Attributes:
        name: As in ``convert NAME``.
        example: What may follow ``convert`` on a command line.
        item_kind: What the items are, for the prompts (``--item-kind`` wins).
        features: Columns of X.item beyond id, title and image, with RecBole's types.
        has_urls: Whether items name images by URL, which ``--download-images`` then fetches.
        is_table: Whether it may be given as one file, not a folder.
        duplicates: Which of a user's interactions with one item stay (``--duplicates`` wins).
        recorded: Names of its own options that change what is written, for README and manifest.
        notes: What people should know of this dump, for the README.
    """

    name: ClassVar[str]
    example: ClassVar[str]
    item_kind = "product"
    features: Mapping[str, str] = {}
    has_urls = False
    is_table: ClassVar[bool] = False
    duplicates: ClassVar[Literal["keep", "first"]] = "keep"
    recorded: ClassVar[tuple[str, ...]] = ()

    def __init__(self, images: Path | None) -> None:
        self.image_folder = images
        self.notes: list[str] = []

    @classmethod  # noqa: B027  (most kinds have none, so it may stay empty)
    def add_options(cls, parser: ArgumentParser) -> None:
        """Add the options that this kind of dump alone has."""

    @classmethod
    @abstractmethod
    def from_options(cls, raw: Path, images: Path | None, options: Namespace) -> Source:
        """Return the dump at `raw`.

        Args:
            raw: A folder that exists; of a table, also its file.
            images: What ``--image-dir`` says.
            options: The parsed command line.

        Raises:
            UserError: The files are not there, or there are too many.
        """

    @abstractmethod
    def interactions(self, intake: Intake) -> Iterator[Row]:
        """Yield every interaction in the file's order."""

    @abstractmethod
    def items(self, intake: Intake) -> Iterator[ItemRow]:
        """Yield what is known of each item."""

    def images(self) -> Path | None:
        """Return the folder with the items' images, or None."""
        return self.image_folder


def add_option(parser: ArgumentParser, option: str, **settings: Any) -> None:
    """Add an option that may be written with - or with _, as RecBole's are."""
    parser.add_argument(option, "--" + option.strip("-").replace("-", "_"), **settings)


@dataclass(frozen=True, slots=True)
class Job:
    """What to convert, and how."""

    source: Source
    folder: Path
    limits: Limits = Limits()
    split: SplitSettings = SplitSettings()
    item_kind: str | None = None
    fetch: Fetch | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Converted:
    """What a conversion did."""

    steps: list[Step]
    written: output.Written
    catalog: Catalog
    intake: Intake
    times_read: tuple[int, int]  # how many lie at or before 1970, and after tomorrow
    times_written: tuple[int, int]

    def times_sentence(self) -> str:
        """Return a sentence on the times that no interaction can have, "" where there are none."""
        if not any(self.times_read):
            return ""
        early, late = self.times_read
        parts = [f"{early:,} at or before 1970-01-01"] * bool(early) + [f"{late:,} after tomorrow"] * bool(late)
        written = sum(self.times_written)
        where = "at the start or the end of their users' histories" if written else "in no history"
        return (
            f"Impossible times: {' and '.join(parts)} were read; {written:,} such interactions are written, {where}. "
            "Raw times are to be seconds or milliseconds since 1970."
        )


def convert(job: Job, intake: Intake) -> Converted:
    """Write the dataset into `job.folder`, whose last part names the files.

    Raises:
        UserError: The raw data or the options do not fit; or the folder is none to write to (`output.check`).
    """
    output.check(job.folder)
    with output.into(job.folder) as stage:
        inter = collect(job.source.interactions(intake), intake)
        check_lines(intake.files, len(inter))
        _refuse_empty(inter, intake)
        times_read = _impossible(inter)
        inter, steps = narrow(in_time_order(inter), job.limits)
        written = output.write_protocol(stage, inter, job.split)
        check_counts("interactions written", written.interactions, steps[-1].interactions)
        times_written = _impossible(inter)
        wanted = [name for name, count in zip(inter.item_names, inter.per_item().tolist(), strict=True) if count]
        del inter  # its columns make room for what follows
        done = Converted(steps, written, Catalog(), intake, times_read, times_written)
        _write_items(job, stage, wanted, done)
        if intake.rejected:
            output.write_rejects(stage, intake.rejects)
        _write_words(job, stage, done)
        publish(stage, job.folder, CONVERTED)
    return done


def _refuse_empty(inter: Interactions, intake: Intake) -> None:
    if len(inter):
        return
    names = ", ".join(f"{raw.path}" for raw in intake.files)
    first = next(iter(intake.rejects), None)
    why = f": {intake.rejected:,} left out, the first {first.file}:{first.line}: {first.reason}" if first else ""
    raise UserError(
        f"{names}: no interaction in {sum(raw.line for raw in intake.files):,} lines{why}; nothing is written"
    )


def _impossible(inter: Interactions) -> tuple[int, int]:
    return (0, 0) if inter.times is None else impossible_times(inter.times)


def _write_items(job: Job, stage: Path, wanted: list[str], done: Converted) -> None:
    source, catalog, files = job.source, done.catalog, len(done.intake.files)
    images = ImageSource.of(source.images(), job.fetch)
    rows = plain_rows(source.items(done.intake), wanted, len(source.features), catalog, done.intake)
    with ExitStack() as stack:
        if source.has_urls:
            rows = noting_urls(rows, stack.enter_context(whole_file(stage / URLS)))
        write_items(stage, rows, source.features, images, job.folder, catalog, output.images_of(job.folder))
    check_counts("items written", catalog.items, len(wanted))
    check_counts("items described or not", catalog.described + catalog.without_metadata, len(wanted))
    for raw in done.intake.files[files:]:
        if not raw.line:
            raise UserError(f"{raw.path} is empty; the items' titles are read from it: fetch the file again")
    if described := done.intake.files[files:]:  # none where titles stand in the interactions' table, counted already
        check_lines(described, catalog.described + catalog.unused + catalog.repeated)


def _write_words(job: Job, folder: Path, done: Converted) -> None:
    config = {**done.written.config, "item_kind": job.item_kind or job.source.item_kind}
    comment = f"{folder.name}, converted from {job.source.name}; see README.md.\n{done.written.order}"
    with whole_file(folder / "dataset.yaml") as file:
        file.write(output.dataset_yaml(comment, config))
    with whole_file(folder / "README.md") as file:
        file.write(readme(job, done))
    content = {
        "converter": job.source.name,
        "protocol": job.split.protocol,
        "options": dict(job.options),
        **({"split": done.written.about} if done.written.about else {}),
        "steps": [[s.name, s.users, s.items, s.interactions] for s in done.steps],
        "rejected_rows": done.intake.rejected,
        "impossible_times": {"read": list(done.times_read), "written": list(done.times_written)},
        "inputs": [
            {"file": f.path.name, "bytes": f.size, "sha256": f.digest, "lines": f.line, **f.parts(), "rows": f.rows}
            for f in done.intake.files
        ],
        "images": done.catalog.with_image,
    }
    output.write_manifest(folder, content)


def readme(job: Job, done: Converted) -> str:
    """Return the README; it holds no path and no date, so that the same input gives the same bytes."""
    return "\n".join([*_head(job, done), *counts(done), *_use(job), ""])


def _head(job: Job, done: Converted) -> Iterator[str]:
    name = job.folder.name
    yield f"# {name}"
    yield ""
    yield f"Converted from {job.source.name} ({', '.join(raw.path.name for raw in done.intake.files)})."
    options = " ".join(
        f"--{key.replace('_', '-')}{'' if value is True else f' {value}'}" for key, value in job.options.items()
    )
    yield f"Options: {options or 'none'}. Protocol: {job.split.protocol}."
    yield ""
    yield f"Order: {done.written.order}"
    yield from job.source.notes


def counts(done: Converted) -> Iterator[str]:
    """Yield what was read, dropped and written, for the README and the terminal."""
    yield "\n## Counts\n"
    yield "| after | users | items | interactions | dropped here |"
    yield "|---|---:|---:|---:|---:|"
    before = done.steps[0].interactions
    for step in done.steps:
        dropped = before - step.interactions
        yield f"| {step.name} | {step.users:,} | {step.items:,} | {step.interactions:,} | {dropped:,} |"
        before = step.interactions
    yield "\nEvery line of the raw files is accounted for:\n"
    yield from (f"- {raw.sentence()}" for raw in done.intake.files)
    if done.intake.rejected:
        yield f"\nRows of raw input that could not be read and were left out: {done.intake.rejected:,}; see {REJECTED}."
    if sentence := done.times_sentence():
        yield f"\n{sentence}"
    for part, count in done.written.counts.items():
        yield f"\n{part}: {count}"
    catalog = done.catalog
    yield "\n## Items\n"
    yield f"- {catalog.items:,} items; {catalog.without_title:,} without a title"
    yield f"- {catalog.without_metadata:,} of them are not described in the raw data; they stay, with an empty title"
    yield f"- {catalog.with_image:,} with an image"
    if catalog.broken_images:
        yield f"- {catalog.broken_images:,} images are missing or cannot be used; see {MISSING}"
    yield f"- {catalog.unused:,} described items have no interaction here and were left out"
    if catalog.repeated:
        yield f"- {catalog.repeated:,} repeated descriptions of an item, alike in title and image, were left out"


def benchmark_command(name: str, home: str) -> str:
    """Return the command that compares models on the dataset; MLLMMSR's comes from the preset of a middle size."""
    place = "" if home == "dataset" else f" --data_path={home}"
    return f"recbole-mllm benchmark --models quick --config_files {PRESETS[1][0]} --dataset {name}{place}"


def _use(job: Job) -> Iterator[str]:
    name = job.folder.name
    yield "\n## Use\n"
    yield "`dataset.yaml` is read by itself where this folder is below `data_path`, or passed as a config file:\n"
    yield "```"
    yield f"recbole-mllm --model SASRec --dataset {name} --data_path=PARENT_OF_THIS_FOLDER"
    yield benchmark_command(name, "PARENT_OF_THIS_FOLDER")
    yield "```"
