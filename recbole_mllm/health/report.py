"""Write what was measured beside the dataset: the page, and the list of images that are missing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recbole_mllm.data.atomic import whole_file
from recbole_mllm.data.images import MISSING_HEADER, write_report
from recbole_mllm.errors import UserError
from recbole_mllm.files import head, may_replace
from recbole_mllm.health.measure import Health
from recbole_mllm.health.page import page

PAGE, MISSING = "inspect.html", "missing_images.tsv"


def is_page(head: bytes) -> bool:
    """Return whether a file that begins so is a page of `inspect`, in whatever version."""
    return head.startswith(b"<!DOCTYPE html>") and b": dataset health</title>" in head


def write_health(health: Health, output: Path | None) -> list[str]:
    """Write ``inspect.html`` (to `output`, where one is given) and ``missing_images.tsv``; return lines that say where.

    A folder that cannot be written to is no mistake: a line names it, and what to do.

    Raises:
        UserError: `output` cannot be written.
    """
    folder = health.layout.folder
    lines = [_page(health, folder, output)]
    missing = [*health.items.missing, *health.items.lengthy, *health.items.absent]
    if missing or (folder / MISSING).is_file():  # an older list must not contradict
        lines.append(_missing([folder, *([output.parent] if output else [])], missing))
    return lines


def _page(health: Health, folder: Path, output: Path | None) -> str:
    path = output or folder / PAGE
    if output is None and path.is_file() and path.stat().st_size and not is_page(head(path)):
        return f"page: not written, as {path} is not a page of `inspect`; give --output=FILE.html"
    try:
        with whole_file(path) as file:
            file.write(page(health))
    except OSError as error:
        if output is not None:
            raise UserError(f"--output {output} cannot be written: {error.strerror}") from None
        return f"page: not written, as {folder} cannot be written to ({error.strerror}); give --output=FILE.html"
    return f"page: {path}"


def _missing(folders: Sequence[Path], missing: Sequence[tuple[str, str, str]]) -> str:
    """Write the list to the first of `folders` that takes it."""
    for folder in folders:
        if not may_replace(folder / MISSING, {MISSING: MISSING_HEADER}):
            continue
        try:
            write_report(folder / MISSING, missing)
        except OSError:
            continue
        return f"missing images: {folder / MISSING}"
    return f"missing images: not listed, as {folders[0] / MISSING} cannot be written"
