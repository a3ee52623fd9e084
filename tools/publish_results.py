"""Put a leaderboard below the words of its page: `python tools/publish_results.py results/demo docs/results/demo.md`.

A page of docs/results is written by hand down to the line MARK; what follows is the `leaderboard.md` that the benchmark
wrote, its headings one level down, without the runs' configurations (the page names the committed YAML instead).
"""

from __future__ import annotations

import argparse
from pathlib import Path

MARK = "<!-- below: leaderboard.md, as the benchmark wrote it -->"


def published(page: str, board: str) -> str:
    """Return `page` down to its mark with `board` behind it.

    Raises:
        ValueError: The page has no mark.
    """
    head, mark, _ = page.partition(MARK)
    if not mark:
        raise ValueError(f"the page lacks the line {MARK}")
    board = board.partition("\n## Configurations")[0]
    lines = [f"#{line}" if line.startswith("#") else line for line in board.splitlines()]
    return f"{head}{MARK}\n\n" + "\n".join(lines).strip() + "\n"


def main() -> None:
    """Rewrite the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="the benchmark's output folder")
    parser.add_argument("page", type=Path)
    args = parser.parse_args()
    board = (args.results / "leaderboard.md").read_text(encoding="utf-8")
    args.page.write_text(published(args.page.read_text(encoding="utf-8"), board), encoding="utf-8")


if __name__ == "__main__":
    main()
