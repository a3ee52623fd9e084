"""``recbole-mllm store stats|prune|export|import``: the summary store, for people. No model is loaded."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from recbole_mllm.cli.arguments import Options
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.files import check_file
from recbole_mllm.data.schema import store_file


def _folder(where: str) -> Path:
    for folder in (Path(where), Path("dataset") / where):
        if folder.is_dir():
            return folder.resolve()
    raise UserError(f"no dataset folder {where!r}, neither here nor under ./dataset; give the folder's path")


@contextmanager
def _store(folder: Path, *, new: bool = False) -> Iterator[Any]:
    """Open the store in `folder`; unless it may be `new`, one must be there."""
    from recbole_mllm.summaries.work_shares import opened_store

    if not new and not store_file(folder).is_file():
        raise UserError(f"{folder} holds no summary store yet ({store_file(folder).name}); `summarize` makes one")
    with closing(opened_store(folder)) as store:
        yield store


def stats(args: Namespace, options: Options) -> int:
    """Print answers, tokens and seconds by model, kind of prompt and origin."""
    from recbole_mllm.summaries.store_tools import groups, size

    folder = _folder(args.where)
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


def prune(args: Namespace, options: Options) -> int:
    """Delete the answers of a model, or those of long ago."""
    from recbole_mllm.summaries.store_tools import prune as delete

    with _store(_folder(args.where)) as store:
        done = delete(store, args.model, args.older_than, dry_run=args.dry_run)
    for name, answers in done.gone.items():
        print(f"{name}: {answers} answers {'would go' if args.dry_run else 'are gone'}")
    end = "nothing was changed" if args.dry_run or not done.gone else f"{done.freed / 1e6:.1f} MB freed"
    print(f"{sum(done.gone.values())} in all, {done.left} {'would stay' if args.dry_run else 'stay'}; {end}")
    return 0


def export(args: Namespace, options: Options) -> int:
    """Write the answers to a file."""
    from recbole_mllm.summaries.store_tools import export as write
    from recbole_mllm.summaries.store_tools import is_export

    folder = _folder(args.where)
    out = check_file(Path(args.out), "--out", is_export, "a file that `store export` wrote")
    with _store(folder) as store:
        answers = write(store, folder.name, out, args.model)
    print(f"{out}: {answers} answers")
    return 0


def import_file(args: Namespace, options: Options) -> int:
    """Add the answers of a file that `export` wrote."""
    from recbole_mllm.summaries.store_tools import import_answers

    folder, path = _folder(args.where), Path(args.file)
    if not path.is_file():
        what = "is no file" if os.path.lexists(path) else "does not exist"
        raise UserError(f"{path} {what}; give a file that `store export` wrote")
    with _store(folder, new=True) as store:
        done = import_answers(store, path, args.origin)
    print(f"{store_file(folder)}: {done.added} answers added, {done.known} known already and kept as they were")
    return 0
