"""Curves are RecBole's own metrics at every k; groups part the users and hide nobody."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recbole.config import Config

import recbole_mllm  # noqa: F401 - RecBole's Config on today's numpy
from recbole_mllm.benchmark.evidence import bands, metric_curves, partitions, target_ranks
from recbole_mllm.benchmark.html import curve_charts, group_charts
from recbole_mllm.benchmark.ranking import build
from recbole_mllm.benchmark.records import read_arrays
from recbole_mllm.benchmark.tables import curves_table, groups_table
from recbole_mllm.evaluation import metrics
from recbole_mllm.evaluation.metrics import per_user
from tests.planted_runs import plant_run


def log_with_ties(n_users: int = 40, candidates: int = 21) -> dict[str, np.ndarray]:
    """Return a `joined` log, best place first, of scores with many ties and a random place among them."""
    rng = np.random.default_rng(5)
    score = rng.integers(0, 6, (n_users, candidates)).astype(float)
    place = np.lexsort((rng.random(score.shape), score), axis=1).argsort(axis=1)
    label = np.zeros(score.shape)
    label[:, 0] = 1
    order = np.argsort(-place, axis=1)
    columns = {"score": score, "place": place, "label": label}
    log = {name: np.take_along_axis(column, order, axis=1).ravel() for name, column in columns.items()}
    return log | {"user_id": np.repeat(np.arange(n_users), candidates)}


def test_every_k_is_what_recboles_classes_say(tmp_path):
    keys = {"topk": list(range(1, 21)), "data_path": str(tmp_path)}
    log = log_with_ties()
    told = per_user(log, Config(model="Pop", dataset="none", config_dict=keys))
    ranks = target_ranks(log["user_id"], log["label"], log["place"], 40)
    assert ranks is not None and ranks.candidates == 21
    for name, values in metric_curves([ranks]).items():
        assert len(values) == 20
        assert values == pytest.approx([told[f"{name}@{k}"].mean() for k in range(1, 21)])
    assert target_ranks(log["user_id"], log["label"], log["score"], 40) is None, "tied scores without places"
    log["label"][np.flatnonzero(log["label"] == 0)[0]] = 1
    assert target_ranks(log["user_id"], log["label"], log["place"], 40) is None, "two targets"
    assert metric_curves([]) == {}


def test_a_metric_of_recboles_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, metrics.Metric("Precision"), metrics.Metric("MAP")))
    keys = {"topk": [1, 5], "data_path": str(tmp_path), "metrics": ["Hit", "MRR", "Precision", "MAP"]}
    told = per_user(log_with_ties(), Config(model="Pop", dataset="none", config_dict=keys))
    assert told["Hit@5"].any() and told["Precision@5"] == pytest.approx(told["Hit@5"] / 5)
    assert told["MAP@5"] == pytest.approx(told["MRR@5"])  # of one target


def test_a_rows_curve_meets_its_table_at_the_configured_k(tmp_path):
    records = [plant_run(tmp_path, "SASRec", 1.0, seed=seed) for seed in (1, 2)]
    board = build([*records, plant_run(tmp_path, "MLLMMSR", 2.0, "mllm")], tmp_path)
    for row in board.rows:
        for name, values in row.curves.items():
            for k in (3, 5, 10):
                assert values[k - 1] == pytest.approx(row.mean(f"{name}@{k}"))
    chart = curve_charts(board)[0]
    assert [mark.name for mark in chart.marks] == ["MLLMMSR", "SASRec"]
    assert f"NDCG@10 {board.rows[0].mean('NDCG@10'):.3f}" in chart.summary
    sheet = curves_table(board).set_index(["model", "metric", "k"])["mean"]
    assert len(sheet) == 2 * 3 * 20 and sheet["SASRec", "NDCG", 10] == pytest.approx(board.rows[1].mean("NDCG@10"))


def test_names_of_equal_curves_do_not_overlap(tmp_path):
    records = [plant_run(tmp_path, f"Model{n}", 50.0) for n in range(9)]
    for chart in curve_charts(build(records, tmp_path)):
        heights = [mark.label_y for mark in chart.marks]
        assert min(np.diff(heights)) > 12 and heights[0] > 0 and heights[-1] <= chart.height


@given(st.lists(st.integers(0, 30), min_size=1, max_size=80), st.integers(1, 12))
def test_bands_part_the_users_in_order_and_keep_equals_together(values, parts):
    masks = list(bands(np.array(values), parts).values())
    assert 1 <= len(masks) <= parts
    assert (np.sum(masks, axis=0) == 1).all() and all(mask.any() for mask in masks)
    for lower, higher in zip(masks, masks[1:], strict=False):
        assert np.array(values)[lower].max() < np.array(values)[higher].min()


def test_groups_recomputed_from_the_arrays(tmp_path):
    record = plant_run(tmp_path, "SASRec", 1.0)
    arrays = dict(read_arrays(tmp_path / str(record.per_user), []))
    rng = np.random.default_rng(2)
    arrays |= {"history_length": rng.integers(1, 40, 120), "has_image": rng.random(120) < 0.8}
    np.savez(tmp_path / str(record.per_user), **arrays)
    board = build([record], tmp_path)
    row, image, cold = board.rows[0], arrays["has_image"], arrays["train_count"] == 0
    for key, masks in (("warmth", (cold, ~cold)), ("image", (image, ~image))):
        means = [arrays["NDCG@10"][mask].mean() for mask in masks]
        assert [part.mean for part in row.groups[key]] == pytest.approx(means)
    for dimension in board.dimensions:
        parts = row.groups[dimension.key]
        weighted = sum(n * part.mean for n, part in zip(dimension.counts, parts, strict=True))
        assert sum(dimension.counts) == 120 and weighted / 120 == pytest.approx(row.mean("NDCG@10"))
        assert all(part.low <= part.mean <= part.high for part in parts)
    assert {d.key: len(d.labels) for d in board.dimensions}["history"] == 4
    few = [band.few for chart in group_charts(board) for band in chart.marks if chart.more["dimension"].key == "image"]
    assert few == [bool(image.sum() < 30), bool((~image).sum() < 30)] == [False, True]
    sheet = groups_table(board).set_index(["dimension", "group"])
    assert tuple(sheet.loc[("warmth", "cold"), ["n", "NDCG@10"]]) == (cold.sum(), row.groups["warmth"][0].mean)


def test_a_dimension_of_one_group_is_named():
    columns = {"train_count": np.ones(5, int), "history_length": np.ones(5, int), "has_image": np.zeros(5, bool)}
    assert [part.dimension.labels for part in partitions(columns)] == [("warm",), ("1",), ("1",), ("without image",)]
