"""The notebook of examples/: what it calls is there, its outputs are stored, and it runs in a slow test."""

import ast
import importlib
import inspect
import json
import os
from pathlib import Path

import pytest

from recbole_mllm.benchmark.records import RECORDS, read_records

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "quick_tour.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_the_notebook_imports_what_there_is_and_calls_it_as_it_may_be_called():
    called = set()
    functions = {}
    for node in (node for text in CODE for node in ast.walk(ast.parse(text))):
        if isinstance(node, ast.ImportFrom):
            for name in node.names:
                functions[name.name] = getattr(importlib.import_module(node.module), name.name)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.startswith("run_"):
            called.add(node.func.id)
            signature = inspect.signature(functions[node.func.id])
            signature.bind(*node.args, **{word.arg: None for word in node.keywords})
    assert called == {"run_convert", "run_inspect", "run_summaries", "run_benchmark"}


def test_the_notebook_is_stored_with_its_outputs_and_small():
    shown = [cell["outputs"] for cell in CELLS if cell["cell_type"] == "code"]
    kinds = {kind for outputs in shown for output in outputs for kind in output.get("data", {})}
    assert {"text/html", "image/svg+xml", "image/png"} <= kinds
    assert not any(output["output_type"] == "error" for outputs in shown for output in outputs)
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 400_000 and "NDCG@10" in text and str(Path.home()) not in text


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    NotebookClient(notebook, timeout=900, kernel_name="python3").execute(cwd=str(tmp_path), env=environment)
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    assert "p_yes" in last.outputs[-1]["data"]["text/html"]
    (results,) = tmp_path.glob("quick_tour_*/results/shop/" + RECORDS)
    assert {record.model for record in read_records(results) if record.ok} == {"Pop", "SASRec", "MLLMMSR"}
