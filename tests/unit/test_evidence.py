"""Curves are RecBole's own metrics at every k; groups part the users and hide nobody."""

from __future__ import annotations

import csv
import io
import sys

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
from recbole_mllm.common.svg import tick_texts
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


def test_every_k_is_what_recboles_classes_say(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest"])
    keys = {"topk": list(range(1, 21)), "data_path": str(tmp_path)}
    log = log_with_ties()
    told = per_user(log, Config(model="Pop", dataset="none", config_dict=keys))
    ranks = target_ranks(log["user_id"], log["label"], log["place"], 40)
    assert ranks is not None and ranks.candidates == 21
    curves = metric_curves([ranks])
    for name, values in curves.items():
        assert len(values) == 20
        assert values == pytest.approx([told[f"{name}@{k}"].mean() for k in range(1, 21)])


def test_tied_scores_without_places_tell_no_rank_and_two_targets_neither():
    log = log_with_ties()
    assert target_ranks(log["user_id"], log["label"], log["score"], 40) is None
    label = log["label"].copy()
    label[np.flatnonzero(label == 0)[0]] = 1
    assert target_ranks(log["user_id"], label, log["place"], 40) is None
    assert metric_curves([]) == {}


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
    row, board = build([record], tmp_path).rows[0], build([record], tmp_path)
    cold, warm = row.groups["warmth"]
    image = arrays["has_image"]
    assert (cold.n, warm.n) == ((arrays["train_count"] == 0).sum(), (arrays["train_count"] > 0).sum())
    assert cold.mean == pytest.approx(arrays["NDCG@10"][arrays["train_count"] == 0].mean())
    assert [part.mean for part in row.groups["image"]] == pytest.approx(
        [arrays["NDCG@10"][image].mean(), arrays["NDCG@10"][~image].mean()]
    )
    for dimension in board.dimensions:
        parts = row.groups[dimension.key]
        assert sum(part.n for part in parts) == 120 and tuple(part.n for part in parts) == dimension.counts
        assert sum(part.n * part.mean for part in parts) / 120 == pytest.approx(row.mean("NDCG@10"))
        assert all(part.low <= part.mean <= part.high for part in parts)
    quarters = row.groups["history"]
    assert len(quarters) == 4 and quarters[0].n == (arrays["history_length"] <= _last(board, "history", 0)).sum()
    few = [band.few for chart in group_charts(board) for band in chart.marks if chart.more["dimension"].key == "image"]
    assert few == [bool(image.sum() < 30), bool((~image).sum() < 30)] == [False, True]


def _last(board, key: str, number: int) -> int:
    label = next(dimension.labels[number] for dimension in board.dimensions if dimension.key == key)
    return int(label.split("–")[-1])


def test_bands_of_distinct_values_are_of_one_size_and_a_dimension_of_one_group_is_named_but_not_drawn():
    assert [int(mask.sum()) for mask in bands(np.random.default_rng(1).permutation(100), 10).values()] == [10] * 10
    columns = {"train_count": np.ones(5, int), "history_length": np.ones(5, int), "has_image": np.zeros(5, bool)}
    assert [part.dimension.labels for part in partitions(columns)] == [("warm",), ("1",), ("1",), ("without image",)]
    assert tick_texts([0.0, 0.05, 0.1]) == ["0.00", "0.05", "0.10"]
    assert tick_texts([0.0, 0.2, 0.4]) == ["0.0", "0.2", "0.4"]


def test_the_sheets_hold_what_the_page_draws(tmp_path):
    board = build([plant_run(tmp_path, "SASRec", 1.0), plant_run(tmp_path, "Pop", 0.1)], tmp_path)
    groups = list(csv.DictReader(io.StringIO(groups_table(board).to_csv())))
    curves = list(csv.DictReader(io.StringIO(curves_table(board).to_csv())))
    assert len(curves) == 2 * 3 * 20 and len(groups) == 2 * sum(len(part.labels) for part in board.dimensions)
    cold = next(line for line in groups if (line["model"], line["group"]) == ("SASRec", "cold"))
    assert float(cold["NDCG@10"]) == board.rows[0].groups["warmth"][0].mean and int(cold["n"]) == 18
    ten = next(line for line in curves if (line["model"], line["metric"], line["k"]) == ("SASRec", "NDCG", "10"))
    assert float(ten["mean"]) == pytest.approx(board.rows[0].mean("NDCG@10"))
