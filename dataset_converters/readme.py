"""The README of a converted dataset: what it is, what was left out, and how to use it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dataset_converters.catalog import MISSING, Catalog
from dataset_converters.output import REJECTED

if TYPE_CHECKING:
    from dataset_converters.convert import Converted, Job


def text(job: Job, done: Converted) -> str:
    """Return the README; it holds no path and no date, so that the same input gives the same bytes."""
    return "\n".join([*_head(job, done), *_counts(done), *_items(done.catalog), *_use(job), ""])


def _head(job: Job, done: Converted) -> Iterator[str]:
    name = job.folder.name
    yield f"# {name}"
    yield ""
    yield f"Converted from {job.source.name} ({', '.join(raw.path.name for raw in done.intake.files)})."
    options = " ".join(
        f"--{key.replace('_', '-')}{'' if value is True else f' {value}'}" for key, value in job.options.items()
    )
    yield f"Options: {options or 'none'}. Protocol: {job.protocol}."
    yield ""
    yield f"Order: {done.written.order}"
    yield from job.source.notes


def _counts(done: Converted) -> Iterator[str]:
    yield "\n## Counts\n"
    yield "| after | users | items | interactions | dropped here |"
    yield "|---|---:|---:|---:|---:|"
    before = done.steps[0].interactions
    for step in done.steps:
        dropped = before - step.interactions
        yield f"| {step.name} | {step.users:,} | {step.items:,} | {step.interactions:,} | {dropped:,} |"
        before = step.interactions
    yield "\nEvery line of the raw files is accounted for:\n"
    yield from (f"- {raw.told()}" for raw in done.intake.files)
    if done.intake.rejected:
        yield f"\nRows of raw input that could not be read and were left out: {done.intake.rejected:,}; see {REJECTED}."
    if told := done.told_times():
        yield f"\n{told}"
    for part, count in done.written.counts.items():
        yield f"\n{part}: {count:,} users"


def _items(catalog: Catalog) -> Iterator[str]:
    yield "\n## Items\n"
    yield f"- {catalog.items:,} items; {catalog.without_title:,} without a title"
    yield f"- {catalog.without_metadata:,} of them are not described in the raw data; they stay, with an empty title"
    yield f"- {catalog.with_image:,} with an image"
    if catalog.broken_images:
        yield f"- {catalog.broken_images:,} images are missing or cannot be used; see {MISSING}"
    yield f"- {catalog.unused:,} described items have no interaction here and were left out"
    if catalog.repeated:
        yield f"- {catalog.repeated:,} repeated descriptions of an item, alike in title and image, were left out"


def _use(job: Job) -> Iterator[str]:
    name = job.folder.name
    yield "\n## Use\n"
    yield "`dataset.yaml` is read by itself where this folder is below `data_path`, or passed as a config file:\n"
    yield "```"
    yield f"recbole-mllm --model SASRec --dataset {name} --data_path=PARENT_OF_THIS_FOLDER"
    yield "```"
