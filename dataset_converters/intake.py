"""Raw files, read once and line by line: where we are for messages, how far for progress, a digest for the manifest."""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from recbole_mllm.errors import UserError

_TOLD_EVERY = 1 << 20
_KEPT_REJECTS = 100_000

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # titles of a megabyte are met in the wild


@dataclass(frozen=True, slots=True)
class Reject:
    """One line of raw input that was left out, and why."""

    file: str
    line: int
    reason: str


@dataclass(slots=True)
class RawFile:
    """What is known of an input once it is read: `line` is where reading stands, `digest` the SHA-256 of its bytes."""

    path: Path
    line: int = 0
    size: int = 0
    digest: str = ""


@dataclass(slots=True)
class Intake:
    """Opens raw files and holds what was wrong with them.

    Args:
        skip_bad_rows: Leave out lines that cannot be read, and list them, instead of stopping at the first.
        told: Called with the number of raw bytes read since the last call.
    """

    skip_bad_rows: bool = False
    told: Callable[[int], None] = lambda count: None
    files: list[RawFile] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    rejected: int = 0

    def lines(self, path: Path, encoding: str = "utf-8") -> Iterator[str]:
        """Yield the lines of `path` (gzip where its name ends so) without their ends; a byte order mark is dropped.

        Raises:
            UserError: The file is missing, damaged, or not in `encoding` (file and line are named).
        """
        if not path.is_file():
            raise UserError(f"{path} does not exist")
        raw = RawFile(path, size=path.stat().st_size)
        self.files.append(raw)
        with path.open("rb") as plain:
            hashed = _Hashed(plain, self.told)
            unpacked = gzip.GzipFile(fileobj=hashed) if path.suffix == ".gz" else hashed
            try:
                yield from self._decoded(raw, io.BufferedReader(unpacked, 1 << 20), encoding)
            except (gzip.BadGzipFile, EOFError, OSError) as error:
                raise UserError(f"{path}:{raw.line + 1}: cannot be read on: {error}; fetch the file again") from error
            hashed.drain()
            raw.digest = hashed.digest()

    def _decoded(self, raw: RawFile, file: BinaryIO, encoding: str) -> Iterator[str]:
        for number, line in enumerate(file, start=1):
            raw.line = number
            if number == 1:
                if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise UserError(f"{raw.path} is UTF-16; save it as UTF-8 and try again")
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                yield line.decode(encoding).rstrip("\r\n")
            except UnicodeDecodeError as error:
                self.refuse(f"no {encoding} text: {error.reason} at byte {error.start}")

    def table(self, path: Path, separator: str, encoding: str = "utf-8") -> Iterator[list[str]]:
        """Yield the rows of a table; one-character separators allow quoted fields, which may span lines."""
        lines = self.lines(path, encoding)
        if len(separator) > 1:
            yield from (line.split(separator) for line in lines if line)
            return
        try:
            yield from (row for row in csv.reader((f"{line}\n" for line in lines), delimiter=separator) if row)
        except csv.Error as error:
            self.refuse(f"{error}")

    def refuse(self, reason: str) -> None:
        """Stop at the line that is being read, or note that it is left out.

        Raises:
            UserError: Unless `skip_bad_rows`.
        """
        raw = self.files[-1]
        if not self.skip_bad_rows:
            raise UserError(
                f"{raw.path}:{raw.line}: {reason}; mend the line, or leave such lines out with --skip-bad-rows"
            )
        self.rejected += 1
        if len(self.rejects) < _KEPT_REJECTS:
            self.rejects.append(Reject(raw.path.name, raw.line, reason))


class _Hashed(io.RawIOBase):
    """Passes bytes through, hashing and counting them."""

    def __init__(self, file: BinaryIO, told: Callable[[int], None]) -> None:
        self._file, self._told, self._sha, self._untold = file, told, hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    # io takes any buffer and BinaryIO has no readinto; what stands here are io's own classes, which pass memoryviews
    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = self._file.readinto(buffer)  # type: ignore[attr-defined]
        self._sha.update(buffer[:count])
        self._untold += count
        if self._untold >= _TOLD_EVERY or not count:
            self._told(self._untold)
            self._untold = 0
        return int(count)

    def drain(self) -> None:
        """Read what a decompressor left, so that the digest is the whole file's."""
        while self.read(1 << 20):
            pass

    def digest(self) -> str:
        return self._sha.hexdigest()
