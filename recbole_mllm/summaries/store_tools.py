"""What people do to a store: look into it, make it smaller, publish it as JSON lines and take in published ones."""

from __future__ import annotations

import json
import re
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.files import open_text, whole_text
from recbole_mllm.data.atomic import clean
from recbole_mllm.summaries.store import COLUMNS, Store, StoredAnswer, wal_of
from recbole_mllm.summaries.summary_files import names_by_key

_DAY_S = 86400.0
_EVER = 1e6  # days
_LIKE = "(model = ? OR model GLOB ?)"


class Group(NamedTuple):
    """The answers of one model to one kind of prompt from one origin (empty: this dataset's own runs)."""

    model: str
    kind: str
    origin: str
    answers: int
    prompt_tokens: int
    new_tokens: int
    seconds: float
    truncated: int
    empty: int


class Pruned(NamedTuple):
    """What went, or would go: how many answers of each model, how many stay, and the bytes the file became smaller."""

    gone: dict[str, int]
    left: int
    freed: int


def groups(store: Store) -> list[Group]:
    """Return what the store holds, by model, kind and origin."""
    query = """
        SELECT model, kind, origin, COUNT(*), SUM(prompt_tokens), SUM(new_tokens), SUM(seconds), SUM(truncated),
               SUM(text = '') FROM answers GROUP BY model, kind, origin ORDER BY model, kind, origin
    """
    with store.transaction() as db:
        return [Group(*row) for row in db.execute(query)]


def size(store: Store) -> int:
    """Return the bytes on disk, with what is not yet in the main file."""
    return sum(path.stat().st_size for path in (store.path, wal_of(store.path)) if path.is_file())


def prune(store: Store, model: str | None, older_than: float | None, *, dry_run: bool) -> Pruned:
    """Delete the answers of models like the pattern `model` that are older than `older_than` days.

    Raises:
        UserError: Neither is given, or another process keeps the file from being compacted (the answers are gone).
    """
    if model is None and older_than is None:
        raise UserError("say what to prune: --model PATTERN, --older-than DAYS, or both; --dry-run shows what would go")
    if older_than is not None and not 0 <= older_than < _EVER:
        raise UserError(f"--older-than {older_than:g} must be a number of days, at least 0")
    parts, given = ["1"], list[str | float]()
    if model is not None:
        parts.append(_LIKE)
        given += [model, model]
    if older_than is not None:
        parts.append("created < ?")
        given.append(time.time() - older_than * _DAY_S)
    where = " AND ".join(parts)
    before = size(store)
    with store.transaction(write=not dry_run) as db:
        query = f"SELECT model, COUNT(*) FROM answers WHERE {where} GROUP BY model ORDER BY model"
        gone = {str(name): int(answers) for name, answers in db.execute(query, given)}
        if gone and not dry_run:
            db.execute(f"DELETE FROM answers WHERE {where}", given)
        left = int(db.execute("SELECT COUNT(*) FROM answers").fetchone()[0])
    if gone and not dry_run:
        store.compact()
        return Pruned(gone, left, before - size(store))
    return Pruned(gone, left - sum(gone.values()), 0)


# Published answers

FORMAT, FORMAT_VERSION = "recbole-mllm answers", 2  # since 2 a line may hold `of`: whose summary it is
_KEY = re.compile(r"[0-9a-f]{64}")
_LONGEST = 2**20  # characters of a line; an answer is a paragraph
_WANTED = {str: "a text", int: "a whole number of at least 0", float: "a number of at least 0", bool: "true or false"}


def is_export(head: bytes) -> bool:
    """Return whether a file that begins so is one that `export` has written, in whatever version."""
    return head.startswith(b'{"format": "recbole-mllm answers"')


class Imported(NamedTuple):
    """What an import did with the file's answers."""

    added: int
    known: int
    replaced: int


def export(store: Store, dataset: str, out: Path, model: str | None) -> int:
    """Write the answers (of models like the pattern `model`) to `out`, whole or not at all; return how many.

    The first line says what follows; each other line is one answer, ordered by key, with `of`: the tag, and the item or
    the user and position, of each summary that it is known to be. ``.gz`` compresses.
    """
    chosen = f"WHERE {_LIKE}" if model else ""
    given = (model, model) if model else ()
    with store.transaction() as db:
        models: dict[str, int] = dict(
            db.execute(f"SELECT model, COUNT(*) FROM answers {chosen} GROUP BY model ORDER BY model", given)
        )
        total = sum(models.values())
        if not total:
            raise UserError(f"{store.path} holds no answer{f' of a model like {model}' if model else ''} to export")
        head = {"format": FORMAT, "version": FORMAT_VERSION, "dataset": dataset, "answers": total, "models": models}
        rows = map(
            StoredAnswer._make, db.execute(f"SELECT {', '.join(COLUMNS)} FROM answers {chosen} ORDER BY key", given)
        )
        answers = _named(rows, names_by_key(db))
        try:
            with whole_text(out) as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in chain([head], answers))
        except OSError as error:
            raise UserError(f"{out} cannot be written ({error.strerror or error}); give a writable --out") from error
    return total


def dataset_card(path: Path) -> str:
    """Return the page of a hub's dataset for the file at `path` that `export` has written."""
    from huggingface_hub import DatasetCardData

    with open_text(path) as file:
        head = json.loads(next(iter(file)))
    data = DatasetCardData(tags=["recbole", "recommendation"], pretty_name=f"Summaries for {head['dataset']}")
    name, models = head["dataset"], "".join(f"| `{model}` | {count:,} |\n" for model, count in head["models"].items())
    return f"""---
{data}
---

# Summaries for `{name}`

{head["answers"]:,} texts that language models wrote about items and users, one JSON object a line.

| model | texts |
|:--|--:|
{models}
With the same data, `recbole-mllm store import {name} {path.name}` takes them in, and none is written again.
"""


def _named(rows: Iterator[StoredAnswer], names: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yield answers as they are exported; both iterators are in the order of keys."""
    name = next(names, None)
    for row in rows:
        of = []
        while name is not None and name[0] <= row.key:
            if name[0] == row.key:
                of.append(name[1])
            name = next(names, None)
        yield row._asdict() | {"truncated": bool(row.truncated)} | ({"of": of} if of else {})


def import_answers(store: Store, path: Path, origin: str | None, *, replace: bool = False) -> Imported:
    """Add the answers of an exported file to `store`, all or none; what is known already stays unless `replace`.

    Args:
        store: Where they go.
        path: A file `export` wrote.
        origin: What marks them; default: each answer's own origin, else the file's name.
        replace: Whether a known answer gives way to the file's, where their texts differ.

    Raises:
        UserError: The file is no export, is cut short, or a line is not what it should be (file and line are named);
            nothing is changed then.
    """
    read = [0]
    before = len(store)
    changed = store.insert(_rows(path, origin, read), replace=replace)
    added = min(len(store) - before, changed)  # other processes may add some meanwhile
    return Imported(added, read[0] - changed, changed - added)


def copy_answers(source: Store, target: Store) -> int:
    """Add every answer of `source` to `target`, which keeps those that it has; return how many it had not."""
    with source.transaction() as db:
        rows = db.execute(f"SELECT {', '.join(COLUMNS)} FROM answers")
        return target.insert(map(StoredAnswer._make, rows))


def _rows(path: Path, origin: str | None, read: list[int]) -> Iterator[StoredAnswer]:
    """Yield the file's answers, each checked; count them in `read`."""
    lines = _lines(path)
    promised = _head(path, next(lines, (1, "")))
    for number, line in lines:
        read[0] += 1
        row = _row(line, f"{path}:{number}")
        yield row._replace(origin=origin or row.origin or path.name)
    if read[0] != promised:
        raise UserError(f"{path}: {read[0]} answers where its first line says {promised}; it was cut, get it again")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with open_text(path) as file:
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
    if head.get("version") not in range(1, FORMAT_VERSION + 1):
        version = head.get("version")
        raise UserError(f"{path}:1: format version {version!r} is not one up to {FORMAT_VERSION}; upgrade this program")
    answers = head.get("answers")
    return answers if isinstance(answers, int) else 0


def _row(line: str, where: str) -> StoredAnswer:
    answer = _object(line, where)
    answer.pop("of", None)  # the next run says whose it is in this dataset
    if wrong := sorted(set(answer).symmetric_difference(COLUMNS)):
        raise UserError(f"{where}: missing or unknown: {', '.join(wrong)[:200]}")
    for name, kind in (get_type_hints(StoredAnswer) | {"truncated": bool}).items():
        value = answer[name]
        right = type(value) is kind or (kind is float and type(value) is int)
        if not right or (kind in (int, float) and not 0 <= value < (2**63 if kind is int else sys.float_info.max)):
            raise UserError(f"{where}: {name} is not {_WANTED[kind]}")
        if kind is str and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise UserError(f"{where}: {name} holds half a surrogate pair, which is no text")
    if not _KEY.fullmatch(answer["key"]):
        raise UserError(f"{where}: key is not 64 hexadecimal digits")
    if clean(answer["text"]) != answer["text"]:
        raise UserError(f"{where}: text holds tabs, line ends, control characters or leading quotes")
    if not answer["kind"] or not answer["model"]:
        raise UserError(f"{where}: kind or model is empty")
    return StoredAnswer(**answer | {"truncated": int(answer["truncated"]), "seconds": float(answer["seconds"])})


def _object(line: str, where: str) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        value = json.loads(line)
        if isinstance(value, dict):
            return value
    raise UserError(f"{where}: no JSON object")
