"""A benchmark under full ranking, from real runs to the pages: every row ranks all items, and says what it can."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_world
import tiny_models
import torch

from recbole_mllm.benchmark.cases import DEEPEST, read_cases
from recbole_mllm.benchmark.jobs import BenchmarkPlan, jobs_of
from recbole_mllm.benchmark.ranking import build
from recbole_mllm.benchmark.records import RECORDS, read_arrays, read_records
from recbole_mllm.benchmark.report import render
from recbole_mllm.benchmark.variants import expand
from recbole_mllm.benchmark.worker import run_job
from recbole_mllm.evaluation.fusion import Fusion, align_candidates

TOP_K = 6


def plan(place: Path, *labels: str, **more: Any) -> BenchmarkPlan:
    full = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"}
    keys = {
        "data_path": str(place / "data"), "mllm": str(place / "llava"), "prompt_style": "demo",
        "item_summary_tokens": 3, "user_summary_tokens": 3, "finetune": "none", "eval_args": full,
        "retriever": "SASRec", "top_k": TOP_K,
        "gpu_id": "1", "metric_decimal_place": 7,
    }  # fmt: skip
    quick = place / "quick.yaml"
    quick.write_text("per_model: {SASRec: {epochs: 2}}\n")
    return BenchmarkPlan("steps", labels, (3,), place / "results", (str(quick),), keys | more)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run Pop, SASRec, MLLMMSR and what is fused from the last two."""
    folder: Path = tmp_path_factory.mktemp("full")
    small_world.write(folder / "data")
    tiny_models.llava(folder / "llava")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        for job in jobs_of(plan(folder, *expand("Pop,SASRec,MLLMMSR+SASRec"))):
            job.folder.mkdir(parents=True)
            run_job(json.loads(json.dumps(job.order())))
            assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
            os.chdir(folder)
    return folder


def test_all_rows_rank_the_same_items_and_say_how(place: Path) -> None:
    runs = {run.label: run for run in read_records(place / "results" / RECORDS)}
    assert len({(run.candidates, run.protocol, run.n_users) for run in runs.values()}) == 1
    assert "all items but those the user has met ranked" in runs["Pop"].protocol
    told = runs["MLLMMSR"].retrieval
    assert told is not None and str(told["retriever"]).startswith("SASRec#")
    assert told["top_k"] == TOP_K and told["fusion"] == 1.0 and runs["Pop"].retrieval is None
    # the retriever is trained as its row is, so what it puts first is what the row ranks first
    scores = read_arrays(place / "results" / str(runs["SASRec"].scores), ["label", "place", "among"])
    inside = (scores["label"] > 0) & (scores["among"] - scores["place"] <= TOP_K)
    assert told["recall"] == pytest.approx(inside.sum() / runs["SASRec"].n_users)
    assert all("AUC" not in run.metrics and "GAUC" in run.metrics for run in runs.values())
    left = small_world.ITEMS - (small_world.LENGTH - 1)
    assert set(scores["among"].tolist()) == {left}
    assert runs["Pop"].pairs_per_s == pytest.approx(left * small_world.USERS / runs["Pop"].score_s)
    mine = runs["MLLMMSR"]  # some prompts of the test are those of validation
    assert mine.pairs_per_s == pytest.approx((TOP_K * small_world.USERS - mine.scores_reused) / mine.score_s)


def test_each_run_keeps_its_validation_and_what_could_be_learnt_from(place: Path) -> None:
    for run in read_records(place / "results" / RECORDS)[:3]:
        pairs = read_arrays(
            place / "results" / str(run.valid_scores), ["user", "item", "label", "score", "place", "among"]
        )
        rank = (pairs["among"] - 1 - pairs["place"])[pairs["label"] > 0]
        assert run.valid is not None and len(rank) == small_world.USERS
        assert np.where(rank < 10, 1 / np.log2(rank + 2), 0).mean() == pytest.approx(run.valid["NDCG@10"], abs=1e-6)
        counts = read_arrays(place / "results" / str(run.train_counts), ["item", "count"])
        assert counts["count"].sum() == small_world.USERS * (small_world.LENGTH - 2) and len(counts["item"]) == 60


def test_another_variant_ranks_by_the_same_retriever_and_pays_for_it_too(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    (kept,) = (place / "results" / "retrievers").glob("*.pth")
    before = kept.stat().st_mtime_ns
    first = {run.label: run for run in read_records(place / "results" / RECORDS)}["MLLMMSR"]
    (job,) = jobs_of(plan(place, "MLLMMSR:no-user-summary"))
    job.folder.mkdir(parents=True, exist_ok=True)
    run_job(json.loads(json.dumps(job.order())))
    records = place / "results" / RECORDS
    second = read_records(records)[-1]
    records.write_text("".join(f"{line}\n" for line in records.read_text().splitlines()[:-1]))  # for the other tests
    assert list(kept.parent.glob("*.pth")) == [kept] and kept.stat().st_mtime_ns == before
    assert first.retrieval is not None and second.retrieval is not None
    assert second.retrieval["retriever"] == first.retrieval["retriever"]
    trained = float(torch.load(kept, weights_only=False)["train_s"])
    assert trained > 0 and first.train_s == second.train_s == trained  # zero-shot: nothing but the retriever learns
    assert first.converged is None and second.converged is None


def test_a_fused_row_reorders_what_the_mllm_was_asked_about_and_nothing_else(place: Path) -> None:
    runs = {run.label: run for run in read_records(place / "results" / RECORDS)}
    fused, mllm, sasrec = (runs[label] for label in ("MLLMMSR+SASRec", "MLLMMSR", "SASRec"))
    alone = {"first": mllm, "second": sasrec}.get(fused.fusion["chosen"])
    assert alone is None or {**alone.metrics} == pytest.approx({**fused.metrics}, abs=1e-6)
    files = [read_arrays(place / "results" / str(run.scores), ["user", "item", "place"]) for run in (mllm, sasrec)]
    of = align_candidates(*files, lambda items: np.ones(len(items), bool))
    mixed = Fusion(0.5, 0.1, 0.2, "mixture", 0.0, 0.0).places(of)
    asked = of.among - 1 - of.place < TOP_K
    np.testing.assert_array_equal(asked, of.asked)
    np.testing.assert_array_equal(mixed[~asked], of.place[~asked])
    own = (asked & (of.row == 3)).nonzero()[0]
    m, b = ((x[own] - x[own].mean()) / x[own].std() for x in (of.first, of.second))
    np.testing.assert_array_equal(mixed[own].argsort(), (m / 2 + b / 2).argsort())


def test_the_pages_hold_and_what_cannot_be_had_is_a_dash_with_its_reason(place: Path) -> None:
    results = place / "results"
    board = render(results)
    assert board.metrics[-1] == "AUC" and all(row.ok and row.curves and row.slices for row in board.rows)
    published = json.loads((results / "leaderboard.json").read_text())
    assert all(row["metrics"]["AUC"]["mean"] is None for row in published["rows"])
    assert all(row["metrics"]["NDCG@10"]["ci95"] for row in published["rows"])
    for name in ("leaderboard.html", "leaderboard.md", "leaderboard.tex"):
        page = (results / name).read_text()
        assert "AUC has no value here" in page, name
    assert f"MLLMMSR re-ranks the best {TOP_K} items of SASRec" in (results / "leaderboard.html").read_text()
    hits = {row.model: row.curves["Hit"] for row in board.rows}
    assert all((np.diff(curve) >= 0).all() and len(curve) == 20 for curve in hits.values())
    assert hits["MLLMMSR"][TOP_K - 1 :] == pytest.approx(hits["SASRec"][TOP_K - 1 :])


def test_cases_show_the_top_of_the_ranking_and_the_target_where_it_is(place: Path) -> None:
    results = place / "results"
    book = read_cases(build(read_records(results / RECORDS), results), results)
    assert book is not None and book.problem == "" and book.beside == "SASRec"
    for case in book.cases:
        for shown in (case.mine, case.theirs):
            ranks = [one.rank for one in shown]
            assert ranks[:DEEPEST] == list(range(1, DEEPEST + 1)) and len(shown) in (DEEPEST, DEEPEST + 1)
            assert sum(one.hit for one in shown) == 1
            assert all(book.show(one.item).title == f"title of {one.item}" for one in shown)
        assert [one.p is not None for one in case.mine] == [one.rank <= TOP_K for one in case.mine]
        assert all(one.p is None for one in case.theirs)
