"""``recbole-mllm store stats|prune|export|import``: the summary store, for people. No model is loaded."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from recbole_mllm.data.schema import store_file
from recbole_mllm.errors import UserError
from recbole_mllm.files import check_file


def add_parser(add: Any, parser_class: Any) -> None:
    """Add the command and its four actions to the command line."""
    store = add("store", help="the summary store: stats, prune, export, import")
    actions = store.add_subparsers(dest="action", metavar="{stats,prune,export,import}", parser_class=parser_class)
    actions.required = True
    stats = actions.add_parser("stats", help="answers, tokens and seconds by model, kind of prompt and origin")
    prune = actions.add_parser("prune", help="delete answers")
    prune.add_argument("--older-than", type=float, metavar="DAYS", help="only those written longer ago")
    prune.add_argument("--dry-run", action="store_true", help="only say what would go")
    export = actions.add_parser("export", help="write the answers as JSON lines")
    export.add_argument("--out", required=True, metavar="FILE", help="FILE.jsonl or FILE.jsonl.gz")
    for action in (prune, export):
        action.add_argument("--model", help="only this model's, as stats names it; * and ? match any characters")
    take = actions.add_parser("import", help="add the answers of an exported file; known ones stay")
    for action in (stats, prune, export, take):
        action.add_argument("where", metavar="D", help="a dataset's folder, or its name under ./dataset")
    take.add_argument("file", help="what `store export` wrote")
    take.add_argument("--origin", help="what marks the answers, e.g. the paper; default: the file's name")


def run(known: argparse.Namespace) -> int:
    """Do what the words say."""
    from recbole_mllm.summaries.exchange import is_export

    folder = _folder(known.where)
    if known.action == "export":
        known.out = check_file(Path(known.out), "--out", is_export, "a file that `store export` wrote")
    if known.action == "import":
        return _import(folder, Path(known.file), known.origin)
    if not store_file(folder).is_file():
        raise UserError(f"{folder} holds no summary store yet ({store_file(folder).name}); `summarize` makes one")
    if known.action == "stats":
        return _stats(folder)
    if known.action == "prune":
        return _prune(folder, known.model, known.older_than, known.dry_run)
    return _export(folder, known.out, known.model)


def _folder(where: str) -> Path:
    for folder in (Path(where), Path("dataset") / where):
        if folder.is_dir():
            return folder.resolve()
    raise UserError(f"no dataset folder {where!r}, neither here nor under ./dataset; give the folder's path")


@contextmanager
def _store(folder: Path) -> Iterator[Any]:
    from recbole_mllm.summaries.shards import opened_store

    with closing(opened_store(folder)) as store:
        yield store


def _stats(folder: Path) -> int:
    from recbole_mllm.summaries.upkeep import groups, size

    with _store(folder) as store:
        found, megabytes = groups(store), size(store) / 1e6
    print(f"{store_file(folder)}: {sum(g.answers for g in found)} answers, {megabytes:.1f} MB")
    head = ("model", "kind", "origin", "answers", "prompt tokens", "new tokens", "seconds", "cut", "empty")
    rows = [
        (g.model, g.kind, g.origin or "-")
        + tuple(str(n) for n in (g.answers, g.prompt_tokens, g.new_tokens, round(g.seconds, 1), g.truncated, g.empty))
        for g in found
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows) if rows else ():
        cells = (c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        print("  ".join(cells).rstrip())
    return 0


def _prune(folder: Path, model: str | None, older_than: float | None, dry_run: bool) -> int:
    from recbole_mllm.summaries.upkeep import prune

    with _store(folder) as store:
        done = prune(store, model, older_than, dry_run=dry_run)
    for name, answers in done.gone.items():
        print(f"{name}: {answers} answers {'would go' if dry_run else 'are gone'}")
    end = "nothing was changed" if dry_run or not done.gone else f"{done.freed / 1e6:.1f} MB freed"
    print(f"{sum(done.gone.values())} in all, {done.left} {'would stay' if dry_run else 'stay'}; {end}")
    return 0


def _export(folder: Path, out: Path, model: str | None) -> int:
    from recbole_mllm.summaries.exchange import export

    with _store(folder) as store:
        answers = export(store, folder.name, out, model)
    print(f"{out}: {answers} answers")
    return 0


def _import(folder: Path, path: Path, origin: str | None) -> int:
    from recbole_mllm.summaries.exchange import import_answers

    if not path.is_file():
        what = "is no file" if os.path.lexists(path) else "does not exist"
        raise UserError(f"{path} {what}; give a file that `store export` wrote")
    with _store(folder) as store:
        done = import_answers(store, path, origin)
    print(f"{store_file(folder)}: {done.added} answers added, {done.known} known already and kept as they were")
    return 0
