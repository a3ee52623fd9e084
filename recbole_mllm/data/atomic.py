"""RecBole's atomic files: one sanitiser, one writer, one reader; a file is whole or absent."""

from __future__ import annotations

import codecs
import csv
import errno
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import BinaryIO

from recbole_mllm.data.values import MAX_CHARACTERS, clean, id_problem, value_problem, word_problem
from recbole_mllm.errors import UserError
from recbole_mllm.files import whole_file

__all__ = [
    "clean", "id_problem", "read_atomic", "read_columns", "read_numbered", "read_values", "unquoted",
    "value_problem", "whole_file", "word_problem", "write_atomic",
]  # fmt: skip

TYPES = ("token", "token_seq", "float", "float_seq")
_LONGEST_LINE = 1 << 28  # bytes; what has no line end for so long is no table
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


def write_atomic(path: Path, types: Mapping[str, str], rows: Iterable[Sequence[str]]) -> int:
    """Write `rows` with RecBole's ``name:type`` header; return how many.

    Raises:
        UserError: RecBole's reader or ours would not give a value back as it is (see `value_problem`), a row has too
            many or too few values, a type is none of RecBole's, or the disk is full. Nothing is written then.
    """
    header = "\t".join(f"{name}:{kind}" for name, kind in types.items())
    _columns(path, header)
    tabs = len(types) - 1
    line_number = 1
    with _room_for(path), whole_file(path) as file:
        file.write(header + "\n")
        for line_number, row in enumerate(rows, start=2):
            line = "\t".join(row)
            if line.count("\t") != tabs or not _is_plain(line):
                _refuse(path, line_number, list(types), row)
            try:
                file.write(line + "\n")
            except UnicodeEncodeError:
                _refuse(path, line_number, list(types), row)
    return line_number - 1


@contextmanager
def _room_for(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise UserError(
            f"{path} cannot be written ({error.strerror}); make room on the disk (or raise the quota) and repeat the "
            "command; an earlier file is kept as it was"
        ) from error


def _is_plain(line: str) -> bool:
    """Return whether no value of `line` can be at fault, but for a lone surrogate."""
    if '"' in line and (line[0] == '"' or '\t"' in line):
        return False
    return line.strip() != "" and len(line) <= MAX_CHARACTERS and not ("\n" in line or "\r" in line or "\0" in line)


def _refuse(path: Path, line: int, names: Sequence[str], row: Sequence[str]) -> None:
    """Raise the reason why `row` cannot be written; return where only the line's length looked suspicious."""
    where = f"{path}:{line}"
    if len(row) != len(names):
        raise UserError(f"{where}: {len(row)} values for {len(names)} columns, in {str(row)[:120]}")
    for name, value in zip(names, row, strict=True):
        if (problem := value_problem(value)) is not None:
            raise UserError(f"{where}: {name} {problem}: {value[:60]!r}")
    if len(names) == 1 and not row[0].strip():
        raise UserError(f"{where}: {names[0]} is empty, and RecBole skips empty lines")


def read_atomic(path: Path) -> Iterator[dict[str, str]]:
    """Yield each row of an atomic file as ``{name: value}``; quotes are characters like any other.

    A byte order mark, CRLF and a missing last newline do no harm; empty lines are skipped, as RecBole skips them.

    Raises:
        UserError: The file cannot be read, its header is none of RecBole's, or a line has too many or too few values,
            a NUL or is no UTF-8 (file and line are named).
    """
    for _, row in read_numbered(path):
        yield row


def read_numbered(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield each row as `read_atomic` does, with the number of its line; the header is line 1."""
    names = list(read_columns(path))
    for number, values in read_values(path):
        yield number, dict(zip(names, values, strict=True))


def read_columns(path: Path, separator: str = "\t", encoding: str | None = None) -> dict[str, str]:
    """Return the file's columns, ``{name: type}``, in order."""
    for _, line in _lines(path, encoding):
        return _columns(path, line, separator)
    first = "item_id" if path.suffix == ".item" else "user_id"
    raise UserError(f"{path} is empty; its first line must name the columns, such as {first}:token")


def read_values(
    path: Path, separator: str = "\t", encoding: str | None = None, *, quotes: bool = False
) -> Iterator[tuple[int, list[str]]]:
    """Yield each row as its line number and its values in the order of the columns: the quickest way to read.

    With `quotes` a value that starts with a quote is what RecBole makes of it (`unquoted`).
    """
    width = len(read_columns(path, separator, encoding))
    lines = _lines(path, encoding)
    next(lines)
    for number, line in lines:
        if not line:
            continue
        values = line.split(separator)
        if quotes and '"' in line and any(value[:1] == '"' for value in values):
            values = unquoted(path, number, line, separator)
        if len(values) != width:
            what = f"{len(values)} values for {width} columns"
            raise UserError(f"{path}:{number}: {what}; check for stray {_name(separator)}")
        yield number, values


def _name(separator: str) -> str:
    return "tabs" if separator == "\t" else repr(separator)


def unquoted(path: Path, number: int, line: str, separator: str = "\t") -> list[str]:
    """Return the values of a line as RecBole's reader does, which takes quotes off that enclose a value.

    Raises:
        UserError: A quote that opens a value closes none: that reader would refuse the file, or take the lines behind
            for a part of the value.
    """
    csv.field_size_limit(2**31 - 1)  # as compat/frames.py sets it for RecBole's reader
    try:
        return next(csv.reader([line], delimiter=separator, strict=True))
    except csv.Error:
        value = next(value for value in line.split(separator) if value[:1] == '"')
        raise UserError(
            f"{path}:{number}: a value starts with a quote that does not close at its end: {value[:60]!r}; remove the "
            "quote (one inside a value does no harm)"
        ) from None


def _lines(path: Path, encoding: str | None = None) -> Iterator[tuple[int, str]]:
    """Yield each line, with its number, less its end; UTF-8 unless another `encoding` is given."""
    if not path.is_file():
        there = os.path.lexists(path)
        raise UserError(f"{path} is no file; put one in its place" if there else f"{path} does not exist")
    try:
        with path.open("rb") as file:
            yield from _decoded(path, file, encoding or "utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _decoded(path: Path, file: BinaryIO, encoding: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of `file`; it is read by bytes where that tells which line cannot be decoded."""
    try:
        wide = codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))
    except LookupError:
        raise UserError(
            f"there is no encoding {encoding!r}; leave the key encoding out where files are UTF-8"
        ) from None
    text = io.TextIOWrapper(file, encoding, newline="\n") if wide else None
    for number in count(1):
        try:
            raw = text.readline(_LONGEST_LINE + 1) if text else file.readline(_LONGEST_LINE + 1)
            line = raw.decode(encoding) if isinstance(raw, bytes) else raw
        except UnicodeDecodeError as error:
            hint = "it looks like UTF-16; save it" if number == 1 and error.object[:2] in _UTF_16 else "save the file"
            raise UserError(
                f"{path}:{number}: byte {error.start + 1} is no {encoding.upper()}; {hint} as UTF-8"
            ) from None
        if not raw:
            return
        if len(raw) > _LONGEST_LINE:
            raise UserError(f"{path}:{number}: a line of more than {_LONGEST_LINE:,} bytes; is it a table of text?")
        line = line.removesuffix("\n").removesuffix("\r")
        if "\0" in line:
            hint = "it looks like UTF-16; save it as UTF-8" if number == 1 else "remove it"
            raise UserError(f"{path}:{number}: a NUL byte inside the line; {hint}")
        if "\r" in line:
            hint = "remove it, or end all lines in line feeds"
            raise UserError(f"{path}:{number}: a carriage return inside the line; {hint}")
        yield number, line.removeprefix("\ufeff") if number == 1 else line


def _columns(path: Path, header: str, separator: str = "\t") -> dict[str, str]:
    columns: dict[str, str] = {}
    for column in header.split(separator):
        name, _, kind = column.partition(":")
        if not name or kind not in TYPES:
            hint = f", {_name(separator)} between columns" if column == header and re.search("[\t,;|]", header) else ""
            raise UserError(
                f"{path}:1: {column[:60]!r} is no column; write name:type{hint}, where type is one of "
                f"{', '.join(TYPES)}"
            )
        if name in columns:
            raise UserError(f"{path}:1: two columns are called {name}; RecBole needs each name once")
        columns[name] = kind
    return columns
