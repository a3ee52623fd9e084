"""The leaderboard as text for the terminal, and a run's command and configuration as every form tells them."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from typing import Any

import yaml

from recbole_mllm.benchmark.leaderboard import Leaderboard, Row
from recbole_mllm.benchmark.portable import without_folders
from recbole_mllm.benchmark.records import RunRecord, plain_json
from recbole_mllm.benchmark.wording import MARKS, NOT_CONVERGED, finding, legend, say_cost, say_score, seeds

WIDTH = 120
NAME_WIDTH = 28
ALSO_SHOWN = ("Hit@10", "MRR@10", "NDCG@5", "GAUC", "AUC", "Hit@5", "MRR@5")


def format_table(board: Leaderboard) -> str:
    """Return the leaderboard for a terminal: aligned, at most 120 columns wide."""
    valid = board.valid_metric
    also = [name for name in ALSO_SHOWN if name in board.metrics and name != valid][:5]
    lines = [["model", f"{valid} [95 %]", "", *also, "summarise", "train", "score"]]
    for row in board.rows:
        if row.ok:
            said = say_score(board, row, valid)
            cells = [_score_cell(board, row, name) for name in also]
            costs = [say_cost(row, name) for name in ("summarize_s", "train_s", "score_s")]
            lines.append([_name(row), f"{said.mean} {said.interval}", MARKS[said.verdict], *cells, *costs])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    while sum(widths) + 2 * len(widths) - 2 > WIDTH and len(widths) > 3:  # rather lose a column than break a line
        widths.pop(3)
        for line in lines:
            line.pop(3)
    table = [_align(line, widths) for line in lines]
    table.insert(1, "─" * len(table[0]))
    failed = [
        f"{_cut(row.model, NAME_WIDTH)} seed {seeds(row)} failed: {row.status}" for row in board.rows if not row.ok
    ]
    users = "" if f"{board.n_users} users" in board.protocol else f" · {board.n_users} users"
    title = f"{board.dataset}: {board.protocol}{users} · candidates {board.candidates}"
    notes = [board.note] if board.note else []
    fixed = [_cut(line, WIDTH) for line in ["", *table, *failed]]
    return "\n".join([*_wrap([title]), *fixed, "", *_wrap([legend(board), finding(board), *notes])])


def _name(row: Row) -> str:
    return _cut(row.model, NAME_WIDTH) + (f" {NOT_CONVERGED}" if row.converged is False else "")


def command(run: RunRecord) -> str:
    """Return the command that repeats a run, once its configuration lies in ``<run_id>.yaml``."""
    return (
        f"python run_recbole_mllm.py benchmark --dataset {shlex.quote(run.dataset)} --models {shlex.quote(run.label)} "
        f"--seeds {run.seed} --config_files {shlex.quote(run.run_id)}.yaml"
    )


def configuration(run: RunRecord) -> str:
    """Return a run's full configuration as YAML, but for where its files lay."""
    return str(yaml.safe_dump(shown_config(run), sort_keys=True, allow_unicode=True, width=100))


def shown_config(run: RunRecord) -> dict[str, Any]:
    """Return a run's configuration as a page shows it: nothing of the machine's folders, which are nobody's business.

    Where the dataset and the run's own files lay is left out; of any other path the last part is shown.
    """
    ours = ("data_path", "checkpoint_dir", "retriever_dir")
    known = {key: value for key, value in plain_json(run.config).items() if key not in ours}
    return {key: without_folders(value) for key, value in known.items()}


def _score_cell(board: Leaderboard, row: Row, name: str) -> str:
    said = say_score(board, row, name)
    mark = {"better": " ▲", "worse": " ▼"}.get(said.verdict, "  ")
    return f"{said.mean}{mark}"


def _align(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _wrap(paragraphs: Sequence[str]) -> list[str]:
    return [line for paragraph in paragraphs for line in textwrap.wrap(paragraph, WIDTH)]
