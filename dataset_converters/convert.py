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
from dataset_converters.intake import Intake, check_counts, check_lines
from dataset_converters.interactions import Interactions, Row, collect, in_time_order
from recbole_mllm.data.values import impossible_times
from recbole_mllm.errors import UserError
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
    times_read: tuple[int, int]  # how many lie at or before 1970, and after tomorrow
    times_written: tuple[int, int]

    def told_times(self) -> str:
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
        if job.protocol == "paper":
            written = output.write_benchmark_files(stage, inter, job.limits.seed)
        else:
            written = output.write_interactions(stage, inter)
        check_counts("interactions written", written.interactions, steps[-1].interactions)
        times_written = _impossible(inter)
        wanted = [name for name, count in zip(inter.item_names, inter.per_item().tolist(), strict=True) if count]
        del inter  # its columns make room for what follows
        done = Converted(steps, written, Catalog(), intake, times_read, times_written)
        _write_items(job, stage, wanted, done)
        if intake.rejected:
            written.files.append(output.write_rejects(stage, intake.rejects))
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
            catalog.files.append(stage / URLS)
        write_items(stage, rows, source.features, images, job.folder, catalog, output.images_of(job.folder))
    check_counts("items written", catalog.items, len(wanted))
    check_counts("items described or not", catalog.described + catalog.without_metadata, len(wanted))
    for raw in done.intake.files[files:]:
        if not raw.line:
            raise UserError(f"{raw.path} is empty; the items' titles are read from it: fetch the file again")
    if described := done.intake.files[files:]:  # none where titles stand in the interactions' table, counted already
        check_lines(described, catalog.described + catalog.unused + catalog.repeated)


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
        "impossible_times": {"read": list(done.times_read), "written": list(done.times_written)},
        "inputs": [
            {"file": f.path.name, "bytes": f.size, "sha256": f.digest, "lines": f.line, **f.parts(), "rows": f.rows}
            for f in done.intake.files
        ],
        "outputs": [{"file": p.name, "bytes": p.stat().st_size, "sha256": digest(p)} for p in files],
        "images": done.catalog.with_image,
    }
    output.write_manifest(folder, content)
