"""Write the leaderboard down: JSON for programs, CSV for spreadsheets, Markdown, LaTeX and HTML for people.

All of them say the same, and all can be rendered again at any time from ``runs.jsonl`` and the arrays.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from recbole_mllm.benchmark import tables
from recbole_mllm.benchmark.cases import read_cases
from recbole_mllm.benchmark.html import page
from recbole_mllm.benchmark.leaderboard import Leaderboard
from recbole_mllm.benchmark.memory_probe import memory_of
from recbole_mllm.benchmark.ranking import build
from recbole_mllm.benchmark.records import RECORDS, read_records
from recbole_mllm.benchmark.wording import added, banner, uses
from recbole_mllm.common.files import write_text

HTML = "leaderboard.html"
NOTE = "note.txt"


def render(results: Path, *, embed_images: bool = True) -> Leaderboard:
    """Write ``leaderboard.{json,csv,md,tex,html}`` into `results` from its runs, and return what they say.

    What the page draws by group of users and by cut-off stands in ``leaderboard-groups.csv`` and ``-curves.csv``, and
    what the model uses in ``-uses.csv``.
    Without `embed_images` the page's case studies hold no pictures.
    """
    board = read_leaderboard(results)
    found: dict[str, Any] = {"uses": [use._asdict() for use in uses(board)], "what_the_mllm_adds": added(board)}
    found["memory"] = board.memory
    published = {"banner": banner(board)} | board.to_json() | found
    published = {name: value for name, value in published.items() if value or name not in ("banner", *found)}
    forms = {
        "leaderboard.json": json.dumps(published, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "leaderboard.csv": tables.csv_text(tables.numbers_table(board)),
        "leaderboard-groups.csv": tables.csv_text(tables.groups_table(board)),
        "leaderboard-curves.csv": tables.csv_text(tables.curves_table(board)),
        "leaderboard-uses.csv": tables.csv_text(tables.uses_table(board)),
        "leaderboard.md": tables.format_markdown(board),
        "leaderboard.tex": tables.format_latex(board),
        HTML: page(board, read_cases(board, results, embed_images=embed_images)),
    }
    for name, text in forms.items():
        write_text(results / name, text)
    return board


def read_leaderboard(results: Path) -> Leaderboard:
    """Return what the runs in `results` show, writing nothing."""
    note = results / NOTE
    text = note.read_text(encoding="utf-8").strip() if note.exists() else ""
    records = read_records(results / RECORDS)
    return replace(build(records, results, text), memory=memory_of(records))


def write_note(results: Path, note: str) -> None:
    """Store a sentence about the data beside the runs, so that every later report carries it."""
    write_text(results / NOTE, " ".join(note.split()) + "\n")
