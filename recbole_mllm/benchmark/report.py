"""Write the leaderboard down: JSON for programs, CSV for spreadsheets, Markdown, LaTeX and HTML for people.

All of them say the same, and all can be made again at any time from ``runs.jsonl`` and the arrays.
"""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

from recbole_mllm.benchmark.casebook import read_casebook
from recbole_mllm.benchmark.latex import format_latex
from recbole_mllm.benchmark.leaderboard import ALL_COSTS, SLICES, Leaderboard, Part, Row
from recbole_mllm.benchmark.markdown import format_markdown
from recbole_mllm.benchmark.page import page
from recbole_mllm.benchmark.ranking import build
from recbole_mllm.benchmark.records import RECORDS, read_records
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

    Without `embed_images` the page's case studies hold no pictures.
    """
    board = read_leaderboard(results)
    published = json.dumps(board.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    _write(results / "leaderboard.json", published + "\n")
    _write(results / "leaderboard.csv", format_csv(board))
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


def format_csv(board: Leaderboard) -> str:
    """Return one line a row with every number at full precision; empty fields where there is none."""
    metrics = [f"{name}{part}" for name in board.metrics for part in ("", " low", " high", " p", " difference", " d")]
    slices = [f"{part} {name}{end}" for part in SLICES for name in board.metrics for end in ("", " n")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "kind", "seeds", "status", *metrics, *ALL_COSTS, *slices])
    for row in board.rows:
        writer.writerow([row.model, row.kind, " ".join(map(str, row.seeds)), row.status, *_numbers(board, row)])
    return text.getvalue()


def _numbers(board: Leaderboard, row: Row) -> list[float | None]:
    numbers: list[float | None] = []
    for name in board.metrics:
        score = row.scores.get(name)
        low, high = score.ci95 if score and score.ci95 else (None, None)
        numbers += [score.mean, low, high, score.p, score.difference, score.effect] if score else [None] * 6
    numbers += [row.cost.get(name) for name in ALL_COSTS]
    for part in SLICES:
        cells = [row.slices.get(part, {}).get(name, Part(None, 0)) for name in board.metrics]
        numbers += [value for cell in cells for value in (cell.mean, cell.n)]
    return numbers


def _write(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
