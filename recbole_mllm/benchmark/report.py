"""Write the leaderboard down: JSON for programs, CSV for spreadsheets, Markdown, LaTeX and HTML for people.

All of them say the same, and all can be made again at any time from ``runs.jsonl`` and the arrays.
"""

from __future__ import annotations

import json
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
from recbole_mllm.files import write_text

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
    write_text(results / "leaderboard.json", published + "\n")
    write_text(results / "leaderboard.csv", format_csv(board))
    write_text(results / "leaderboard-groups.csv", format_groups(board))
    write_text(results / "leaderboard-curves.csv", format_curves(board))
    write_text(results / "leaderboard.md", format_markdown(board))
    write_text(results / "leaderboard.tex", format_latex(board))
    write_text(results / HTML, page(board, read_casebook(board, results, embed_images=embed_images)))
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
    write_text(results / NOTE, " ".join(note.split()) + "\n")
