"""Write the leaderboard down: JSON for programs, CSV for spreadsheets, Markdown, LaTeX and HTML for people.

All of them say the same, and all can be made again at any time from ``runs.jsonl`` and the arrays.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from recbole_mllm.benchmark.casebook import read_casebook
from recbole_mllm.benchmark.latex import format_latex
from recbole_mllm.benchmark.leaderboard import Leaderboard
from recbole_mllm.benchmark.markdown import format_markdown
from recbole_mllm.benchmark.page import page
from recbole_mllm.benchmark.ranking import build
from recbole_mllm.benchmark.records import RECORDS, read_records
from recbole_mllm.benchmark.sheets import format_csv, format_curves, format_groups
from recbole_mllm.benchmark.text import format_table

__all__ = [
    "HTML",
    "format_csv",
    "format_latex",
    "format_leaderboard",
    "format_markdown",
    "format_table",
    "read_leaderboard",
    "render",
    "write_note",
]

HTML = "leaderboard.html"
NOTE = "note.txt"


def render(results: Path, *, embed_images: bool = True) -> Leaderboard:
    """Write ``leaderboard.{json,csv,md,tex,html}`` into `results` from its runs, and return what they say.

    What the page draws by group of users and by cut-off stands in ``leaderboard-groups.csv`` and ``-curves.csv``.
    Without `embed_images` the page's case studies hold no pictures.
    """
    board = read_leaderboard(results)
    published = json.dumps(board.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    _write(results / "leaderboard.json", published + "\n")
    _write(results / "leaderboard.csv", format_csv(board))
    _write(results / "leaderboard-groups.csv", format_groups(board))
    _write(results / "leaderboard-curves.csv", format_curves(board))
    _write(results / "leaderboard.md", format_markdown(board))
    _write(results / "leaderboard.tex", format_latex(board))
    _write(results / HTML, page(board, read_casebook(board, results, embed_images=embed_images)))
    return board


def read_leaderboard(results: Path) -> Leaderboard:
    """Return what the runs in `results` show, writing nothing."""
    note = results / NOTE
    told = note.read_text(encoding="utf-8").strip() if note.exists() else ""
    return build(read_records(results / RECORDS), results, told)


def format_leaderboard(results: Path) -> str:
    """Return the leaderboard of the runs in `results` for a terminal."""
    return format_table(read_leaderboard(results))


def write_note(results: Path, note: str) -> None:
    """Keep a sentence about the data beside the runs, so that every later report carries it."""
    _write(results / NOTE, " ".join(note.split()) + "\n")


def _write(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
