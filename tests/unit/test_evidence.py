"""Curves are RecBole's own metrics at every k; groups part the users and hide nobody."""

import json
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recbole.config import Config

import recbole_mllm  # noqa: F401 - RecBole's Config on today's numpy
from recbole_mllm.benchmark.evidence import (
    BEYOND,
    DEPTH,
    Recommended,
    bands,
    beyond_accuracy,
    gini_index,
    metric_curves,
    partitions,
    recommendable,
    target_ranks,
)
from recbole_mllm.benchmark.html import curve_charts, group_charts
from recbole_mllm.benchmark.ranking import build
from recbole_mllm.benchmark.records import append, read_arrays, write_arrays
from recbole_mllm.benchmark.report import render
from recbole_mllm.benchmark.significance import jackknife
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


# What models recommend, beyond accuracy: against planted lists and RecBole's own metric classes


ITEMS = 40
NAMES = np.array([f"i{n}" for n in range(ITEMS)])


def scored(users: int, likes_popular: float, seed: int = 3, candidates: int = 21) -> Recommended:
    """Lists of users whose scores follow popularity as far as `likes_popular` says; item n has n interactions."""
    rng = np.random.default_rng(seed)
    item = np.concatenate([rng.permutation(ITEMS)[:candidates] for _ in range(users)])
    order = likes_popular * item / ITEMS + rng.random(len(item))
    shuffled = rng.permutation(len(item))
    user = np.repeat(np.arange(users), candidates)[shuffled]
    return Recommended.of(user, NAMES[item[shuffled]], order[shuffled], users, NAMES, np.arange(ITEMS))


def test_the_measures_are_those_of_recboles_classes():
    import recbole.data  # noqa: F401 - RecBole's modules import one another in a circle that begins well here alone
    from recbole.evaluator import metrics as recbole_metrics

    run = scored(60, 1.0)
    found = beyond_accuracy([run], NAMES)
    config = {"topk": [DEPTH], "metric_decimal_place": 12}
    coverage = recbole_metrics.ItemCoverage(config).get_coverage(run.items, ITEMS)
    gini = recbole_metrics.GiniIndex(config).get_gini(run.items, ITEMS)
    counts = dict(enumerate(run.counts.tolist()))
    popularity = recbole_metrics.AveragePopularity(config).get_pop(run.items, counts).mean()
    assert found["Coverage@10"].mean == pytest.approx(coverage)
    assert found["Gini@10"].mean == pytest.approx(gini)
    assert found["Popularity@10"].mean == pytest.approx(popularity)
    head = {item for item in range(ITEMS) if item >= ITEMS - round(0.2 * (ITEMS - 1))}  # item 0 is not trained on
    assert found["Tail@10"].mean == pytest.approx(np.mean([item not in head for item in run.items.ravel()]))
    assert gini_index(np.full(9, 4)) == 0 and gini_index(np.array([0] * 99 + [7])) == pytest.approx(0.99)


def test_a_lover_of_the_popular_covers_less_and_its_intervals_say_so():
    fair, popular = (beyond_accuracy([scored(300, likes)], NAMES) for likes in (0.0, 20.0))
    assert set(fair) == set(BEYOND)
    assert popular["Coverage@10"].mean < fair["Coverage@10"].mean == 1.0
    assert popular["Gini@10"].low > fair["Gini@10"].high
    assert popular["Popularity@10"].low > fair["Popularity@10"].high
    assert popular["Tail@10"].high < fair["Tail@10"].low


def test_intervals_of_shares_stay_within_their_bounds():
    found = beyond_accuracy([scored(9, 0.0)], NAMES)
    assert found["Coverage@10"].mean < found["Coverage@10"].high == 1.0
    assert all(found[name].low >= 0 and found[name].high <= 1 for name in ("Coverage@10", "Gini@10", "Tail@10"))


def test_models_that_have_read_of_other_items_share_one_pool():
    """A model that loads ``.item`` knows items that nobody has met; its table is longer, and in another order."""
    run = scored(60, 1.0)
    order = np.random.default_rng(5).permutation(ITEMS + 9)
    names = np.concatenate([NAMES, [f"unmet{n}" for n in range(9)]])[order]
    place = np.argsort(order)
    more = Recommended(np.where(run.items < 0, -1, place[run.items]), np.r_[run.counts, np.zeros(9, int)][order], names)
    pool = recommendable([run, more])
    assert sorted(pool) == sorted(NAMES[(np.arange(ITEMS) > 0) | np.isin(np.arange(ITEMS), run.items)])
    assert beyond_accuracy([more], pool) == beyond_accuracy([run], pool)
    assert beyond_accuracy([run], np.append(pool, "elsewhere"))["Coverage@10"].mean < 1.0


def test_lists_shorter_than_ten_and_seeds_are_averaged():
    short = scored(30, 1.0, candidates=4)
    assert (short.items[:, :4] >= 0).all() and (short.items[:, 4:] == -1).all()
    found = beyond_accuracy([short, scored(30, 1.0, seed=4, candidates=4)], NAMES)
    alone = [beyond_accuracy([run], NAMES) for run in (short, scored(30, 1.0, seed=4, candidates=4))]
    for name in BEYOND:
        assert found[name].mean == pytest.approx(np.mean([one[name].mean for one in alone]))


def gini_of(items, kept):
    return gini_index(np.bincount(items[kept].ravel(), minlength=ITEMS))


def test_the_jackknifes_interval_holds_what_another_sample_would_give():
    """Of 200 samples of 150 users, Gini's index of very many users lies within the interval in about 95 %."""
    rng, everyone = np.random.default_rng(5), scored(4000, 2.0)
    truth = gini_index(np.bincount(everyone.items.ravel(), minlength=ITEMS))
    inside = 0
    for sample in range(200):
        items = everyone.items[rng.integers(0, 4000, 150)]
        interval = jackknife(partial(gini_of, items), 150, sample)
        inside += interval.low <= truth <= interval.high
    assert inside > 170


def test_a_leaderboard_shows_them_of_every_model_that_recorded_training_counts(tmp_path):
    for label, power, kind in (("Pop", 0.1, "baseline"), ("SASRec", 1.0, "baseline"), ("MLLMMSR", 2.2, "mllm")):
        record = plant_run(tmp_path, label, power, kind, n_users=40)
        counts = {"item": np.array([f"i{n}" for n in range(40 * 21)]), "count": np.arange(40 * 21)}
        path = f"runs/{record.run_id}/train_counts.npz"
        if label != "Pop":
            write_arrays(tmp_path / path, counts)
            record = replace(record, train_counts=path)
        append(tmp_path / "runs.jsonl", record)
    render(tmp_path)
    rows = {row["model"]: row for row in json.loads((tmp_path / "leaderboard.json").read_text())["rows"]}
    assert "beyond" not in rows["Pop"] and list(rows["SASRec"]["beyond"]) == list(BEYOND)
    for one in rows["MLLMMSR"]["beyond"].values():
        assert one["ci95"][0] <= one["mean"] <= one["ci95"][1]
    for end in ("md", "html"):
        text = (tmp_path / f"leaderboard.{end}").read_text()
        assert "Beyond accuracy" in text and "Tail@10" in text


class PlantedTracker:
    """Stands for codecarbon's tracker: this much was read, or estimated, of processor and GPU."""

    read = (0.002, 0.03)

    def __init__(self, **options):
        assert options["pue"] == 1.0 and not options["save_to_file"]

    def start(self):
        pass

    def stop(self):
        cpu, gpu = self.read
        self.final_emissions_data = SimpleNamespace(cpu_energy=cpu, gpu_energy=gpu, energy_consumed=99.0)


@pytest.mark.parametrize(
    ("metered", "device", "alone", "found"),
    [
        (True, "cpu", True, {"energy_kwh": 0.002, "energy_of": "CPU"}),
        (True, "cuda", True, {"energy_kwh": 0.032, "energy_of": "CPU and GPU"}),
        (False, "cuda", True, {"energy_kwh": 0.03, "energy_of": "GPU"}),
        (False, "cpu", True, {}),
        (True, "cpu", False, {}),
    ],
)
def test_energy_is_what_meters_read_and_never_an_estimate(metered, device, alone, found, monkeypatch):
    from recbole_mllm.benchmark import worker

    cpu = SimpleNamespace(is_rapl_available=lambda: metered)
    monkeypatch.setitem(sys.modules, "codecarbon", SimpleNamespace(OfflineEmissionsTracker=PlantedTracker))
    monkeypatch.setitem(sys.modules, "codecarbon.core", SimpleNamespace(cpu=cpu))
    monkeypatch.setattr(worker, "find_spec", lambda name: True)
    with worker.measured_energy(SimpleNamespace(type=device), alone=alone) as told:
        assert told == {}
    assert told == {name: pytest.approx(value) if name == "energy_kwh" else value for name, value in found.items()}


def test_without_codecarbon_or_where_it_fails_there_is_no_energy_and_the_run_goes_on(monkeypatch):
    from recbole_mllm.benchmark import worker

    device = SimpleNamespace(type="cpu")
    monkeypatch.setattr(worker, "find_spec", lambda name: None)
    with worker.measured_energy(device, alone=True) as told:
        pass
    monkeypatch.setattr(worker, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "codecarbon", SimpleNamespace())  # holds no tracker
    with worker.measured_energy(device, alone=True) as broken:
        pass
    assert told == broken == {}
