"""The LaTeX table: whatever stands in a name is set as it is written, and every row has its columns."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from recbole_mllm.benchmark.tables import escape_latex, format_latex
from recbole_mllm.benchmark.ranking import build
from tests.planted_runs import CANDIDATES, plant_run


@pytest.fixture
def table(tmp_path) -> str:
    records = [
        plant_run(tmp_path, "Pop", 0.1),
        plant_run(tmp_path, "SASRec", 1.0),
        plant_run(tmp_path, "MLLMMSR:no_image & 100%", 2.2, "mllm"),
        plant_run(tmp_path, "[Twin]", 1.0, "mllm"),
    ]
    failed = replace(plant_run(tmp_path, "BPR", 0.3), status="boom", metrics={})
    return format_latex(build([*records, failed], tmp_path))


def test_special_characters_are_escaped():
    assert escape_latex("a_b & 50% {#$} ~^ \\x\n<y>") == (
        r"a\_b \& 50\% \{\#\$\} \textasciitilde{}\textasciicircum{} \textbackslash{}x \textless{}y\textgreater{}"
    )


def test_every_row_has_the_columns_of_the_head(table):
    columns = len(re.findall(r"\\begin\{tabular\}\{l(r+)\}", table)[0]) + 1
    body = table.partition(r"\midrule")[2].partition(r"\bottomrule")[0].strip().split("\n")
    assert len(body) == 5 and all(line.endswith(r"\\") for line in body)
    for line in body:
        cells = len(re.findall(r"(?<!\\)&", line)) + 1
        assert cells == columns or r"\multicolumn{7}{l}{failed}" in line
    assert table.count("{") - table.count(r"\{") == table.count("}") - table.count(r"\}")
    assert not re.search(r"\\\\\s*\[", table), "a bracket after a line's end would be taken for an argument"


def test_best_in_bold_marks_and_caption(table):
    rows = {line.partition(" & ")[0]: line for line in table.split("\n") if " & " in line}
    best = next(line for name, line in rows.items() if name.startswith("MLLMMSR"))
    assert best.count(r"\textbf{") == 7 and r"$^{\blacktriangle}$" in best
    assert r"$^{\blacktriangledown}$" in rows["Pop"] and r"SASRec$^{\dagger}$" in rows
    assert "blacktriangle" not in rows["{[}Twin{]}"].partition(" & ")[2].split(" & ")[0]
    assert CANDIDATES in table and "frozen candidates" in table and r"\toprule" in table
