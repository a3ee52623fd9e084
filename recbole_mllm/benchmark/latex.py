"""The leaderboard as a LaTeX table for a paper: ``\\input{leaderboard.tex}`` with the packages booktabs and amssymb."""

from __future__ import annotations

from recbole_mllm.benchmark.leaderboard import Leaderboard, Row
from recbole_mllm.benchmark.wording import NOTHING, say_score

COLUMNS = ("NDCG@10", "Hit@10", "MRR@10", "NDCG@5", "Hit@5", "GAUC", "AUC")
"""What fits a page; RecBole's Recall equals Hit where a user has one target."""

_MARKS = {"better": r"$^{\blacktriangle}$", "worse": r"$^{\blacktriangledown}$"}
_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "[": "{[}", "]": "{]}", "*": "{*}", '"': r"\textquotedbl{}",
}  # fmt: skip


def format_latex(board: Leaderboard) -> str:
    """Return the table: best value of a column in bold, marks of significance, protocol and digest in the caption."""
    names = [name for name in COLUMNS if name in board.metrics] or list(board.metrics[:7])
    lines = [_row(board, row, names) for row in board.rows]
    body = [
        "% needs \\usepackage{booktabs,amssymb}",
        r"\begin{table}",
        r"\centering\small\setlength{\tabcolsep}{4pt}",  # eight columns on the page of an article
        rf"\caption{{{_caption(board)}}}",
        rf"\label{{tab:{_label(board.dataset)}}}",
        rf"\begin{{tabular}}{{l{'r' * len(names)}}}",
        r"\toprule",
        " & ".join(["Model", *map(escape, names)]) + r" \\",
        r"\midrule",
        *lines,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(body) + "\n"


def escape(text: str) -> str:
    """Return `text` so that LaTeX sets it as it is written, on one line."""
    return "".join(_SPECIAL.get(character, character) for character in " ".join(text.split()))


def _row(board: Leaderboard, row: Row, names: list[str]) -> str:
    if not row.ok:
        return rf"{escape(row.model)} & \multicolumn{{{len(names)}}}{{l}}{{failed}} \\"
    marks = (r"\dagger" if row.model == board.best_baseline else "") + (r"\ddagger" if row.converged is False else "")
    name = escape(row.model) + (f"$^{{{marks}}}$" if marks else "")
    return " & ".join([name, *(_cell(board, row, metric) for metric in names)]) + r" \\"


def _cell(board: Leaderboard, row: Row, metric: str) -> str:
    said = say_score(board, row, metric)
    if said.mean == NOTHING:
        return "--"
    highest = row.mean(metric) == max(other.mean(metric) for other in board.rows)
    return (rf"\textbf{{{said.mean}}}" if highest else said.mean) + _MARKS.get(said.verdict, "")


def _caption(board: Leaderboard) -> str:
    told = f"{escape(board.dataset)}: {escape(board.protocol)}; "
    if f"{board.n_users} users" not in board.protocol:
        told += f"{board.n_users} users; "
    told += rf"candidates \texttt{{{escape(board.candidates)}}}. Best value of a column in bold."
    for reason in board.absent.values():
        told += f" {escape(reason)}"
    variants = [row for row in board.rows if row.tested_against not in (None, board.best_baseline)]
    if board.best_baseline is not None or variants:
        full = "the full model (variants of MLLMMSR)" if variants else ""
        best = rf"the best baseline on {board.chosen_on} ($\dagger$)" if board.best_baseline is not None else ""
        against = " or ".join(filter(None, [best, full]))
        told += (
            rf" $\blacktriangle$ better and $\blacktriangledown$ worse than {against} at "
            r"$p < .05$, paired tests over users, Holm's correction over the whole table; "
            "values without a mark do not differ significantly."
        )
    if board.not_converged:
        told += r" $\ddagger$ not converged: training reached its cap of epochs before validation had stopped rising."
    return told


def _label(dataset: str) -> str:
    return "".join(character if character.isascii() and character.isalnum() else "-" for character in dataset)
