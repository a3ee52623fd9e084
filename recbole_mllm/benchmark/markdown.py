"""The leaderboard as a Markdown page in the manner of RecBole's result pages: tables, then every configuration."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from recbole_mllm.benchmark.leaderboard import SLICES, Leaderboard, Row
from recbole_mllm.benchmark.text import command, shown_config
from recbole_mllm.benchmark.wording import (
    COST_TITLES,
    MARKS,
    METHOD,
    NOT_CONVERGED,
    NOTHING,
    WORDS,
    cost_notes,
    finding,
    legend,
    say_cost,
    say_score,
    seeds,
)


def format_markdown(board: Leaderboard) -> str:
    """Return the leaderboard as a page that carries its configurations."""
    parts = [
        f"# {_md(board.dataset)}: leaderboard",
        _md(finding(board)),
        *([f"> {_md(board.note)}"] if board.note else []),
        f"- Protocol: {_md(board.protocol)}\n- Users: {board.n_users}\n- Candidates: {_code(board.candidates)}",
        "## Quality",
        _table(["model", "seeds", *board.metrics], [_quality(board, row) for row in board.rows]),
        f"{_md(legend(board))} {METHOD}",
        *_tests(board),
        f"## Slices ({board.valid_metric})",
        _table(["model", *SLICES], [_slices(board, row) for row in board.rows if row.ok]),
        "cold: the target has no interaction in training; warm: it has; tail: it is in the long tail. (Users.)",
        "## Cost",
        _table(["model", *(COST_TITLES[name] for name in board.costs)], [_costs(board, row) for row in board.rows]),
        _md(cost_notes(board)),
        "## Configurations",
        "A run's own settings and the shared ones, in one file `<run_id>.yaml`, are its whole configuration.",
        *_configurations(board),
    ]
    return "\n\n".join(parts) + "\n"


def _quality(board: Leaderboard, row: Row) -> list[str]:
    if not row.ok:
        return [_md(row.model), seeds(row), f"failed: {_md(row.status)}"] + [""] * (len(board.metrics) - 1)
    cells = []
    for name in board.metrics:
        said = say_score(board, row, name)
        cells.append(" ".join(filter(None, [said.mean, MARKS[said.verdict], said.interval])))
    name = f"{_md(row.model)} {NOT_CONVERGED} not converged" if row.converged is False else _md(row.model)
    return [name, seeds(row), *cells]


def _slices(board: Leaderboard, row: Row) -> list[str]:
    parts = [row.slices.get(part, {}).get(board.valid_metric) for part in SLICES]
    said = [NOTHING if part is None or part.mean is None else f"{part.mean:.3f} ({part.n})" for part in parts]
    return [_md(row.model), *said]


def _costs(board: Leaderboard, row: Row) -> list[str]:
    return [_md(row.model), *(say_cost(row, name) for name in board.costs)]


def _tests(board: Leaderboard) -> list[str]:
    """Return the tests of the ranking metric; those of all metrics are in the CSV and the page."""
    said = [(row, say_score(board, row, board.valid_metric)) for row in board.rows if row.ok]
    rows = [
        [row.model, str(row.tested_against), s.difference, s.effect, s.p_raw, s.p, WORDS[s.verdict]]
        for row, s in said
        if s.verdict in WORDS
    ]
    if not rows:
        return []
    head = ["model", "tested against", "difference", "Cohen's d_z", "p (raw)", "p (Holm)", "verdict"]
    return [f"## Tests ({board.valid_metric})", _table(head, [[_md(cell) for cell in row] for row in rows])]


def _configurations(board: Leaderboard) -> list[str]:
    """Return the settings all runs share, once, and each run's own."""
    runs = [run for row in board.rows for run in row.runs]
    configs = [shown_config(run) for run in runs]
    shared = {
        key: value
        for key, value in configs[0].items()
        if all(key in config and config[key] == value for config in configs)
    }
    told = [_details("All runs share", _yaml(shared))] if shared else []
    for run, config in zip(runs, configs, strict=True):
        own = {key: value for key, value in config.items() if key not in shared}
        told.append(_details(f"{run.label}, seed {run.seed}", _yaml(own) if own else "", command(run)))
    return told


def _yaml(config: Mapping[str, Any]) -> str:
    text = yaml.safe_dump(dict(config), sort_keys=True, allow_unicode=True, width=100)
    return f"~~~~~~yaml\n{text}~~~~~~"


def _details(title: str, body: str, line: str = "") -> str:
    head = f"<details><summary>{html.escape(title, quote=False)}</summary>"  # a block of HTML, not of Markdown
    parts = [head, _code(line) if line else "", body, "</details>"]
    return "\n\n".join(filter(None, parts))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _md(text: str) -> str:
    """Escape what Markdown would take for a table, a tag, an entity or a new line, and leave ``p < .001`` alone."""
    entities = re.sub(r"&(?=#?\w+;)", "&amp;", " ".join(text.split()))
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", entities).replace("|", "\\|")


def _code(text: str) -> str:
    """Return `text` as code, in which Markdown decodes nothing."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence}{text}{fence}" if not longest else f"{fence} {text} {fence}"
