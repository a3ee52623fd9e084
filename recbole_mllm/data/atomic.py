"""RecBole's atomic files: one sanitiser, one writer, one reader; a file is whole or absent.

RecBole reads with ``pd.read_csv(engine="python")`` and default quoting (data/dataset/dataset.py:486). So a value that
starts with ``"`` loses its quotes or swallows the lines behind it, a line break makes a row more, and a value beyond
the ``csv`` module's field limit, which our import raises, stops the reading; inner quotes, spaces and any other
character stay.
"""

from __future__ import annotations

import csv
import errno
import os
import re
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.files import whole_file

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

MAX_CHARACTERS = 16_777_216  # what RecBole's reader may take (recbole_patches/libraries.py); more is no text
MAX_ID_CHARACTERS = 1_000  # RecBole keeps ids in a numpy array, where each takes the room of the longest
PAD = "[PAD]"  # RecBole's own token for id 0 (data/dataset/dataset.py:1213)

# Cc control, Cf format (zero-width marks, bidirectional controls, tags), Co private use (prompts mark filled-in texts
# with it), Cs lone surrogates
_UNWANTED = {"Cc", "Cf", "Co", "Cs"}
_JOINERS = "\u200c\u200d"  # spelling in Persian and Indic words, one picture out of several in emoji
_SPACES = re.compile(r"\s+")
_JOINED = re.compile(f"[{_JOINERS}]{{2,}}")
_JOINED_SPACES = re.compile(rf"[{_JOINERS}]?\s[\s{_JOINERS}]*")
_QUOTES = "\"'"
_EDGES = ("", " ", *_QUOTES)
_UNITS = (1e9, 1e6, 1e3)  # a second in nanoseconds, microseconds, milliseconds
_A_DATE = 1e8  # seconds since 1970: March 1973; less is a small number rather than a date
_DAY = 86_400.0
_ORDINARY_ID = re.compile(r"[!#-Z\\-~][!-~]{0,999}")

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
    line_number = 1
    try:
        with whole_file(path) as file:
            file.write(header + "\n")
            for line_number, row in enumerate(rows, start=2):
                line = "\t".join(row)
                if line.count("\t") != len(types) - 1 or not _is_plain(line):
                    _refuse(path, line_number, list(types), row)
                try:
                    file.write(line + "\n")
                except UnicodeEncodeError:
                    _refuse(path, line_number, list(types), row)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise UserError(
            f"{path} cannot be written ({error.strerror}); make room on the disk (or raise the quota) and repeat the "
            "command; an earlier file is unchanged"
        ) from error
    return line_number - 1


def _is_plain(line: str) -> bool:
    # no value can be at fault, but for a lone surrogate
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
    return (row for _, row in read_numbered(path))


def read_numbered(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield each row as `read_atomic` does, with the number of its line; the header is line 1."""
    names = list(read_columns(path))
    return ((number, dict(zip(names, values, strict=True))) for number, values in read_values(path))


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
    csv.field_size_limit(2**31 - 1)  # as for RecBole's reader (recbole_patches/libraries.py)
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
    encoding = encoding or "utf-8"
    try:
        if not path.is_file():
            there = os.path.lexists(path)
            raise UserError(f"{path} is no file; put one in its place" if there else f"{path} does not exist")
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                wide = "it looks like UTF-16; save it as UTF-8" if number == 1 and b"\0" in raw else ""
                try:
                    line = raw.decode(encoding).removesuffix("\n").removesuffix("\r")
                except UnicodeDecodeError as error:
                    what = f"byte {error.start + 1} is no {encoding.upper()}"
                    raise UserError(f"{path}:{number}: {what}; {wide or 'save the file as UTF-8'}") from None
                if "\0" in line:
                    raise UserError(f"{path}:{number}: a NUL byte inside the line; {wide or 'remove it'}")
                if "\r" in line:
                    hint = "remove it, or end all lines in line feeds"
                    raise UserError(f"{path}:{number}: a carriage return inside the line; {hint}")
                yield number, line.removeprefix("\ufeff") if number == 1 else line
    except LookupError:
        raise UserError(
            f"there is no encoding {encoding!r}; leave the key encoding out where files are UTF-8"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


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


def clean(text: str) -> str:
    """Return `text` as it may stand in an atomic file: one line, no control or invisible character, no leading quote.

    Letters of any script, emoji with their joiners and inner quotes stay; white space becomes single spaces. Cleaning
    twice changes nothing. A title that is fit already is returned as it is.
    """
    if text.isprintable() and "  " not in text and text[:1] not in _EDGES and text[-1:] != " ":
        return text  # printable: no control, format, private or surrogate character, and no space but U+0020
    unwanted = {c for c in set(text) if unicodedata.category(c) in _UNWANTED and not c.isspace() and c not in _JOINERS}
    cleaned = text.translate(dict.fromkeys(map(ord, unwanted))) if unwanted else text
    if "\u200c" in cleaned or "\u200d" in cleaned:
        cleaned = _JOINED_SPACES.sub(" ", _JOINED.sub(lambda run: run[0][0], cleaned))
    return _without_leading_quotes(_SPACES.sub(" ", cleaned).strip(" " + _JOINERS))


def _without_leading_quotes(text: str) -> str:
    # and at the end without the one that would be left without its partner
    bare = text.lstrip(_QUOTES + " " + _JOINERS)
    if text.startswith('"') and bare.endswith('"') and bare.count('"') % 2:
        return bare[:-1].rstrip(" " + _JOINERS)
    return bare


def id_fault(text: str) -> str | None:
    """Return why RecBole cannot take `text` for an id, or None; `id_problem` is stricter, for ids that we write."""
    if not text:
        return "is empty"
    if text == PAD:
        return f"is {PAD}, which RecBole reserves"
    if len(text) > MAX_ID_CHARACTERS:
        return f"has {len(text):,} characters, more than {MAX_ID_CHARACTERS:,}"
    return None


def id_problem(text: str) -> str | None:
    """Return why `text` cannot be an id, or None where RecBole's reader and ours both keep it as it is, as a ``token``.

    Inner spaces are kept, but in a ``token_seq`` (a history) they would make two ids of one: see `word_problem`.
    """
    if _ORDINARY_ID.fullmatch(text):
        return None
    if (problem := id_fault(text) or value_problem(text)) is not None:
        return problem
    if text[0] == "\ufeff":  # files strung together: the same id would be two
        return "starts with a byte order mark"
    if text != text.strip():
        return "starts or ends with white space"
    control = next((c for c in text if unicodedata.category(c) == "Cc"), None)
    return None if control is None else f"holds the control character U+{ord(control):04X}"


def word_problem(text: str) -> str | None:
    """Return why `text` cannot be an id inside a ``token_seq`` such as ``item_id_list``, or None."""
    return "holds a space, which separates ids in a token_seq" if " " in text else id_problem(text)


def value_problem(text: str) -> str | None:
    """Return why `text` cannot be a value of any column, or None."""
    if text.startswith('"'):
        return "starts with a quote"
    if "\t" in text or "\n" in text or "\r" in text:
        return "holds a tab or newline"
    if "\0" in text:
        return "holds a NUL character"
    if len(text) > MAX_CHARACTERS:
        return f"has {len(text):,} characters, more than the {MAX_CHARACTERS:,} that RecBole's reader takes"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "holds a lone surrogate, which UTF-8 cannot write"
    return None


def impossible_times(times: ArrayLike) -> tuple[int, int]:
    """Return how many of `times` are at or before the first second of 1970, and how many lie after tomorrow.

    Args:
        times: ``[N]`` numbers since 1970, in seconds, milliseconds or finer: what most of them are is seen from their
            size. NaN counts as neither. Places in an order (whole numbers from 0 to at most N) are no dates: (0, 0).
    """
    early, late = find_impossible_times(times)
    return int(early.sum()), int(late.sum())


def find_impossible_times(times: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return two masks ``[N]`` of `times`: those at or before 1970, those after tomorrow (see `impossible_times`)."""
    values = np.asarray(times, np.float64)
    early = values <= 0
    positive = values[values > 0]
    if not positive.size or (not (values < 0).any() and positive.max() <= len(values)):
        none = np.zeros(len(values), bool)
        return (none if positive.size else early), none
    typical = float(np.median(positive))
    unit = next((unit for unit in _UNITS if typical >= unit * _A_DATE), 1.0)
    return early, values > (time.time() + _DAY) * unit
