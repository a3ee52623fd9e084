"""Atomic files through pandas' C parser, where it provably gives the frame its Python parser gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

_SEPARATORS = ("\t", ",", ";", "|")
_ENCODINGS = ("utf-8", "utf8", "ascii")
_BLOCK = 1 << 24
_LONGEST = 1 << 16  # bytes of a line; Python's csv module refuses a field of 131,072 characters unless told
_EXACT = 2.0**53


_ASKED = {"delimiter", "usecols", "dtype", "encoding", "engine"}
_OF_COMPAT = {"na_values", "keep_default_na"}


class _Pandas(ModuleType):
    """pandas as data/dataset/dataset.py sees it: ``read_csv`` is another, the rest its own."""

    def __init__(self, pandas: Any) -> None:
        super().__init__("pandas")
        self._pandas = pandas

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pandas, name)

    def read_csv(self, path: Any, **options: Any) -> Any:
        """Read as RecBole asks (data/dataset/dataset.py:486-493), by the faster way where that is the same."""
        known = set(options) >= _ASKED and set(options) <= _ASKED | _OF_COMPAT
        frame = read_fast(path, **options) if known else None
        return self._pandas.read_csv(path, **options) if frame is None else frame


def install(dataset: ModuleType) -> None:
    """Let data/dataset/dataset.py:486 read by C what it reads by ``engine="python"``.

    Below what compat/frames.py puts in the same place, which says what counts as missing.
    """
    dataset.pd = _Pandas(dataset.pd)  # type: ignore[attr-defined]


def read_fast(
    path: Any, *, delimiter: str, dtype: dict[str, Any], encoding: str | None, engine: str, **options: Any
) -> Any:
    """Return the frame that this call gives, text columns with dtype object; None where that is not certain."""
    import pandas as pd

    known = delimiter in _SEPARATORS and str(encoding or "utf-8").lower() in _ENCODINGS and engine == "python"
    if not known or not scan(Path(path), delimiter).plain:
        return None
    kinds = {name: object if kind is str else kind for name, kind in dtype.items()}
    # `high` is the Python parser's own precision; without `low_memory` equal texts are one object
    how = {"engine": "c", "float_precision": "high", "low_memory": False}
    try:
        frame = pd.read_csv(path, delimiter=delimiter, dtype=kinds, encoding=encoding, **options, **how)
    except ValueError:  # pandas' parser errors are ValueErrors too; the other parser words its own
        return None
    if any(kind is not str and _parsed_apart(frame[name].to_numpy()) for name, kind in dtype.items()):
        return None
    return frame


def _parsed_apart(values: Any) -> bool:
    """Return whether some number may come out otherwise of a parser that first reads a column as whole numbers.

    Those are -0 and what is beyond 53 bits.
    """
    return bool(((np.abs(values) >= _EXACT) | (np.signbit(values) & (values == 0))).any())


class Scan(NamedTuple):
    """What the bytes of a file say: whether it is `plain`, and the shortest and longest value of each column, in bytes.

    Plain: every line has as many fields as the first, two or more, and nothing the two parsers read apart. That is
    quotes, carriage returns, NULs, a byte order mark, repeated names, lines that begin with a space and very long ones.
    """

    plain: bool
    shortest: tuple[int, ...] = ()
    longest: tuple[int, ...] = ()


_KNOWN: dict[tuple[Path, str], Scan] = {}


@contextmanager
def known(path: Path, delimiter: str, found: Scan) -> Iterator[None]:
    """Let `scan` answer with `found` for a while, in which `path` is read, without looking at its bytes again."""
    _KNOWN[path, delimiter] = found
    try:
        yield
    finally:
        del _KNOWN[path, delimiter]


def scan(path: Path, delimiter: str) -> Scan:
    """Look at every byte of a file once, as arrays."""
    if (path, delimiter) in _KNOWN:
        return _KNOWN[path, delimiter]
    separator = delimiter.encode()
    with path.open("rb") as file:
        header = file.readline(_LONGEST + 1).rstrip(b"\n")
    fields = header.split(separator)
    if len(separator) != 1 or len(fields) < 2 or len(set(fields)) < len(fields) or header.startswith(b"\xef\xbb\xbf"):
        return Scan(False)
    lines, bounds = 0, []
    for block in _blocks(path):
        found = _lengths(block, separator[0], len(fields) - 1)
        if found is None:
            return Scan(False)
        if lines == 0:
            found = found[1:]  # the header's own
        if len(found):
            bounds.append((found.min(axis=0), found.max(axis=0)))
        lines += block.count(b"\n")
    if lines < 2:
        return Scan(False)
    low, high = (np.array(each) for each in zip(*bounds, strict=True))
    return Scan(True, tuple(low.min(axis=0).tolist()), tuple(high.max(axis=0).tolist()))


def _blocks(path: Path) -> Iterator[bytes]:
    """Yield the file in blocks of whole lines; a line beyond all measure comes in parts, and nothing behind it."""
    rest = b""
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            whole, newline, tail = (rest + block).rpartition(b"\n")
            rest = tail
            if newline:
                yield whole + newline
            if len(rest) > _LONGEST:
                break
    if rest:
        yield rest + b"\n"


def _lengths(block: bytes, separator: int, separators: int) -> Any:
    """Return the length of each field, ``[lines, separators + 1]``; None unless each line has `separators` of them.

    None too where a byte asks for care, or an id that is RecBole's own.
    """
    if b"[PAD]" in block:
        return None
    array = np.frombuffer(block, np.uint8)
    control = array[array < 0x23]  # few: line ends, tabs and spaces
    if np.isin(control, [0x00, 0x0D, 0x22]).any():
        return None
    ends = np.flatnonzero(array == 0x0A)
    starts = np.r_[0, ends[:-1] + 1]
    if (array[starts] == 0x20).any() or (ends - starts).max() > _LONGEST:
        return None
    places = np.flatnonzero(array == separator)
    if len(places) != separators * len(ends):
        return None
    table = places.reshape(-1, separators)
    if not ((table[:, 0] >= starts).all() and (table[:, -1] < ends).all()):
        return None
    return np.diff(np.column_stack([starts - 1, table, ends]), axis=1) - 1
