"""The store as JSON lines, to publish summaries with a paper and to take in published ones."""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from recbole_mllm.data.atomic import clean
from recbole_mllm.errors import UserError
from recbole_mllm.files import whole_text
from recbole_mllm.summaries.store import Store
from recbole_mllm.summaries.table import COLUMNS, Row

FORMAT, FORMAT_VERSION = "recbole-mllm answers", 1
_KEY = re.compile(r"[0-9a-f]{64}")
_LONGEST = 2**22  # characters of a line; an answer is a paragraph
_WORDS = ("text", "kind", "model", "origin")
_COUNTS = ("prompt_tokens", "new_tokens")
_NUMBERS = ("seconds", "created")


def is_export(head: bytes) -> bool:
    """Return whether a file that begins so is one that `export` has written, in whatever version."""
    return head.startswith(b'{"format": "recbole-mllm answers"')


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did with the file's answers."""

    added: int
    known: int


def export(store: Store, dataset: str, out: Path, model: str | None) -> int:
    """Write the answers (of models like the pattern `model`) to `out`, whole or not at all; return how many.

    The first line says what follows; each other line is one answer, ordered by key. ``.gz`` compresses.
    """
    chosen = "WHERE (model = ? OR model GLOB ?)" if model else ""
    given = (model, model) if model else ()
    with store.transaction() as db:
        models: dict[str, int] = dict(
            db.execute(f"SELECT model, COUNT(*) FROM answers {chosen} GROUP BY model ORDER BY model", given)
        )
        total = sum(models.values())
        if not total:
            raise UserError(f"{store.path} holds no answer{f' of a model like {model}' if model else ''} to export")
        head = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "dataset": dataset,
            "answers": total,
            "models": models,
        }
        with _writing(out) as file:
            file.write(json.dumps(head, ensure_ascii=False) + "\n")
            for row in db.execute(f"SELECT {', '.join(COLUMNS)} FROM answers {chosen} ORDER BY key", given):
                file.write(_line(row) + "\n")
    return total


def _line(row: tuple[Any, ...]) -> str:
    answer = dict(zip(COLUMNS, row, strict=True))
    return json.dumps(answer | {"truncated": bool(answer["truncated"])}, ensure_ascii=False)


@contextmanager
def _writing(out: Path) -> Iterator[IO[str]]:
    try:
        with whole_text(out) as file:
            yield file
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror or error}); give a writable --out") from error


def import_answers(store: Store, path: Path, origin: str | None) -> Imported:
    """Add the answers of an exported file to `store`, all or none; what is known already stays as it is.

    Args:
        store: Where they go.
        path: A file `export` wrote.
        origin: What marks them; default: each answer's own origin, else the file's name.

    Raises:
        UserError: The file is no export, is cut short, or a line is not what it should be (file and line are named);
            nothing is changed then.
    """
    numbers = [0]
    added = store.insert(_rows(path, origin, numbers))
    return Imported(added, numbers[0] - added)


def _rows(path: Path, origin: str | None, numbers: list[int]) -> Iterator[Row]:
    """Yield the file's answers, each checked; count them in `numbers`."""
    lines = _lines(path)
    promised = _head(path, next(lines, (1, "")))
    seen: set[str] = set()
    for number, line in lines:
        row = _row(line, f"{path}:{number}")
        if row.key in seen:
            raise UserError(f"{path}:{number}: the key {row.key[:12]}… stands twice; take the file as it was exported")
        seen.add(row.key)
        numbers[0] += 1
        yield row._replace(origin=origin or row.origin or path.name)
    if numbers[0] != promised:
        raise UserError(f"{path}: {numbers[0]} answers where its first line says {promised}; it was cut, get it again")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            while line := file.readline(_LONGEST + 1):
                number += 1
                if len(line) > _LONGEST:
                    raise UserError(f"{path}:{number}: more than {_LONGEST} characters; this is no exported answer")
                yield number, line
    except UnicodeDecodeError:
        raise UserError(f"{path}:{number + 1}: not UTF-8; take the file as it was exported") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read behind line {number} ({error}); get it again") from error


def _head(path: Path, first: tuple[int, str]) -> int:
    """Return how many answers the first line promises."""
    head = _object(first[1], f"{path}:1")
    if head.get("format") != FORMAT:
        raise UserError(f"{path}:1: this is no file `store export` wrote; its first line names no {FORMAT!r}")
    if head.get("version") != FORMAT_VERSION:
        raise UserError(
            f"{path}:1: format version {head.get('version')!r} is not {FORMAT_VERSION}; upgrade this program"
        )
    return _count(head.get("answers"), "answers", f"{path}:1")


def _row(line: str, where: str) -> Row:
    answer = _object(line, where)
    if wrong := sorted(set(answer).symmetric_difference(COLUMNS)):
        raise UserError(f"{where}: missing or unknown: {', '.join(wrong)[:200]}")
    if not isinstance(answer["key"], str) or not _KEY.fullmatch(answer["key"]):
        raise UserError(f"{where}: key is not 64 hexadecimal digits")
    for name in _WORDS:
        if not isinstance(answer[name], str):
            raise UserError(f"{where}: {name} is no text")
    if clean(answer["text"]) != answer["text"]:
        raise UserError(f"{where}: text holds a tab, a line's end, a control character or a leading quote")
    if not answer["kind"] or not answer["model"]:
        raise UserError(f"{where}: kind and model must not be empty")
    if not isinstance(answer["truncated"], bool):
        raise UserError(f"{where}: truncated is neither true nor false")
    for name in _COUNTS:
        _count(answer[name], name, where)
    for name in _NUMBERS:
        if type(answer[name]) not in (int, float) or not 0 <= answer[name] < math.inf:
            raise UserError(f"{where}: {name} is no number of at least 0")
        answer[name] = float(answer[name])
    return Row(**answer | {"truncated": int(answer["truncated"])})


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{where}: no JSON object")
    return value


def _count(value: object, name: str, where: str) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise UserError(f"{where}: {name} is no whole number of at least 0")
    return value
