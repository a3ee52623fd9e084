"""RecBole's atomic files: one sanitiser, one writer, one reader; a file is whole or absent."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from recbole_mllm.errors import UserError

_SPACE = re.compile(r"\s+")
# Cc control, Cf format (zero-width marks), Co private use (prompts mark filled-in texts with it), Cs lone surrogates
_UNWANTED = {"Cc", "Cf", "Co", "Cs"}
_KEPT = {"\u200d", "\ufe0f"}  # joiners inside emoji


def clean(text: str) -> str:
    """Return `text` as it may stand in an atomic file: one line, no tab, no control character, no leading quote."""
    flat = _SPACE.sub(" ", text)
    kept = "".join(c for c in flat if c in _KEPT or unicodedata.category(c) not in _UNWANTED)
    return _SPACE.sub(" ", kept).strip().lstrip("\"'").strip()


@contextmanager
def whole_file(path: Path) -> Iterator[IO[str]]:
    """Open `path` for writing UTF-8 text such that it appears only when all of it is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        with suppress(FileNotFoundError):
            scratch.unlink()


def write_atomic(path: Path, types: Mapping[str, str], rows: Iterable[Sequence[str]]) -> int:
    """Write `rows` with RecBole's ``name:type`` header; return how many.

    Raises:
        UserError: A value holds a tab or newline, or a row has too many or too few values.
    """
    count = 0
    with whole_file(path) as file:
        file.write("\t".join(f"{name}:{kind}" for name, kind in types.items()) + "\n")
        for row in rows:
            line = "\t".join(row)
            if line.count("\t") != len(types) - 1 or "\n" in line or "\r" in line:
                raise UserError(f"{path.name}: a tab or newline inside a value, or a missing value, in {line[:120]!r}")
            file.write(line + "\n")
            count += 1
    return count


def read_atomic(path: Path) -> Iterator[dict[str, str]]:
    """Yield each row of an atomic file as ``{name: value}``; quotes are characters like any other.

    Raises:
        UserError: The file is missing, or a line has too many or too few values (file and line are named).
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline().rstrip("\r\n").split("\t")
        names = [column.split(":")[0] for column in header]
        for number, line in enumerate(file, start=2):
            values = line.rstrip("\r\n").split("\t")
            if len(values) != len(names):
                raise UserError(f"{path}:{number}: {len(values)} values for {len(names)} columns; check for stray tabs")
            yield dict(zip(names, values, strict=True))
