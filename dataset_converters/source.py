"""Raw files, read once and line by line: where we are for messages, how far for progress, a digest for the manifest.

A line is a physical one, up to its ``\\n``, whatever its fields hold; each is a row or counted under a name.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import re
import stat
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from recbole_mllm.common.errors import UserError

_REPORT_EVERY = 1 << 20
_KEPT_REJECTS = 100_000
_MOST_LINES = 1_000  # of one quoted field; a longer one is a quote that was never closed
_SHOWN = 4_096  # bytes that tell what kind of file it is
_OPEN_QUOTE = "a quoted field does not end on its line"
_RETURN = "a carriage return (\\r) inside the line; lines end with \\n or \\r\\n"

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # titles of a megabyte are met in the wild


@dataclass(frozen=True, slots=True)
class Reject:
    """One line of raw input that was left out, and why."""

    file: str
    line: int
    reason: str


@dataclass(slots=True)
class RawFile:
    """An input as far as it is read, and what became of its lines.

    Attributes:
        line: Lines read so far.
        at: The line that messages name.
        first: How its first line begins that is not blank, to tell what it was where it cannot be read.
        headers, blank: Lines that are no rows.
        continued: Lines that are the rest of a row (``--multiline``).
        listed: Rows beyond the first, of lines that hold several.
        rejected: Rows left out, one of a line, but where a line holds several.
        digest: The SHA-256 of its bytes, once it is read.
    """

    path: Path
    size: int = 0
    digest: str = ""
    line: int = 0
    at: int = 0
    first: str = ""
    headers: int = 0
    blank: int = 0
    continued: int = 0
    listed: int = 0
    rejected: int = 0

    @property
    def rows(self) -> int:
        """Return how many rows the lines must have come to."""
        return self.line + self.listed - self.headers - self.blank - self.continued - self.rejected

    def parts(self) -> dict[str, int]:
        """Return what the lines are that are no rows of their own, each with its count."""
        named = {"header": self.headers, "blank": self.blank, "continued": self.continued, "left_out": self.rejected}
        return {name: count for name, count in named.items() if count}

    def sentence(self) -> str:
        """Return what became of the lines, in a sentence."""
        parts = "".join(f"{count:,} {name.replace('_', ' ')}, " for name, count in self.parts().items())
        several = " (several a line)" if self.listed else ""
        return f"{self.path.name}: {self.line:,} lines: {parts}{self.rows:,} rows{several}"


def check_lines(files: Iterable[RawFile], rows: int) -> None:
    """Check that every line of `files` is one of the `rows` that arrived, or counted under a name."""
    files = list(files)
    check_counts(f"rows of {'; '.join(raw.sentence() for raw in files)}", rows, sum(raw.rows for raw in files))


def check_counts(what: str, found: int, expected: int) -> None:
    """Check that a conversion lost nothing on the way.

    Raises:
        AssertionError: It did, and no input should make it: nothing is written then.
    """
    if found != expected:
        raise AssertionError(f"{found:,} {what}, but {expected:,} are accounted for; please report this")


@dataclass(slots=True)
class Intake:
    """Opens raw files and holds what was wrong with them.

    Args:
        skip_bad_rows: Leave out lines that cannot be read, and list them, instead of stopping at the first.
        progress: Called with the number of raw bytes read since the last call.
        encoding: Of files whose encoding is not known otherwise; None is UTF-8.
        multiline: Let quoted fields of tables span lines.
    """

    skip_bad_rows: bool = False
    progress: Callable[[int], None] = lambda count: None
    encoding: str | None = None
    multiline: bool = False
    files: list[RawFile] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)

    @property
    def file(self) -> RawFile:
        """Return the file that is being read."""
        return self.files[-1]

    @property
    def rejected(self) -> int:
        """Return how many rows of all files were left out."""
        return sum(raw.rejected for raw in self.files)

    def lines(self, path: Path, encoding: str | None = None) -> Iterator[str]:
        """Yield the lines of `path` (gzip where its name ends so) without their ends; a byte order mark is dropped.

        Raises:
            UserError: The file is missing, cannot be read, is damaged, or not in `encoding` (file and line are named).
        """
        with _opened(path) as plain:
            raw = RawFile(path, size=path.stat().st_size)
            self.files.append(raw)
            hashed = _Hashed(plain, self.progress)
            unpacked = gzip.GzipFile(fileobj=hashed) if path.suffix == ".gz" else hashed
            file = io.BufferedReader(unpacked, 1 << 20)
            encoding = encoding or self.encoding or "utf-8"
            try:
                _check_kind(path, file.peek(_SHOWN)[:_SHOWN], encoding)
                yield from (self._by_line if _ends_lines_in_a_byte(encoding) else self._by_stream)(raw, file, encoding)
                hashed.drain()
            except (EOFError, OSError, zlib.error) as error:
                raise UserError(f"{path}:{raw.line + 1}: cannot be read on: {error}; fetch the file again") from error
            raw.digest = hashed.digest()

    def _by_line(self, raw: RawFile, file: BinaryIO, encoding: str) -> Iterator[str]:
        for raw.line, line in enumerate(file, start=1):
            raw.at = raw.line
            line = line.removeprefix(codecs.BOM_UTF8) if raw.line == 1 else line
            raw.first = raw.first or line[:_SHOWN].decode("latin-1").strip()
            try:
                yield line.decode(encoding).rstrip("\r\n")
            except UnicodeError as error:
                self.refuse(_no_text(encoding, error))

    def _by_stream(self, raw: RawFile, file: BinaryIO, encoding: str) -> Iterator[str]:
        """Read what cannot be cut into lines before it is decoded, as UTF-16."""
        try:
            for raw.line, line in enumerate(io.TextIOWrapper(file, encoding, newline="\n"), start=1):
                raw.at = raw.line
                line = line.removeprefix("\ufeff") if raw.line == 1 else line
                raw.first = raw.first or line[:_SHOWN].strip()
                yield line.rstrip("\r\n")
        except UnicodeError as error:
            raise UserError(
                f"{raw.path}:{raw.line + 1}: no {encoding} text ({error}); give its own --encoding, such as utf-16-le"
            ) from None

    def table(
        self, path: Path, separator: str, encoding: str | None = None, quoted: bool = True
    ) -> Iterator[list[str]]:
        """Yield the rows of a table; where one character separates, fields may be `quoted`.

        A quoted field that does not end on its line costs that line alone: all behind it are read as rows of their own.
        With `multiline` it may continue, unless its row is refused: then its first line is left out, and the others are
        read as rows of their own.
        """
        lines = self.lines(path, encoding)
        if len(separator) > 1 or not quoted:
            yield from self._unquoted(lines, separator)
        else:
            yield from self._quoted(lines, separator)

    def _unquoted(self, lines: Iterator[str], separator: str) -> Iterator[list[str]]:
        for line in lines:
            if not line:
                self.file.blank += 1
            elif "\r" in line:
                self.refuse(_RETURN)
            else:
                yield line.split(separator)

    def _quoted(self, lines: Iterator[str], separator: str) -> Iterator[list[str]]:
        most = _MOST_LINES if self.multiline else 1
        why = f", nor within {most:,} lines" if self.multiline else " (give --multiline where fields may span lines)"
        again: deque[tuple[int, str]] = deque()  # read as a part of a row that was none

        def take() -> tuple[int, str] | None:
            if again:
                return again.popleft()
            line = next(lines, None)
            return None if line is None else (self.file.line, line)

        def each(taken: list[tuple[int, str]]) -> Iterator[str]:
            yield f"{taken[0][1]}\n"
            while len(taken) < most and (more := take()) is not None:
                taken.append(more)
                yield f"{more[1]}\n"
            raise csv.Error(f"{_OPEN_QUOTE}{why}")  # asked for more than there is

        while (start := take()) is not None:
            raw, line = self.file, start[1]
            raw.at = start[0]
            if not line:
                raw.blank += 1
                continue
            if '"' not in line and "\r" not in line:
                yield line.split(separator)
                continue
            taken = [start]
            try:
                row = next(csv.reader(each(taken), delimiter=separator))
                if len(taken) > 1:  # a stray quote may have found its match in another row
                    next(csv.reader((f"{part}\n" for _, part in taken), delimiter=separator, strict=True))
            except csv.Error as error:
                raw.at = start[0]
                self.refuse(_why_no_row(error, *(part for _, part in taken)))
            else:
                raw.at, before = start[0], raw.rejected  # an undecodable line may have been met on the way
                yield row
                if raw.rejected == before:
                    raw.continued += len(taken) - 1
                    continue
            again.extendleft(reversed(taken[1:]))

    def header(self) -> None:
        """Note that the row just read is a header."""
        self.file.headers += 1

    def refuse(self, reason: str) -> None:
        """Stop at the row that is being read, or note that it is left out.

        Raises:
            UserError: Unless `skip_bad_rows`.
        """
        raw = self.file
        if not self.skip_bad_rows:
            raise UserError(
                f"{raw.path}:{raw.at}: {reason}; fix the line, or leave such lines out with --skip-bad-rows"
            )
        raw.rejected += 1
        if len(self.rejects) < _KEPT_REJECTS:
            self.rejects.append(Reject(raw.path.name, raw.at, " ".join(reason.split())))


def _why_no_row(error: csv.Error, *lines: str) -> str:
    return _RETURN if any("\r" in line for line in lines) and "new-line" in str(error) else f"{error}"


def _opened(path: Path) -> BinaryIO:
    """Open a file for reading.

    Raises:
        UserError: There is none, or it cannot be read.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise UserError(f"{path} is {'a folder' if stat.S_ISDIR(mode) else 'no ordinary file'}; a file is expected")
        return path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} cannot be read: {why}") from None


def _check_kind(path: Path, start: bytes, encoding: str) -> None:
    """Refuse a file that is something else than text in an encoding like `encoding`.

    Raises:
        UserError: With what it is, and what to do.
    """
    if start.startswith(b"\x1f\x8b"):
        raise UserError(f"{path} is packed with gzip; let its name end in .gz, once for each time it is packed")
    if start.startswith(b"PK\x03\x04"):
        raise UserError(f"{path} is a zip archive; unpack it")
    if _ends_lines_in_a_byte(encoding) and b"\0" in start[:4]:
        raise UserError(
            f"{path} looks like UTF-16 or UTF-32; give --encoding utf-16 (without a byte order mark utf-16-le or "
            "utf-16-be, and likewise utf-32), or save it as UTF-8"
        )


def _ends_lines_in_a_byte(encoding: str) -> bool:
    return "\n".encode(encoding) == b"\n"


def _no_text(encoding: str, error: UnicodeError) -> str:
    where = f": {error.reason} at byte {error.start + 1}" if isinstance(error, UnicodeDecodeError) else ""
    utf8 = codecs.lookup(encoding).name == "utf-8"
    hint = "; where the file is Latin-1 or Windows-1252, give --encoding latin-1 or cp1252" if utf8 else ""
    return f"no {encoding} text{where}{hint}"


class _Hashed(io.RawIOBase):
    """Passes bytes through, hashing and counting them."""

    def __init__(self, file: BinaryIO, progress: Callable[[int], None]) -> None:
        self._file, self._progress, self._sha, self._unreported = file, progress, hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    # io's stubs take any buffer, and typing's BinaryIO has no readinto; what stands here are io's own classes
    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = self._file.readinto(buffer)  # type: ignore[attr-defined]
        self._sha.update(buffer[:count])
        self._unreported += count
        if self._unreported >= _REPORT_EVERY or not count:
            self._progress(self._unreported)
            self._unreported = 0
        return int(count)

    def drain(self) -> None:
        """Read what a decompressor left, so that the digest is the whole file's."""
        while self.read(1 << 20):
            pass

    def digest(self) -> str:
        return self._sha.hexdigest()


# What a column is called, in lower case; any other is called by its own name
_USUAL = {
    "user": "user_id user userid uid reviewerid session_id visitorid customer_id customer",
    "item": "item_id item itemid iid movieid video_id product_id asin article_id sku id",
    "time": "timestamp time date datetime ts unixreviewtime t_dat created_at",
    "rating": "rating ratings score stars overall",
    "title": "title titles name item_title product_title movie_title prod_name",
    "image": "image image_path img cover poster picture",
    "genres": "genres genre",
    "items": "items item_ids item_id_list item_id item history sequence",
}
USUAL = {what: tuple(names.split()) for what, names in _USUAL.items()}
_NUMBERS = ("time", "rating")


def _spellings(what: str) -> tuple[str, ...]:
    return USUAL.get(what, (what,))


def only_one(raw: Path, pattern: str, required: bool) -> Path | None:
    """Return the file in `raw` that matches `pattern`.

    Raises:
        UserError: There are several, or none and it is required.
    """
    found = sorted(path for path in raw.glob(pattern) if not path.name.startswith("."))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{raw} holds several {pattern} ({names}); leave one dataset in a folder of its own")
    if not found and required:
        raise UserError(f"{raw} holds no {pattern}; give the folder of the raw files as --raw")
    return found[0] if found else None


def folder_named(raw: Path, *words: str) -> Path | None:
    """Return the first subfolder of `raw` with one of `words` in its name, the words in order of preference."""
    folders = sorted(path for path in raw.iterdir() if path.is_dir())
    return next((path for word in words for path in folders if word in path.name.lower()), None)


def columns(rows: Iterator[list[str]], intake: Intake, *wanted: str) -> Iterator[list[str]]:
    """Yield the `wanted` cells of each row, in that order; each is a key of `USUAL`, or a column's name in lower case.

    A first line that names each of them is a header, and they stand where it says; else they are all there is, in
    that order, and the first line is a row like any other.

    Raises:
        UserError: The first line names some of them and cannot be a row, or was a header that cannot be read.
    """
    first = next(rows, None)
    if intake.file.rejected and is_header(re.split(r'[,;|\t:"]+', intake.file.first), wanted):
        raise UserError(f"{intake.file.path}:1: the names of the columns cannot be read; fix the line")
    if first is None:
        return
    places, width = named(first, wanted), len(first)
    if places is not None:
        intake.header()
    else:
        if is_header(first, wanted) and not _may_be_row(first, wanted):
            raise UserError(
                f"{intake.file.path}:{intake.file.at}: is this a header? name each of {', '.join(wanted)} once, as "
                f"{', '.join(_spellings(what)[0] for what in wanted)}; it holds {', '.join(first)[:200]!r}"
            )
        rows, places, width = chain([first], rows), list(range(len(wanted))), len(wanted)
    for row in rows:
        if len(row) == width:
            yield [row[place] for place in places]
        else:
            expected = ", ".join(wanted) if width == len(wanted) else f"{width}"
            intake.refuse(f"{len(row)} values where {expected} are expected")


def named(row: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    """Return the places of the `wanted` columns in `row` where it names each of them once, else None."""
    cells = [cell.strip().lower() for cell in row]
    found = [[place for place, cell in enumerate(cells) if cell in _spellings(what)] for what in wanted]
    return [places[0] for places in found] if all(len(places) == 1 for places in found) else None


def is_header(cells: Sequence[str], wanted: Sequence[str]) -> bool:
    """Return whether any of `cells` is a usual name of one of the `wanted` columns."""
    known = {name for what in wanted for name in _spellings(what)}
    return any(cell.strip().lower() in known for cell in cells)


def _may_be_row(row: Sequence[str], wanted: Sequence[str]) -> bool:
    numbers = (cell for cell, what in zip(row, wanted, strict=False) if what in _NUMBERS)
    return len(row) == len(wanted) and all(number(cell) is not None for cell in numbers)


NO_NUMBER = "is no decimal number within 64 bits"
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_WHOLE = re.compile(r"[+-]?[0-9]{1,4000}")  # Python turns no longer text into an int


def number(text: str) -> int | float | None:
    """Return a decimal number as an exact int, or a float where it has a point or an exponent; else None.

    What 64 bits do not hold is none, nor is what else Python takes for a number: ``nan``, ``inf``, ``1_000``, digits
    of other scripts.
    """
    if text.isdigit() and text.isascii() and len(text) < 19:
        return int(text)
    text = text.strip()
    if _DECIMAL.fullmatch(text) is None:
        return None
    return within_64_bits(int(text) if _WHOLE.fullmatch(text) else float(text))


def within_64_bits(value: Any) -> int | float | None:
    """Return `value` where it is a number (True and False are none) that an int64 holds, rounded or not; else None."""
    known = value.__class__ is int or value.__class__ is float
    return value if known and -(2**63) <= value < 2**63 else None


def moment(text: str) -> int | float | None:
    """Return a time: a number as it is, an ISO 8601 date as seconds since 1970 (UTC where it names no zone)."""
    text = text.strip()
    if _DECIMAL.fullmatch(text):  # also where it is too large: Python takes some rows of digits for dates
        return number(text)
    try:
        date = datetime.fromisoformat(text)
        seconds = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None
    return int(seconds) if seconds.is_integer() else seconds
