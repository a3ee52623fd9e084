"""The leaderboard says what was planted, no more, and says it alike in every form."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from recbole_mllm.benchmark.evidence import Evidence
from recbole_mllm.benchmark.html import group_charts, page, quality_versus_cost, series
from recbole_mllm.benchmark.leaderboard import COSTS, Leaderboard, LeaderboardRow, Score
from recbole_mllm.benchmark.ranking import Contender, build, compare_rows
from recbole_mllm.benchmark.records import RunRecord, append, read_arrays
from recbole_mllm.benchmark.report import read_leaderboard, render, write_note
from recbole_mllm.benchmark.significance import draw_users, sort_pairs
from recbole_mllm.benchmark.tables import escape_latex, format_latex, format_markdown, format_table, numbers_table
from recbole_mllm.benchmark.wording import added, legend, uses
from recbole_mllm.common.errors import UserError
from tests.planted_runs import CANDIDATES, plant_run, user_metrics

ROOT = Path(__file__).resolve().parents[2]
EVIL = '<script>alert("1")</script>|&'


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, list[RunRecord]]:
    """A strong MLLM, a middling baseline that is the best one, a weak baseline and a twin of the best."""
    results = tmp_path_factory.mktemp("results")
    planted = [("Pop", 0.1, "baseline"), ("SASRec", 1.0, "baseline"), ("MLLMMSR", 2.2, "mllm"), ("[Twin]", 1.0, "mllm")]
    return results, [plant_run(results, label, power, kind) for label, power, kind in planted]  # type: ignore[arg-type]


@pytest.fixture
def field(world, tmp_path) -> list[RunRecord]:
    """The runs of `world`, with arrays of their own in `tmp_path`."""
    shutil.copytree(world[0], tmp_path, dirs_exist_ok=True)
    return list(world[1])


@pytest.fixture(scope="module")
def board(world) -> Leaderboard:
    return build(world[1], world[0])


def per_user(results: Path, record: RunRecord, metric: str) -> np.ndarray:
    arrays = read_arrays(results / str(record.per_user), ["user", metric])
    return arrays[metric][np.argsort(arrays["user"])]


def row_of(board: Leaderboard, model: str) -> dict:
    return next(row for row in board.to_json()["rows"] if row["model"] == model)


def test_the_planted_order_comes_out_and_the_best_baseline_is_the_reference(board):
    names = [row.model for row in board.rows]
    assert names[0] == "MLLMMSR" and names[-1] == "Pop" and board.best_baseline == "SASRec"
    p = {name: row_of(board, name)["metrics"]["NDCG@10"]["p_vs_best_baseline"] for name in names}
    assert p["SASRec"] is None and p["MLLMMSR"] < 0.001 and p["[Twin]"] > 0.05
    assert row_of(board, "Pop")["metrics"]["AUC"]["p_vs_best_baseline"] < 0.001


def test_the_published_schema_to_the_letter(board):
    told = json.loads(json.dumps(replace(board, future_share=0.5).to_json(), allow_nan=False))
    about = ["dataset", "protocol", "future_share", "candidates", "n_users", "metrics", "best_baseline"]
    assert list(told) == [*about, "best_baseline_chosen_on", "rows"]
    assert (told["best_baseline"], told["best_baseline_chosen_on"]) == ("SASRec", "validation")
    assert (told["dataset"], told["candidates"], told["n_users"]) == ("demo", CANDIDATES, 120)
    assert {"Hit@5", "MRR@5", "NDCG@5", "Recall@5", "NDCG@3", "NDCG@10", "GAUC", "AUC"} <= set(told["metrics"])
    own = ["model", "seeds", "status", "tested_against", "metrics", "converged", "summarize_reused", "cost", "slices"]
    for row in told["rows"]:
        assert list(row) == own and list(row["slices"]) == ["cold", "warm", "tail"]
        assert list(row["metrics"]) == told["metrics"]
        assert list(row["cost"]) == ["load_s", "summarize_s", "train_s", "score_s", "pairs_per_s", "peak_memory_mb"]
        for score in row["metrics"].values():
            assert list(score) == ["mean", "ci95", "p_vs_best_baseline", "p_raw", "p_holm"]
            assert score["ci95"][0] <= score["mean"] <= score["ci95"][1]
        for part in row["slices"].values():
            assert list(part) == told["metrics"] and all(list(cell) == ["mean", "n"] for cell in part.values())


def test_every_p_value_recomputed_from_the_arrays(field, tmp_path):
    """t-tests and Holm's correction written out, without pooled AUC, which has no per-user values to recompute from.

    With one target Recall is Hit, so the family holds one of the two.
    """
    board = build([replace(record, scores=None) for record in field], tmp_path)
    by_label = {record.label: record for record in field}
    raw: dict[tuple[str, str], float] = {}
    for label in ("Pop", "MLLMMSR", "[Twin]"):
        for metric in (name for name in board.metrics if not name.startswith("Recall")):
            mine, best = (per_user(tmp_path, by_label[name], metric) for name in (label, "SASRec"))
            raw[label, metric] = float(stats.ttest_rel(mine, best).pvalue)
            assert row_of(board, label)["metrics"][metric]["mean"] == pytest.approx(mine.mean())
    corrected = 0.0
    for place, (label, metric) in enumerate(sorted(raw, key=raw.__getitem__)):
        corrected = max(corrected, min(1.0, (len(raw) - place) * raw[label, metric]))
        told = row_of(board, label)["metrics"]
        assert told[metric]["p_raw"] == pytest.approx(raw[label, metric])
        assert told[metric]["p_holm"] == told[metric]["p_vs_best_baseline"] == pytest.approx(corrected)
        if metric.startswith("Hit"):
            same = told[metric.replace("Hit", "Recall")]
            assert (same["p_raw"], same["p_holm"]) == (told[metric]["p_raw"], told[metric]["p_holm"])


def test_slices_recomputed_from_the_arrays(world, board):
    results, records = world
    arrays = read_arrays(results / str(records[2].per_user), [])
    masks = {"cold": arrays["train_count"] == 0, "warm": arrays["train_count"] > 0, "tail": arrays["tail"]}
    for name, mask in masks.items():
        cell = row_of(board, "MLLMMSR")["slices"][name]["NDCG@10"]
        assert cell == {"mean": pytest.approx(arrays["NDCG@10"][mask].mean()), "n": mask.sum()}
    scores = read_arrays(results / str(records[2].scores), [])
    cold = np.isin(scores["user"], arrays["user"][masks["cold"]])
    positive, negative = (scores["score"][cold & (scores["label"] == label)] for label in (1, 0))
    auc = (positive[:, None] > negative).mean()
    assert row_of(board, "MLLMMSR")["slices"]["cold"]["AUC"]["mean"] == pytest.approx(auc)


def test_seeds_of_other_weights_are_another_row(tmp_path):
    def planted(seed, weights):
        config = {"provenance": {"weights": {"mllm": weights}}} if weights else {}
        return plant_run(tmp_path, "MLLMMSR", 1.0, "mllm", seed=seed, config=config)

    same = [planted(seed, weights) for seed, weights in ((1, "m@aa"), (2, "m@aa"), (3, ""))]
    assert [row.seeds for row in build(same, tmp_path).rows] == [(1, 2, 3)], "an older record does not say"
    rows = build([*same[:2], planted(3, "m@bb")], tmp_path).rows
    assert sorted(row.seeds for row in rows) == [(1, 2), (3,)] and all("weights" in row.model for row in rows)
    fused = [
        plant_run(tmp_path, "MLLMMSR+SASRec", 1.2, "fused", seed=seed, fusion={"chosen": "mixture"},
                  config={"per_model": {"MLLMMSR": {"provenance": {"weights": {"mllm": weights}}}, "SASRec": {}}})
        for seed, weights in ((1, "m@aa"), (3, "m@bb"))
    ]  # fmt: skip
    assert [record.weights for record in fused] == [{"mllm": "m@aa"}, {"mllm": "m@bb"}]


def test_a_seed_that_says_the_weights_of_fewer_models_is_of_the_same_row(tmp_path):
    """As a feature model's of an earlier version, which did not say those of its encoder."""
    models = [{"mllm": "m#1"}, {"mllm": "m#1", "feature_encoder": "e#2"}]
    seeds = [
        plant_run(tmp_path, "SASRecF", 1.0, seed=seed, config={"provenance": {"weights": weights}})
        for seed, weights in enumerate(models)
    ]
    assert [row.seeds for row in build(seeds, tmp_path).rows] == [(0, 1)]


def test_seeds_are_averaged_per_user(tmp_path):
    records = [plant_run(tmp_path, "SASRec", 1.0, seed=seed) for seed in (1, 2, 3)]
    board = build([*records, plant_run(tmp_path, "Pop", 0.1)], tmp_path)
    row = row_of(board, "SASRec")
    both = np.mean([per_user(tmp_path, record, "NDCG@10") for record in records], axis=0)
    low, high = row["metrics"]["NDCG@10"]["ci95"]
    assert row["seeds"] == (1, 2, 3)
    assert row["metrics"]["NDCG@10"]["mean"] == pytest.approx(both.mean())
    assert high - low == pytest.approx(2 * 1.96 * stats.sem(both), rel=0.1)
    assert row["cost"]["train_s"] == 20.0
    values = [f"{record.metrics['NDCG@10']:.3f}" for record in records]
    said = "NDCG@10 by seed, which no interval or test holds: SASRec {}, {} and {}.".format(*values)
    assert said in legend(board)
    assert "Each model was trained once" in legend(build(records[:1], tmp_path))


def test_rows_of_other_seeds_are_compared_on_those_that_both_have(tmp_path):
    """What takes the baseline alone adds nothing to it, whatever other seeds the baseline was trained with."""
    baseline = [plant_run(tmp_path, "SASRec", 1.0, seed=seed) for seed in (1, 2, 3)]
    fusion = {"chosen": "second", "alpha": 0.0, "rho": 0.0, "parts": {baseline[0].run_id: baseline[0].started}}
    fused = plant_run(tmp_path, "MLLMMSR+SASRec", 0, "fused", seed=1, fusion=fusion)
    arrays = {name: str(getattr(baseline[0], name)) for name in ("per_user", "scores")}
    fused = replace(fused, metrics=baseline[0].metrics, **arrays)
    board = build([*baseline, fused], tmp_path)
    row = next(row for row in board.rows if row.fusions)
    assert row.tested_on == (1,) and {score.difference for score in row.scores.values()} == {0.0}
    assert {name: one.mean for name, one in row.apart.items()} == {"cold": 0.0, "warm": 0.0}
    assert "MLLMMSR+SASRec and SASRec are compared on seed 1 alone, which both have." in legend(board)
    (said,) = added(board)
    assert "+0.000 NDCG@10 [+0.000, +0.000]" in said and "on seed 1 alone, of all seeds MLLMMSR+SASRec" in said
    apart = build([*baseline, plant_run(tmp_path, "Pop", 0.1, seed=7)], tmp_path)
    assert "Pop and SASRec are compared over all seeds of each, as they share none." in legend(apart)
    score = next(row for row in apart.rows if row.model == "Pop").scores["NDCG@10"]
    assert score.difference == pytest.approx(score.mean - np.mean([run.metrics["NDCG@10"] for run in baseline]))


def test_a_variant_is_not_tested_against_a_full_model_of_other_weights(field, tmp_path):
    def weighing(record, digest):
        config = {"mllm": "mine", "provenance": {"weights": {"mllm": f"mine#{digest}"}}}
        return replace(record, config=record.config | config)

    full = [weighing(record, "a" * 16) if record.kind == "mllm" else record for record in field]
    variant = plant_run(tmp_path, "MLLMMSR:block-4", 1.0, "mllm")
    same, other = (build([*full, weighing(variant, digit * 16)], tmp_path) for digit in "ab")
    assert [row.tested_against for row in same.rows if row.model == variant.label] == ["MLLMMSR"]
    assert [row.tested_against for row in other.rows if row.model == variant.label] == ["SASRec"]
    assert uses(same) and not uses(other) and "stood for several" not in legend(same)
    told = {f"mine#{digit * 16} of {row}" for digit, row in (("a", "MLLMMSR and [Twin]"), ("b", "MLLMMSR:block-4"))}
    (said,) = re.findall(r"mine stood for several weights: (.*?)\. ", legend(other))
    assert set(said.split("; ")) == told


def test_arrays_that_are_not_their_records_cost_the_row(field, tmp_path):
    """As after ``--force``, killed between the arrays and the record."""
    (tmp_path / str(field[1].per_user)).write_bytes((tmp_path / str(field[0].per_user)).read_bytes())
    board = build(field, tmp_path)
    (lost,) = (row for row in board.rows if not row.ok)
    assert lost.model == "SASRec" and "are not its record's; run it again with --force" in lost.status
    rounded = {name: float(round(value)) for name, value in field[0].metrics.items()}
    whole = replace(field[0], config=field[0].config | {"metric_decimal_place": 0}, metrics=rounded)
    assert build([whole], tmp_path).rows[0].ok


def test_rows_are_ranked_by_the_metric_that_they_were_validated_by(field, tmp_path):
    def chosen_by(records, metric):
        return [replace(run, config=run.config | {"valid_metric": metric}) for run in records]

    by_hit = build(chosen_by(field, "hit@5"), tmp_path)
    assert by_hit.valid_metric == "Hit@5" and "by Hit@5 on test" in legend(by_hit), "validation has no Hit@5"
    both = [*chosen_by(field[:1], "Hit@5"), *chosen_by(field[1:], "MRR@10")]
    assert build(both, tmp_path).valid_metric == "NDCG@10" == build(field, tmp_path).valid_metric
    of_all = [replace(run, metrics={**run.metrics, "ItemCoverage@10": 0.5}) for run in field]  # no user has a value
    assert build(chosen_by(of_all, "ItemCoverage@10"), tmp_path).valid_metric == "NDCG@10"


def test_two_sets_of_candidates_are_refused_by_name(field, tmp_path):
    other = plant_run(tmp_path, "BPR", 0.5, candidates="other-digest")
    with pytest.raises(UserError) as error:
        build([*field, other], tmp_path)
    assert CANDIDATES in str(error.value) and "other-digest" in str(error.value)
    assert field[0].run_id in str(error.value) and other.run_id in str(error.value)


def test_a_failed_run_and_unusable_arrays_cost_their_own_row_each(field, tmp_path):
    sound = plant_run(tmp_path, "BPR", 0.5)
    failed = replace(sound, run_id="NGCF-2024-0a1b2c3d", label="NGCF", status="boom", metrics={}, candidates="")
    for record, harm in zip(field, ("missing", "nan", "doubled", "others"), strict=True):
        path = tmp_path / str(record.per_user)
        arrays = read_arrays(path, [])
        path.unlink()
        changes = {
            "nan": {"NDCG@10": np.full(120, np.nan)},
            "doubled": {"user": np.full(120, "u1")},
            "others": {"user": np.char.add("x", arrays["user"])},
        }
        if harm != "missing":
            np.savez(path, **(arrays | changes[harm]))
    board = build([sound, *field, failed], tmp_path)
    assert [row.model for row in board.rows if row.ok] == ["BPR"] and len(board.rows) == 6
    assert all(row.runs[0].run_id in row.status for row in board.rows[1:] if row.model != "NGCF")
    row = row_of(board, "NGCF")
    assert row["status"] == "boom" and row["slices"]["tail"]["AUC"] == {"mean": None, "n": 0}
    assert row["metrics"]["AUC"] == dict.fromkeys(("mean", "ci95", "p_vs_best_baseline", "p_raw", "p_holm"))
    assert "NGCF seed 2024 failed: boom" in format_table(board)
    again = replace(sound, run_id="BPR-2024-99999999", status="typo", metrics={})
    assert len(build([again, sound], tmp_path).rows) == 1, "it has finished since"
    later = replace(again, started="2026-01-02T10:00:00+01:00")
    assert [row.ok for row in build([sound, later], tmp_path).rows] == [True, False], "other settings, tried later"


def test_only_failures_still_make_a_page(field, tmp_path):
    append(tmp_path / "runs.jsonl", replace(field[0], status="boom", metrics={}))
    board = render(tmp_path)
    assert board.best_baseline is None and "nothing to rank" in (tmp_path / "leaderboard.html").read_text()
    with pytest.raises(UserError, match="holds no run"):
        build([], tmp_path)


def test_what_is_not_there_is_not_claimed(field, tmp_path):
    """AUC without scores has no interval; MLLMs alone have no baseline to be tested against."""
    records = [replace(record, scores=None, metrics={**record.metrics, "AUC": 0.7}) for record in field[2:]]
    board = build(records, tmp_path)
    row = row_of(board, "MLLMMSR")
    assert {name: value for name, value in row["metrics"]["AUC"].items() if value is not None} == {"mean": 0.7}
    assert row["metrics"]["GAUC"]["ci95"] is not None and board.best_baseline is None
    assert all(score.p is None for row in board.rows for score in row.scores.values())
    assert "nothing is tested" in format_table(board)


def test_every_form_says_the_same_numbers_and_the_page_loads_nothing(field, tmp_path):
    for record in reversed(field):
        append(tmp_path / "runs.jsonl", record)
    write_note(tmp_path, "A world\nmade up.")
    render(tmp_path)
    files = [tmp_path / f"leaderboard.{end}" for end in ("json", "csv", "md", "html")]
    first = [path.read_text() for path in files]
    render(tmp_path)
    assert [path.read_text() for path in files] == first, "rendering twice changes not a byte"
    saved, _, markdown, page = first
    told, table = json.loads(saved), list(csv.DictReader(io.StringIO(first[1])))
    terminal = format_table(read_leaderboard(tmp_path))
    for row, line in zip(told["rows"], table, strict=True):
        score = row["metrics"]["NDCG@10"]
        assert (line["model"], float(line["NDCG@10"])) == (row["model"], score["mean"])
        assert [float(line["NDCG@10 low"]), float(line["NDCG@10 high"])] == score["ci95"]
        p = [score[key] for key in ("p_vs_best_baseline", "p_raw", "p_holm")]
        assert [line[f"NDCG@10 {end}"] for end in ("p", "p_raw", "p_holm")] == [
            "" if value is None else str(value) for value in p
        ]
        assert float(line["cold AUC"]) == row["slices"]["cold"]["AUC"]["mean"]
        for text in (markdown, page, terminal):
            assert f"{score['mean']:.3f}" in text and row["model"] in text and "A world made up." in text
    assert "[{:.3f}, {:.3f}]".format(*told["rows"][0]["metrics"]["AUC"]["ci95"]) in markdown and "n.s." in markdown
    assert "epochs: 3" in markdown and "epochs: 3" in page and CANDIDATES in page
    assert not re.search(r"https?://|//cdn|@import|url\((?!data:)|<link(?![^>]*href=\"data:)", page)


def test_every_form_states_the_share_of_targets_whose_future_was_trained_on(field, tmp_path):
    for record in field:
        append(tmp_path / "runs.jsonl", replace(record, future_share=0.9987))
    board = render(tmp_path)
    sheet = list(csv.DictReader(io.StringIO((tmp_path / "leaderboard.csv").read_text())))
    assert {line["future_share"] for line in sheet} == {"0.9987"} and board.to_json()["future_share"] == 0.9987
    pages = [(tmp_path / f"leaderboard.{end}").read_text() for end in ("md", "html", "tex")]
    for text in (*pages, format_table(read_leaderboard(tmp_path))):
        assert "0.999: training has interactions, of any user, that are later than 99.9" in " ".join(text.split())


def test_texts_are_escaped_and_nothing_else(tmp_path):
    evil = plant_run(
        tmp_path, EVIL, 0.5, run_id="evil-1", dataset=EVIL, protocol=EVIL, device=EVIL, config={"note": EVIL}
    )
    entity = plant_run(tmp_path, "A&lt;B", 0.9, run_id="odd-1", dataset="a<b && c")
    for record in (evil, entity, replace(evil, run_id="evil-2", seed=7, status=EVIL, metrics={})):
        append(tmp_path / "runs.jsonl", record)
    board = render(tmp_path)
    page, text = (tmp_path / "leaderboard.html").read_text(), format_markdown(board)
    assert "alert(" in page and "<script>alert" not in page and page.count("<script") == 1
    table = [line for line in text.split("\n") if line.startswith("|")]
    assert all("<script" not in line for line in table)
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table if "alert" in line or "NDCG@5" in line}) <= 3
    assert set(numbers_table(board)["model"]) == {EVIL, "A&lt;B"}
    assert "| A&amp;lt;B |" in text and "<summary>A&amp;lt;B, seed 2024</summary>" in text, "no entity is decoded"
    assert "--dataset 'a<b && c'" in text and "p < 0.05" in text, "code decodes nothing"


def test_marks_of_a_large_field_carry_their_number_in_the_table_and_labels_do_not_overlap(board):
    rows = [replace(board.rows[1], model=f"Twin{number:02d}", kind="baseline") for number in range(10)]
    many = replace(board, rows=tuple(rows))
    chart, few = quality_versus_cost(many), quality_versus_cost(replace(board, rows=tuple(rows[:6])))
    assert chart is not None and few is not None and few.more["key"] == [] and len(few.marks) == 6
    assert min(np.diff(sorted(mark.label_y for mark in few.marks))) > 15, "of 15 pixels on a narrow screen"
    assert [(mark.label, mark.name) for mark in chart.more["key"]] == [
        (str(number), row.model) for number, row in enumerate(rows, start=1)
    ]
    long = quality_versus_cost(replace(board, rows=(*rows[:2], replace(rows[2], model="MLLMMSR:no-image-summary"))))
    assert long is not None and [mark.name for mark in long.more["key"]][2] == "MLLMMSR:no-image-summary"
    assert re.search(r'<li class="baseline" value="7"><span class="model">Twin06</span>', page(many))


def test_the_terminal_table_is_aligned_and_fits(board, field, tmp_path):
    long = plant_run(tmp_path, "MLLMMSR:" + "long" * 20, 0.3, "mllm", summarize_s=123456.0, train_s=98765.0)
    for text in (format_table(board), format_table(build([*field, long], tmp_path))):
        lines = text.split("\n")
        assert max(map(len, lines)) <= 120
        rule = next(index for index, line in enumerate(lines) if line.startswith("──"))
        assert len({len(line) for line in lines[rule - 1 : rule + 5]}) == 1
        assert "SASRec (ref.)" in text and "n.s." in text


def test_reports_need_neither_torch_nor_recbole():
    names = "report records runner ranking leaderboard"
    script = f"import sys\nfor n in '{names}'.split(): __import__('recbole_mllm.benchmark.' + n)\n" + (
        "bad = {'torch', 'recbole', 'transformers'} & set(sys.modules)\nsys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_variant_is_tested_against_its_full_model_and_not_against_a_baseline(field, tmp_path):
    direct = plant_run(tmp_path, "MLLMMSR:direct", 1.0, "mllm")
    board = build([*field, direct], tmp_path)
    row = row_of(board, "MLLMMSR:direct")
    assert row["tested_against"] == "MLLMMSR" and row_of(board, "MLLMMSR")["tested_against"] == "SASRec"
    mine, full = per_user(tmp_path, direct, "NDCG@10"), per_user(tmp_path, field[2], "NDCG@10")
    score = row["metrics"]["NDCG@10"]
    assert score["p_raw"] == pytest.approx(stats.ttest_rel(mine, full).pvalue)
    assert score["p_raw"] < score["p_holm"] < 0.05 and score["p_vs_best_baseline"] is None
    assert "▼" in next(line for line in format_table(board).split("\n") if line.startswith("MLLMMSR:direct"))
    for text in (format_table(board), format_markdown(board), page(board)):
        assert "MLLMMSR:direct against MLLMMSR" in " ".join(text.split())
    assert board.rows[0].model == "MLLMMSR" and "MLLMMSR is" in format_markdown(board)  # whom the first sentence is of
    alone = build([field[2], direct], tmp_path)
    assert row_of(alone, "MLLMMSR:direct")["metrics"]["NDCG@10"]["p_raw"] == score["p_raw"]
    assert "No baseline has finished; tested are MLLMMSR:direct against MLLMMSR." in format_markdown(alone)


def test_of_two_full_models_a_variant_is_tested_against_the_one_that_differs_least(field, tmp_path):
    config = {"epochs": 9, "seed": 2024}
    other = plant_run(tmp_path, "MLLMMSR", 2.0, "mllm", digest="ffffffff", config=config)
    variant = plant_run(tmp_path, "MLLMMSR:direct", 1.0, "mllm", config=config | {"summary_mode": "direct"})
    board = build([*field, other, variant], tmp_path)
    assert {"MLLMMSR (0a1b2c3d)", "MLLMMSR (ffffffff)"} < {row.model for row in board.rows}
    assert row_of(board, "MLLMMSR:direct")["tested_against"] == "MLLMMSR (ffffffff)"


def test_the_best_baseline_is_the_best_on_validation_not_the_luckiest_on_test(field, tmp_path):
    lucky = plant_run(tmp_path, "BPR", 1.6, valid={"NDCG@10": 0.2})
    board = build([*field, lucky], tmp_path)
    assert row_of(board, "BPR")["metrics"]["NDCG@10"]["mean"] > row_of(board, "SASRec")["metrics"]["NDCG@10"]["mean"]
    assert board.best_baseline == "SASRec" and row_of(board, "BPR")["tested_against"] == "SASRec"
    assert "the best baseline by NDCG@10 on validation" in format_markdown(board)


def test_records_without_validation_fall_back_to_test_and_say_so(field, tmp_path):
    """What an earlier version recorded: no validation metric, no loading seconds, nothing about convergence."""
    lines = [json.loads(record.to_line()) for record in field]
    for line in lines:
        for name in ("valid", "converged", "load_s", "summarize_reused"):
            del line[name]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    board = render(tmp_path)
    told = board.to_json()
    assert (told["best_baseline"], told["best_baseline_chosen_on"]) == ("SASRec", "test")
    assert all(row["converged"] is None and row["cost"]["load_s"] is None for row in told["rows"])
    for text in (format_table(board), *((tmp_path / f"leaderboard.{end}").read_text() for end in ("md", "html"))):
        assert "chosen on the test split because" in " ".join(text.split()) and "Pop" in text
    assert "Recorded by an earlier version" in (tmp_path / "leaderboard.md").read_text()
    assert "on test" in (tmp_path / "leaderboard.tex").read_text()


def test_what_had_not_converged_is_marked_in_every_form(field, tmp_path):
    stopped = plant_run(tmp_path, "GRU4Rec", 0.9, converged=False)
    other = replace(stopped, run_id="GRU4Rec-2025-0a1b2c3d", seed=2025, converged=True)
    board = build([*field, stopped, other], tmp_path)
    told = {row["model"]: row["converged"] for row in board.to_json()["rows"]}
    assert told == {"GRU4Rec": False, "SASRec": True, "Pop": None, "MLLMMSR": True, "[Twin]": True}
    converged = numbers_table(board).set_index("model")["converged"]
    assert [converged[model] for model in ("GRU4Rec", "SASRec", "Pop")] == ["false", "true", None]
    assert "| GRU4Rec ‡ not converged |" in format_markdown(board)
    assert page(board).count("‡ not converged</b>") == 1
    tex = format_latex(board)
    assert r"GRU4Rec$^{\ddagger}$" in tex and r"$\ddagger$ not converged" in tex and r"SASRec$^{\dagger}$" in tex
    assert "GRU4Rec ‡" in format_table(board) and "Not converged" in format_table(board)


def test_costs_say_what_they_hold(field, tmp_path):
    """Reused summaries carry a mark, making features a column where a row has some, and --tune a sentence."""
    reader = replace(field[2], summarize_reused=7, load_s=3.0, train_s=None)
    board = build([*field[:2], reader], tmp_path)
    row = row_of(board, "MLLMMSR")
    assert (row["summarize_reused"], row["cost"]["load_s"], row["cost"]["train_s"]) == (7, 3.0, None)
    assert [*row["cost"], "energy_kwh"] == COSTS
    for text in (format_table(board), format_markdown(board), page(board)):
        assert "12 s*" in text and "in the store already" in " ".join(text.split())
    text = format_markdown(board)
    assert "in the store already" in text and "| 3 s | 12 s* | – | 3 s |" in text
    assert "--tune" not in text and "Features" not in text
    failed = {"settings": {"n_layers": 3}, "valid": None, "error": "RuntimeError: no", "seconds": 20.0}
    better = {"settings": {"learning_rate": 0.01, "n_layers": 1}, "valid": 0.52, "seconds": 20.0}
    trials = [{"settings": {}, "valid": 0.5, "seconds": 20.0}, failed, better]
    found = {"trials": trials, "chosen": better["settings"], "seconds": 60.0, "metric": "NDCG@10"}
    more = replace(field[1], tuning=found, features_s=12.5)
    board = build([field[0], more, reader], tmp_path)
    search = "SASRec seed 2024, 3 in 60 s: learning_rate 0.01, n_layers 1 with NDCG@10 0.520 (the defaults 0.500)."
    assert search in format_markdown(board).replace("\\", "") and search in page(board)
    same = build([field[0], replace(more, tuning=found | {"chosen": {}}), reader], tmp_path)
    assert "SASRec seed 2024, 3 in 60 s: the defaults with NDCG@10 0.500." in format_markdown(same)
    unknown = [trials[0] | {"valid": None, "error": "RuntimeError: no"}, better]
    kept = build([field[0], replace(more, tuning=found | {"trials": unknown}), reader], tmp_path)
    assert "SASRec seed 2024, 2 in 60 s: learning_rate 0.01, n_layers 1 with NDCG@10 0.520." in page(kept)
    assert "| Features |" in format_markdown(board) and "Energy" not in format_markdown(board)
    metered = replace(reader, energy_kwh=0.0123, energy_of="CPU and GPU")
    board = build([*field[:2], metered], tmp_path)
    assert list(row_of(board, "MLLMMSR")["cost"]) == COSTS and "| Energy kWh |" in format_markdown(board)
    assert "| 0.0123 |" in format_markdown(board) and "(CPU and GPU)" in page(board)
    board = build([field[0], more, reader], tmp_path)
    assert next(row for row in board.rows if row.model == "SASRec").seconds == pytest.approx(20 + 3 + 12.5)
    numbers = numbers_table(board).set_index("model").loc["MLLMMSR"]
    assert [numbers[name] for name in ("summarize_reused", "load_s", "train_s")] == [7, 3.0, None]


def test_all_items_ranked_beside_candidates_stand_in_a_table_that_says_where_the_order_differs(field, tmp_path):
    def ranked(record: RunRecord, value: float, retrieval: dict | None = None) -> RunRecord:
        return replace(
            record, full_ranking={"metrics": {"NDCG@10": value}, "n_users": 90, "retrieval": retrieval}
        )  # fmt: skip

    told = {"retriever": "SASRec#0a", "top_k": 20, "recall": 0.25, "fusion": 1.0}
    pop, sasrec, mllm, twin = field
    seeds = ranked(sasrec, 0.04), ranked(replace(sasrec, run_id="SASRec-2025-0a1b2c3d", seed=2025), 0.06)
    board = build([ranked(pop, 0.07), *seeds, ranked(mllm, 0.09, told), twin], tmp_path)
    assert row_of(board, "SASRec")["full_ranking"] == {
        "metrics": {"NDCG@10": pytest.approx(0.05)}, "n_users": 90, "retrieval": None
    }  # fmt: skip
    assert row_of(board, "MLLMMSR")["full_ranking"]["retrieval"] == told
    assert "full_ranking" not in row_of(board, "[Twin]")
    for text in (format_markdown(board), page(board)):
        assert "here all items put Pop before SASRec. Ranked" in text
        assert "90 users; the best 20 items of SASRec, with a ceiling of 0.250" in text
    assert "| Pop | 0.2" in format_markdown(board) and "| 0.070 | 90 users |" in format_markdown(board)
    assert "All items ranked" not in format_markdown(build(field, tmp_path))
    assert "here they do not." in format_markdown(build([ranked(pop, 0.01), *seeds], tmp_path))


def test_the_groups_stand_in_the_order_of_the_key_also_where_a_baseline_leads(tmp_path):
    powers = {"SASRec": 2.0, "GRU4Rec": 1.4, "MLLMMSR": 1.0, "Pop": 0.1}
    kinds = {"MLLMMSR": "mllm"}
    board = build([plant_run(tmp_path, n, p, kinds.get(n, "baseline")) for n, p in powers.items()], tmp_path)  # type: ignore[arg-type]
    assert series(board) == {"SASRec": "s1", "GRU4Rec": "s2", "MLLMMSR": "s0", "Pop": "s3"}
    for chart in group_charts(board):
        for band in chart.marks:
            downwards = [mark.name for mark in sorted(band.marks, key=lambda mark: mark.y)]
            assert downwards == list(powers) == [model for model, _ in chart.more["table"]]
    key = re.search(r'<ol class="keys">(.*?)</ol>', page(board), re.S)
    assert key and re.findall(r"</svg>([^<]+)</li>", key[1]) == list(powers)


def test_the_latex_table_sets_names_as_they_are_written_and_every_row_has_its_columns(field, tmp_path):
    assert escape_latex("a_b & 50% {#$} ~^ \\x\n<y>") == (
        r"a\_b \& 50\% \{\#\$\} \textasciitilde{}\textasciicircum{} \textbackslash{}x \textless{}y\textgreater{}"
    )
    records = [*field[:2], plant_run(tmp_path, "MLLMMSR:no_image & 100%", 2.2, "mllm"), field[3]]
    failed = replace(plant_run(tmp_path, "BPR", 0.3), status="boom", metrics={})
    table = format_latex(build([*records, failed], tmp_path))
    columns = len(re.findall(r"\\begin\{tabular\}\{l(r+)\}", table)[0]) + 1
    body = table.partition(r"\midrule")[2].partition(r"\bottomrule")[0].strip().split("\n")
    assert len(body) == 5 and all(line.endswith(r"\\") for line in body)
    for line in body:
        assert len(re.findall(r"(?<!\\)&", line)) + 1 == columns or r"\multicolumn{7}{l}{failed}" in line
    assert table.count("{") - table.count(r"\{") == table.count("}") - table.count(r"\}")
    assert not re.search(r"\\\\\s*\[", table), "a bracket after a line's end would be taken for an argument"
    rows = {line.partition(" & ")[0]: line for line in table.split("\n") if " & " in line}
    best = next(line for name, line in rows.items() if name.startswith("MLLMMSR"))
    assert best.count(r"\textbf{") == 7 and r"$^{\blacktriangle}$" in best
    assert r"$^{\blacktriangledown}$" in rows["Pop"] and r"SASRec$^{\dagger}$" in rows
    assert "blacktriangle" not in rows["{[}Twin{]}"].partition(" & ")[2].split(" & ")[0]
    assert CANDIDATES in table and "frozen candidates" in table and r"\toprule" in table


def equal_scorers(
    rng: np.random.Generator, n_users: int, draws: np.ndarray | None
) -> tuple[list[LeaderboardRow], list[Contender]]:
    """Return 12 models that see the target equally well: ten baselines, MLLMMSR and a variant of it."""
    names = [*(f"Twin{number}" for number in range(10)), "MLLMMSR", "MLLMMSR:direct"]
    user, label = np.repeat(np.arange(n_users), 21), np.tile([1.0] + [0.0] * 20, n_users)
    contenders, rows = [], []
    for name in names:
        scores = rng.normal(size=(2, n_users, 21))
        scores[:, :, 0] += 1.0
        valid, values = (user_metrics(part) for part in scores)
        run = RunRecord(
            run_id=name, model=name.partition(":")[0], label=name, kind="mllm" if "MLLM" in name else "baseline",
            seed=1, dataset="null", status="ok", started="", metrics={"NDCG@10": 0.0},
            valid={"NDCG@10": float(valid["NDCG@10"].mean())},
        )  # fmt: skip
        pairs = () if draws is None else (sort_pairs(user, label, scores[1].ravel()),)
        evidence = Evidence(np.arange(n_users).astype(str), values, {}, pairs)
        contenders.append(Contender.of(name, [(run, evidence)], draws))
        means = {metric: Score(float(column.mean())) for metric, column in values.items()}
        rows.append(LeaderboardRow(name, run.kind, (1,), "ok", (run,), means | ({"AUC": Score(0.5)} if pairs else {})))
    return rows, contenders


@pytest.mark.parametrize(
    ("n_users", "repetitions", "pooled"),
    [(40, 80, False), *(pytest.param(n, 1000, n < 100, marks=pytest.mark.slow) for n in (30, 60, 300))],
)
def test_a_table_of_equal_scorers_holds_a_false_mark_in_at_most_one_of_twenty(n_users, repetitions, pooled):
    rng = np.random.default_rng(n_users)
    draws = draw_users(n_users, 10**6, seed=1) if pooled else None
    false = by_luck = 0
    for _ in range(repetitions):
        rows, contenders = equal_scorers(rng, n_users, draws)
        tested, best, lacking = compare_rows(rows, contenders, "NDCG@10")
        assert best is not None and not lacking
        false += any(score.significant for row in tested for score in row.scores.values())
        lucky = max(rows[:10], key=lambda row: row.mean("NDCG@10")).model
        by_luck += lucky != best
    assert by_luck > repetitions / 2  # the choice on validation is another one
    assert stats.binomtest(false, repetitions, 0.05, alternative="greater").pvalue > 0.025
