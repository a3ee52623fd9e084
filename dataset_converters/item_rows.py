"""The ``.item`` file: one row for each item that was interacted with, whatever is known of it, and its image."""

from __future__ import annotations

import hashlib
import os
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from filecmp import cmp
from http.client import HTTPException
from pathlib import Path
from typing import IO, NamedTuple

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.files import bring, sweep_scratch, whole_file
from recbole_mllm.data import schema
from recbole_mllm.data.atomic import clean, write_atomic
from recbole_mllm.data.images import IMAGES, SUFFIXES, problem, resolve, write_report

from .source import Intake

MISSING = "missing_images.tsv"
_SAFE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
_BLANK = re.compile(r"\s")
_AT_A_TIME = 4096
_DOWNLOADS = 16  # at once
URLS = "image_urls.tsv"

# Given a URL and a path without its suffix, put the image there; return the path with its suffix, or None and why not
Fetch = Callable[[str, Path], tuple[Path | None, str]]


class ItemRow(NamedTuple):
    """What a source knows of an item: `image` is a path below the images' folder, or "" where the id names the file."""

    item: str
    title: str
    image: str = ""
    features: tuple[str, ...] = ()
    url: str = ""


@dataclass(slots=True)
class Catalog:
    """Counts of what became of the items."""

    items: int = 0
    described: int = 0
    without_metadata: int = 0
    without_title: int = 0
    with_image: int = 0
    broken_images: int = 0
    unused: int = 0
    repeated: int = 0


def safe_name(item: str) -> str:
    """Return a file name for `item` that cannot leave its folder: the id where it is plain, else a digest of it."""
    return item if _SAFE.fullmatch(item) else hashlib.sha256(item.encode()).hexdigest()[:32]


def plain_rows(
    rows: Iterable[ItemRow], wanted: Iterable[str], width: int, catalog: Catalog, intake: Intake
) -> Iterator[ItemRow]:
    """Yield one row for each wanted item: the first that names it, else an empty one; count the rest.

    Raises:
        UserError: An item is described twice in different words (file and line are named).
    """
    left = dict.fromkeys(wanted)
    seen: dict[str, int] = {}
    for row in rows:
        if row.item in left:
            del left[row.item]
            catalog.described += 1
            title = clean(row.title)
            seen[row.item] = hash((title, row.image, row.url))
            catalog.without_title += not title
            yield row._replace(title=title, features=tuple(clean(f) for f in row.features))
        elif row.item in seen:
            if seen[row.item] != hash((clean(row.title), row.image, row.url)):
                intake.refuse(f"item {row.item[:60]!r} is described a second time, with another title or image")
            else:
                catalog.repeated += 1
        else:
            catalog.unused += 1
    catalog.without_metadata = len(left)
    catalog.without_title += len(left)
    yield from (ItemRow(item, "", "", ("",) * width) for item in left)


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Where images come from: a folder whose files are found by name or by item id, and URLs where `fetch` is given."""

    folder: Path | None
    by_id: Mapping[str, Path] = field(default_factory=dict)
    fetch: Fetch | None = None

    @classmethod
    def of(cls, folder: Path | None, fetch: Fetch | None = None) -> ImageSource:
        """Look into `folder` once, so that a million items are found without asking the disk for each."""
        if folder is None:
            return cls(None, {}, fetch)
        try:
            files = sorted((p for p in _entries(folder) if p.suffix.lower() in SUFFIXES), key=lambda p: p.name)
        except OSError as error:
            raise UserError(f"the images' folder {folder} cannot be read: {error.strerror}") from None
        by_id: dict[str, Path] = {}
        for path in files:
            by_id.setdefault(path.stem, path)
        return cls(folder, by_id, fetch)

    def find(self, row: ItemRow) -> tuple[Path | None, str]:
        """Return the file of the item's image, or None and why there is none ("" where none was promised)."""
        if self.folder is None:
            return None, ""
        if not row.image and row.item not in self.by_id:
            return None, f"no file named by the item id in {self.folder.name}"
        name = row.image or self.by_id[row.item].name
        path, trouble = resolve(self.folder, name)
        return (path, "") if trouble is None else (None, f"{name} {trouble}")


def _entries(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        # a link first: what it leads to is looked at when it is opened, and it may lead to itself
        yield from (Path(entry.path) for entry in entries if entry.is_symlink() or entry.is_file())


def write_items(
    folder: Path,
    rows: Iterable[ItemRow],
    features: Mapping[str, str],
    source: ImageSource,
    home: Path,
    catalog: Catalog,
    earlier: Set[str] = frozenset(),
) -> None:
    """Write ``X.item`` into `folder`, and images that open below ``home/images``; name those that do not open.

    Another image of the same name there is replaced where it is one of `earlier`, which a conversion has put there.
    """
    if (home / IMAGES).is_dir():
        sweep_scratch(home / IMAGES)
    types = {**schema.ITEM_TYPES, **features}
    missing: list[tuple[str, str, str]] = []
    write_atomic(schema.item_file(folder), types, _with_images(home, rows, source, catalog, missing, earlier))
    if missing:
        write_report(folder / MISSING, missing)


def _with_images(
    home: Path,
    rows: Iterable[ItemRow],
    source: ImageSource,
    catalog: Catalog,
    missing: list[tuple[str, str, str]],
    earlier: Set[str],
) -> Iterator[tuple[str, ...]]:
    with ThreadPoolExecutor(_DOWNLOADS if source.fetch else os.cpu_count()) as pool:
        for batch in _batches(rows):
            placed = pool.map(lambda row: _place(home, row, source, earlier), batch)
            for row, (name, reason) in zip(batch, placed, strict=True):
                catalog.items += 1
                catalog.with_image += bool(name)
                if reason:
                    catalog.broken_images += 1
                    missing.append((row.item, row.image, reason))
                yield row.item, row.title, name, *row.features


def _batches(rows: Iterable[ItemRow]) -> Iterator[list[ItemRow]]:
    batch: list[ItemRow] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _AT_A_TIME:
            yield batch
            batch = []
    yield batch


def _place(home: Path, row: ItemRow, source: ImageSource, earlier: Set[str]) -> tuple[str, str]:
    """Put the item's image into the dataset's folder; return its name there, or "" and why it has none.

    Raises:
        UserError: Another image of that name is there, and not of `earlier`.
    """
    path, reason = source.find(row)
    if path is None and row.url and source.fetch is not None:
        path, reason = source.fetch(row.url, home / IMAGES / safe_name(row.item))
    if path is None:
        return "", reason
    trouble = problem(path)
    if trouble is not None:
        return "", trouble
    name = f"{IMAGES}/{safe_name(row.item)}{path.suffix.lower()}"
    target = home / name
    there = os.path.lexists(target)
    if there and not target.is_symlink() and (path.samefile(target) or cmp(path, target, shallow=False)):
        return name, ""
    if there and target.name not in earlier:
        raise UserError(f"{target} is another image than {path}, and not of the last conversion; move it away")
    bring(path.resolve(), target)
    return name, ""


def noting_urls(rows: Iterable[ItemRow], file: IO[str]) -> Iterator[ItemRow]:
    """Pass `rows` on, writing the URL of each item's image to `file`, so that it is known without the raw data."""
    file.write("item_id\turl\n")
    for row in rows:
        if row.url and not _BLANK.search(row.url):
            file.write(f"{row.item}\t{row.url}\n")
        yield row


_SUFFIXES = {"image/jpeg": ".jpg", "image/jpg": ".jpg", "image/png": ".png", "image/webp": ".webp"}
_AGAIN = {408, 425, 429, 500, 502, 503, 504}


class _Final(Exception):
    """Trying again would not help."""


@dataclass(frozen=True, slots=True)
class Downloader:
    """Fetches one image a call; any number of threads may call.

    Args:
        tries: Attempts at one image.
        timeout_s: Seconds without an answer after which an attempt has failed.
        wait_s: Seconds before the second attempt; doubled before each further one, and shaken by up to half.
        max_bytes: A larger answer is refused, whatever length it announces.
    """

    tries: int = 4
    timeout_s: float = 20.0
    wait_s: float = 1.0
    max_bytes: int = 20_000_000

    def __call__(self, url: str, stem: Path) -> tuple[Path | None, str]:
        """Put the image of `url` at `stem` plus its suffix, unless it is there; return its path, or None and why."""
        for suffix in dict.fromkeys(_SUFFIXES.values()):
            there = stem.with_name(stem.name + suffix)
            if there.is_file() and problem(there) is None:
                return there, ""
        reason = ""
        for attempt in range(self.tries):
            if attempt:
                time.sleep(self.wait_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
            try:
                return self._fetch(url, stem), ""
            except _Final as error:
                return None, str(error)
            except (OSError, HTTPException, ValueError) as error:
                reason = f"{url}: {error}"
        return None, f"{reason} (after {self.tries} attempts)"

    def _fetch(self, url: str, stem: Path) -> Path:
        if not url.startswith(("http://", "https://")):
            raise _Final(f"{url[:80]} is no http address")
        request = urllib.request.Request(url, headers={"User-Agent": "recbole-mllm", "Accept": "image/*"})
        try:  # a redirect leads to no file of this machine: urllib follows none but to http, https and ftp
            with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
                kind, announced = answer.headers.get_content_type(), answer.headers.get("Content-Length")
                body = answer.read(self.max_bytes + 1) if kind in _SUFFIXES else b""
        except urllib.error.HTTPError as error:
            if error.code in _AGAIN:
                raise
            raise _Final(f"{url}: the server answers {error.code}") from error
        if kind not in _SUFFIXES:
            raise _Final(f"{url}: the server sends {kind}, not a jpeg, png or webp image")
        if len(body) > self.max_bytes:
            raise _Final(f"{url}: more than {self.max_bytes:,} bytes")
        if announced is not None and announced.isdigit() and len(body) != int(announced):
            raise OSError(f"{len(body)} bytes of {announced}")
        target = stem.with_name(stem.name + _SUFFIXES[kind])
        with whole_file(target, binary=True, sweep=False) as file:
            file.write(body)
            file.flush()
            if (trouble := problem(Path(file.name))) is not None:
                raise _Final(f"{url}: {trouble}")
        return target
