"""The leaderboard as text: a table for the terminal, and a Markdown page in the manner of RecBole's result pages."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence

import yaml

from recbole_mllm.benchmark.leaderboard import COSTS, SLICES, Leaderboard, Row
from recbole_mllm.benchmark.records import RunRecord, plain_json
from recbole_mllm.benchmark.wording import (
    COST_TITLES,
    MARKS,
    METHOD,
    NOTHING,
    finding,
    legend,
    say_cost,
    say_score,
    say_seconds,
    seeds,
)

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
            costs = [say_seconds(row.cost.get(name)) for name in COSTS[:3]]
            lines.append(
                [_cut(row.model, NAME_WIDTH), f"{said.mean} {said.interval}", MARKS[said.verdict], *cells, *costs]
            )
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
    title = f"{board.dataset}: {board.protocol} · {board.n_users} users · candidates {board.candidates}"
    notes = [board.note] if board.note else []
    fixed = [_cut(line, WIDTH) for line in [title, "", *table, *failed]]
    return "\n".join([*fixed, "", *_wrap([legend(board), finding(board), *notes])])


def format_markdown(board: Leaderboard) -> str:
    """Return the leaderboard as a page that carries its configurations."""
    parts = [
        f"# {_md(board.dataset)}: leaderboard",
        _md(finding(board)),
        *([f"> {_md(board.note)}"] if board.note else []),
        f"- Protocol: {_md(board.protocol)}\n- Users: {board.n_users}\n- Candidates: `{_md(board.candidates)}`",
        "## Quality",
        _table(["model", "seeds", *board.metrics], [_quality(board, row) for row in board.rows]),
        f"{_md(legend(board))} {METHOD}",
        f"## Slices ({board.valid_metric})",
        _table(["model", *SLICES], [_slices(board, row) for row in board.rows if row.ok]),
        "cold: the target has no interaction in training; warm: it has; tail: it is in the long tail. (Users.)",
        "## Cost",
        _table(["model", *(COST_TITLES[name] for name in COSTS)], [_costs(row) for row in board.rows]),
        "## Configurations",
        *[_configuration(run) for row in board.rows for run in row.runs],
    ]
    return "\n\n".join(parts) + "\n"


def command(run: RunRecord) -> str:
    """Return the command that repeats a run, once its configuration lies in ``<run_id>.yaml``."""
    return (
        f"python run_recbole_mllm.py benchmark --dataset {shlex.quote(run.dataset)} --models {shlex.quote(run.label)} "
        f"--seeds {run.seed} --config_files {shlex.quote(run.run_id)}.yaml"
    )


def configuration(run: RunRecord) -> str:
    """Return a run's full configuration as YAML."""
    return str(yaml.safe_dump(plain_json(run.config), sort_keys=True, allow_unicode=True, width=100))


def _score_cell(board: Leaderboard, row: Row, name: str) -> str:
    said = say_score(board, row, name)
    mark = {"better": " ▲", "worse": " ▼"}.get(said.verdict, "  ")
    return f"{said.mean}{mark}"


def _quality(board: Leaderboard, row: Row) -> list[str]:
    if not row.ok:
        return [_md(row.model), seeds(row), f"failed: {_md(row.status)}"] + [""] * (len(board.metrics) - 1)
    cells = []
    for name in board.metrics:
        said = say_score(board, row, name)
        cells.append(" ".join(filter(None, [said.mean, MARKS[said.verdict], said.interval])))
    return [_md(row.model), seeds(row), *cells]


def _slices(board: Leaderboard, row: Row) -> list[str]:
    parts = [row.slices.get(part, {}).get(board.valid_metric) for part in SLICES]
    said = [NOTHING if part is None or part.mean is None else f"{part.mean:.3f} ({part.n})" for part in parts]
    return [_md(row.model), *said]


def _costs(row: Row) -> list[str]:
    return [_md(row.model), *(say_cost(name, row.cost.get(name)) for name in COSTS)]


def _configuration(run: RunRecord) -> str:
    head = f"<details><summary>{_md(run.label)}, seed {run.seed}</summary>"
    return f"{head}\n\n`{_md(command(run))}`\n\n~~~~~~yaml\n{configuration(run)}~~~~~~\n\n</details>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _md(text: str) -> str:
    """Escape what Markdown would take for a table, a tag or a new line."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _align(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _wrap(paragraphs: Sequence[str]) -> list[str]:
    return [line for paragraph in paragraphs for line in textwrap.wrap(paragraph, WIDTH)]
