"""One conversion in a straight line: read, sort, narrow, write; files appear when all of them are made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dataset_converters import output, readme
from dataset_converters.catalog import URLS, Catalog, Fetch, ImageSource, ItemRow, noting_urls, plain_rows, write_items
from dataset_converters.filters import Limits, Step, narrow
from dataset_converters.intake import Intake
from dataset_converters.interactions import Row, collect, in_time_order
from recbole_mllm.files import CONVERTED, digest, publish, whole_file


class Source(Protocol):
    """One kind of raw dump."""

    name: str
    item_kind: str
    features: Mapping[str, str]  # columns of X.item beyond id, title and image, with RecBole's types
    has_urls: bool  # whether items name images by URL
    notes: list[str]  # what people should know of this dump, for the README

    def interactions(self, intake: Intake) -> Iterator[Row]:
        """Yield every interaction in the file's order."""

    def items(self, intake: Intake) -> Iterator[ItemRow]:
        """Yield what is known of each item."""

    def images(self) -> Path | None:
        """Return the folder with the items' images, or None."""


@dataclass(frozen=True, slots=True)
class Job:
    """What to convert, and how."""

    source: Source
    folder: Path
    limits: Limits = Limits()
    protocol: str = "loo"
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


def convert(job: Job, intake: Intake) -> Converted:
    """Write the dataset into `job.folder`, whose last part names the files.

    Raises:
        UserError: The raw data or the options do not fit; or the folder is none to write to (`output.check`).
    """
    output.check(job.folder)
    with output.into(job.folder) as stage:
        inter, steps = narrow(in_time_order(collect(job.source.interactions(intake), intake)), job.limits)
        if job.protocol == "paper":
            written = output.write_benchmark_files(stage, inter, job.limits.seed)
        else:
            written = output.write_interactions(stage, inter)
        wanted = [name for name, count in zip(inter.item_names, inter.per_item().tolist(), strict=True) if count]
        del inter  # its columns make room for what follows
        done = Converted(steps, written, Catalog(), intake)
        _write_items(job, stage, wanted, done)
        if intake.rejected:
            written.files.append(output.write_rejects(stage, intake.rejects))
        _write_words(job, stage, done)
        publish(stage, job.folder, CONVERTED)
    return done


def _write_items(job: Job, stage: Path, wanted: list[str], done: Converted) -> None:
    source, catalog = job.source, done.catalog
    images = ImageSource.of(source.images(), job.fetch)
    rows = plain_rows(source.items(done.intake), wanted, len(source.features), catalog, done.intake)
    with ExitStack() as stack:
        if source.has_urls:
            rows = noting_urls(rows, stack.enter_context(whole_file(stage / URLS)))
            catalog.files.append(stage / URLS)
        write_items(stage, rows, source.features, images, job.folder, catalog, output.images_of(job.folder))


def _write_words(job: Job, folder: Path, done: Converted) -> None:
    kind = job.item_kind or job.source.item_kind
    comment = f"{folder.name}, converted from {job.source.name}; see README.md.\n{done.written.order}"
    with whole_file(folder / "dataset.yaml") as file:
        file.write(output.dataset_yaml(comment, done.written.config, kind))
    with whole_file(folder / "README.md") as file:
        file.write(readme.text(job, done))
    files = [*done.written.files, *done.catalog.files, folder / "dataset.yaml", folder / "README.md"]
    content = {
        "converter": job.source.name,
        "protocol": job.protocol,
        "options": dict(job.options),
        "steps": [[s.name, s.users, s.items, s.interactions] for s in done.steps],
        "rejected_rows": done.intake.rejected,
        "inputs": [{"file": f.path.name, "bytes": f.size, "sha256": f.digest} for f in done.intake.files],
        "outputs": [{"file": p.name, "bytes": p.stat().st_size, "sha256": digest(p)} for p in files],
        "images": done.catalog.with_image,
    }
    output.write_manifest(folder, content)
