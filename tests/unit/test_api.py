"""The commands as functions: their frames agree with what was planted, and they say mistakes as the commands do."""

import inspect
import re
import sys
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small_world
from planned_server import Planned, serving
from planted_runs import plant_run

import recbole_mllm
from recbole_mllm import BenchmarkResult, UserError, run_benchmark, run_convert, run_inspect, run_summaries
from recbole_mllm.api import options_of
from recbole_mllm.benchmark.records import RECORDS, append
from recbole_mllm.common.model_names import no_model
from recbole_mllm.common.progress import Progress
from recbole_mllm.data.atomic import read_atomic

KERNEL = ["ipykernel_launcher.py", "-f", "/tmp/kernel-1.json", "--epochs=x"]  # RecBole's Config would read it


@pytest.fixture(autouse=True)
def in_a_notebook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(KERNEL))
    yield
    assert sys.argv == KERNEL


def test_every_name_is_there_and_typed():
    for name in recbole_mllm.__all__:
        assert name in dir(recbole_mllm) and getattr(recbole_mllm, name)
    for name in (name for name in recbole_mllm.__all__ if name.startswith("run_")):
        function = getattr(recbole_mllm, name)
        signature = inspect.signature(function)
        assert signature.return_annotation.endswith("Result")
        assert all(one.annotation is not one.empty for one in signature.parameters.values())
        assert all(one in function.__doc__ for one in signature.parameters)


@pytest.fixture
def result(tmp_path):
    for lift, (model, kind) in enumerate([("Pop", "baseline"), ("SASRec", "baseline"), ("MLLMMSR", "mllm")]):
        append(tmp_path / RECORDS, plant_run(tmp_path, model, float(lift), kind=kind))
    append(tmp_path / RECORDS, plant_run(tmp_path, "BPR", 0.0, status="it <b>broke</b>"))
    return BenchmarkResult(tmp_path)


def test_a_leaderboards_frame_holds_the_means_of_the_runs(result):
    frame = result.frame
    assert list(frame.index) == ["MLLMMSR", "SASRec", "Pop", "BPR"]
    assert frame.loc["BPR", "status"] == "it <b>broke</b>" and pd.isna(frame.loc["BPR", "NDCG@10"])
    for row in result.board.ranked:
        found = np.load(result.folder / row.runs[0].per_user)["NDCG@10"].mean()
        assert frame.loc[row.model, "NDCG@10"] == pytest.approx(found)
        assert frame.loc[row.model, "NDCG@10 low"] < found < frame.loc[row.model, "NDCG@10 high"]
    assert frame["NDCG@10"].dtype == float and set(frame) < set(result.numbers) and result.ok
    with pytest.raises(UserError, match="nothing holds no run"):
        BenchmarkResult("nothing").frame  # noqa: B018


def test_a_leaderboard_shows_itself_and_escapes_what_it_shows(result):
    page = result._repr_html_()
    assert "it &lt;b&gt;broke" in page and "<b>broke" not in page and "<script" not in page
    assert re.findall(r'(?:src|href)="?([^" >]*)', page) == []
    assert all(f"<td>{model}</td>" in page for model in result.frame.index)
    assert str(result).startswith("demo: ") and "MLLMMSR" in str(result)


def test_a_figure_is_one_svg_whose_rules_touch_nothing_else_on_the_page(result, tmp_path):
    figure = result.figure()
    figure.save(tmp_path / "cost.svg")
    drawn = ElementTree.parse(tmp_path / "cost.svg").getroot()
    assert figure._repr_svg_() == (tmp_path / "cost.svg").read_text() and drawn.tag.endswith("}svg")
    style = next(node.text for node in drawn.iter() if node.tag.endswith("}style"))
    selectors = re.findall(r"([^{};]+)\{", re.sub(r"@media[^{]*\{", "", style))
    assert len(selectors) > 10
    assert all(one.strip().startswith("svg.recbole-mllm") for rule in selectors for one in rule.split(","))
    assert {"MLLMMSR", "SASRec", "Pop"} <= {node.text for node in drawn.iter() if node.tag.endswith("}text")}
    (tmp_path / "other").mkdir()
    append(tmp_path / "other" / RECORDS, plant_run(tmp_path / "other", "BPR", 0.0, status="broken"))
    with pytest.raises(UserError, match="no chart"):
        BenchmarkResult(tmp_path / "other").figure()


def test_a_checkpoint_is_asked_for_by_its_row(result, monkeypatch):
    from recbole_mllm import recommender

    monkeypatch.setattr(recommender, "Recommender", lambda path, **more: (path, more))
    run = next(row.runs[0].run_id for row in result.board.ranked if row.model == "SASRec")
    assert result.recommender("SASRec", top_k=5) == (result.folder / "runs" / run, {"top_k": 5})
    for wrong in ({"model": "BPR"}, {"model": "SASRec", "seed": 7}):
        with pytest.raises(UserError, match=r"no finished run of \w+; there are .*SASRec \(seed 2024\)"):
            result.recommender(**wrong)


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    rows = [f"u{u},i{(u + t) % 9},{1000 * u + t}\n" for u in range(6) for t in range(5)] + ["u9,i0,1\n"]
    (folder / "log.csv").write_text("user,item,time\n" + "".join(rows))
    return folder


def test_a_conversion_returns_what_it_wrote_and_prints_nothing(raw, tmp_path, capsys):
    done = run_convert("csv", raw, tmp_path / "dataset" / "made", interactions="log.csv", k_core=(2, 1), seed=None)
    assert done.path == tmp_path / "dataset" / "made"
    rows = list(read_atomic(done.path / "made.inter"))
    written = {"interactions": len(rows), "users": len({row["user_id"] for row in rows})}
    assert done.counts == written | {"items": len({row["item_id"] for row in rows})} and written["users"] == 6
    assert list(done.frame) == ["after", "users", "items", "interactions", "dropped"]
    assert done.frame["dropped"].sum() == 31 - len(rows) and "written: " in done.text
    health = run_inspect("made")
    assert f"interactions  {len(rows)}" in re.sub(r" +", "  ", str(health)) and health.path.is_file()
    assert capsys.readouterr().out == ""


def test_a_mistake_is_the_commands_line(raw, tmp_path, capsys):
    small_world.write(tmp_path / "dataset", images=False)
    for call, said in (
        (lambda: run_convert("csv", raw, "out", interactions="lg.csv"), "lg.csv"),
        (lambda: run_convert("csv", raw, "out", colour="x"), "--colour"),
        (lambda: run_convert("csv", raw, "x" * 300), "File name too long; give another name"),
        (lambda: run_convert("csv", raw, "o\0ut"), "embedded null byte; give another name"),
        (lambda: run_inspect("mode"), "no dataset 'mode'"),
        (lambda: run_benchmark("steps", ["Pop", "SASRek"]), "did you mean SASRec"),
        (lambda: run_benchmark("steps", "Pop", config_dict={"epohcs": 1}), "did you mean epochs"),
        (lambda: run_benchmark("steps", "Pop", jobs=0), "--jobs is 0"),
        (lambda: run_benchmark(None), "dataset is None; it must be the name of a folder"),
        (lambda: run_benchmark("steps", 5), "--models is 5; it must be a text"),
        (lambda: run_benchmark("steps", None), "--models is None; "),
        (lambda: run_benchmark("steps", "Pop", seeds="x"), "--seeds is 'x'; it must be a whole number"),
        (lambda: run_benchmark("steps", "Pop", seeds=-12), "--seeds is -12; "),
        (lambda: run_benchmark("steps", "Pop", jobs="2"), "--jobs is '2'"),
        (lambda: run_benchmark("steps", "Pop", config_dict=5), "config_dict is 5; it must be a dict"),
        (lambda: run_benchmark("steps", "Pop", config_file_list=5), "config_file_list is 5; "),
        (lambda: run_inspect(None), "no dataset 'None'"),
        (lambda: run_inspect("steps", config_dict={"limit_users": 3}), "run_inspect takes no --limit_users; of"),
        (lambda: run_inspect("steps", config_dict=["data_path"]), "config_dict is ['data_path']; it must be a dict"),
        (lambda: run_convert(None, raw, "out"), "'None' is unknown"),
        (lambda: run_summaries(["steps"]), "dataset is ['steps']; "),
        (lambda: run_summaries("steps", stage="item"), "stage is 'item'; it must be one of items, users, all"),
        (lambda: run_summaries("steps"), str(no_model())),
        (lambda: run_summaries("steps", config_file_list=["dmeo"]), "is no preset"),
    ):
        with pytest.raises(UserError) as found:
            call()
        assert said in str(found.value) and "\n" not in str(found.value)
    assert not Path("out").exists() and not Path("results").exists()


def test_summaries_come_back_as_the_files_hold_them(tmp_path):
    small_world.write(tmp_path / "dataset", images=False)
    with serving(Planned()) as planned:
        keys = dict.fromkeys(("item_summarizer", "user_summarizer"), f"server:m@{planned.url}")
        keys |= {"item_summary": "text", "use_image": False, "prompt_style": "demo", "limit_users": 4, "seed": 3}
        found = run_summaries("steps", config_dict=keys)
        asked = len(planned.bodies)
        again = run_summaries("steps", config_dict=keys, stage="items")
        assert len(planned.bodies) == asked, "what the store has is not written again"
    assert list(found.items) == ["item_id", "title", "summary"] and len(found.items) > 0
    assert all(found.items["title"] == "title of " + found.items["item_id"])
    by_suffix = {path.suffix: list(read_atomic(path)) for path in found.paths}
    assert list(found.items["summary"]) == [row["summary"] for row in by_suffix[".isum"]]
    assert list(found.users) == ["user_id", "seen", "history", "summary"]
    assert len(again.users) == 0 and [path.suffix for path in again.paths] == [".isum"]
    assert [str(seen) for seen in found.users["seen"]] == [row["seen"].removesuffix(".0") for row in by_suffix[".usum"]]
    assert found.users["seen"].between(1, small_world.LENGTH).all() and not found.notes
    assert again.items.equals(found.items)


def test_a_notebook_has_a_progress_bar(monkeypatch, capsys):
    with Progress(3, "work", "row") as progress:
        assert progress._bar is None
    shell = types.SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    with Progress(3, "work", "row") as progress:
        progress.update(3)
        assert progress._bar is not None and progress._bar.n == 3
    assert "work: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["demo", Path("demo"), ["demo"], (Path("demo"),)])
def test_one_configuration_file_needs_no_list(given):
    assert options_of(given, {"seed": 3}) == options_of(["demo"], {"seed": 3})
