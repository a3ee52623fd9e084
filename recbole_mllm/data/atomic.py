"""RecBole's atomic files: one sanitiser, one writer, one reader; a file is whole or absent."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from recbole_mllm.data.values import MAX_CHARACTERS, clean, id_problem, value_problem, word_problem
from recbole_mllm.errors import UserError
from recbole_mllm.files import whole_file

__all__ = [
    "clean", "id_problem", "read_atomic", "read_columns", "read_numbered", "read_values", "value_problem",
    "whole_file", "word_problem", "write_atomic",
]  # fmt: skip

TYPES = ("token", "token_seq", "float", "float_seq")
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


def read_columns(path: Path) -> dict[str, str]:
    """Return the file's columns, ``{name: type}``, in order."""
    for _, line in _lines(path):
        return _columns(path, line)
    raise UserError(f"{path} is empty; its first line must name the columns, such as user_id:token")


def read_values(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield each row as its line number and its values in the order of the columns: the quickest way to read."""
    width = len(read_columns(path))
    lines = _lines(path)
    next(lines)
    for number, line in lines:
        if not line:
            continue
        values = line.split("\t")
        if len(values) != width:
            raise UserError(f"{path}:{number}: {len(values)} values for {width} columns; check for stray tabs")
        yield number, values


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    with file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode()
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: byte {error.start + 1} is no UTF-8; save it as UTF-8") from None
            line = line.removesuffix("\n").removesuffix("\r")
            if "\0" in line or "\r" in line:
                what = "NUL byte" if "\0" in line else "carriage return"
                raise UserError(f"{path}:{number}: a {what} inside the line; remove it")
            yield number, line.removeprefix("\ufeff") if number == 1 else line


def _columns(path: Path, header: str) -> dict[str, str]:
    columns: dict[str, str] = {}
    for column in header.split("\t"):
        name, _, kind = column.partition(":")
        if not name or kind not in TYPES:
            raise UserError(
                f"{path}:1: {column[:60]!r} is no column; write name:type, where type is one of {', '.join(TYPES)}"
            )
        if name in columns:
            raise UserError(f"{path}:1: two columns are called {name}; RecBole needs each name once")
        columns[name] = kind
    return columns
