"""Fusion finds what was planted: who knows what, and that new items must not pay for it."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from recbole_mllm.common.errors import UserError
from recbole_mllm.evaluation.fusion import GUARD, SHARES, Fusion, ScoredPairs, align_candidates, choose_fusion, ndcg

N, COLD = 21, 0.25


def world(seed: int, first: float, second: float, cold_targets: float = 0.0, rows: int = 400) -> ScoredPairs:
    """Plant two models that see the target `first` and `second` above the rest, the second none of a quarter's items.

    What it makes of those it cannot know is low, as of items that training pushed away.
    """
    rng = np.random.default_rng(seed)
    known = rng.random((rows, N)) >= COLD
    known[:, 0] = rng.random(rows) >= cold_targets
    label = np.zeros((rows, N))
    label[:, 0] = 1
    log_odds, scores = rng.normal(size=(2, rows, N)) + np.array([first, second])[:, None, None] * label
    scores = np.where(known, 5 * scores + 3, -20 + rng.normal(size=(rows, N)))

    def places(values: Any) -> Any:
        return values.argsort(axis=1).argsort(axis=1).ravel()

    row = np.repeat(np.arange(rows), N)
    return ScoredPairs(row, label.ravel(), log_odds.ravel(), scores.ravel(), known.ravel(), places(log_odds),
                      places(scores), np.full(rows * N, N))  # fmt: skip


def mixture(alpha: float, rho: float = 0.4, offset: float = 0.2) -> Fusion:
    return Fusion(alpha, rho, offset, "mixture", 0.0, 0.0)


def by_hand(of: ScoredPairs, alpha: float, rho: float, offset: float) -> np.ndarray:
    """The formula at the head of fusion.py, item by item, in plain Python."""
    out = []
    for n in range(len(of.row)):
        start = n // N * N
        own = [k for k in range(start, start + N) if not math.isnan(of.first[k])]

        def z(values: Any, among: list[int], n: int = n) -> float:
            mean = sum(values[k] for k in among) / len(among)
            spread = math.sqrt(sum((values[k] - mean) ** 2 for k in among) / len(among))
            return (values[n] - mean) / spread if spread else 0.0

        if n not in own:
            out.append(math.nan)
            continue
        m = z(of.first, own)
        b = z(of.second, [k for k in own if of.known[k]]) if of.known[n] else rho * m + offset
        out.append(alpha * m + (1 - alpha) * b)
    return np.array(out)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_formula(alpha):
    few = world(1, 1.0, 1.0, rows=4)
    few = replace(few, second=np.where(few.row == 2, 7.0, few.second))  # a row in which the second ranks nothing
    few.first[[3, 30, 31]] = np.nan
    found, expected = mixture(alpha), by_hand(few, alpha, 0.4, 0.2)
    np.testing.assert_allclose(found.scores(few), expected, atol=1e-12)
    place = found.places(few)
    for row in range(4):
        own = few.row == row
        asked = own & ~np.isnan(few.first)
        assert sorted(place[own]) == list(range(N)) and set(place[asked]) == set(few.place[asked])
        np.testing.assert_array_equal(place[own & ~asked], few.place[own & ~asked])
        order = np.lexsort((few.place[asked], expected[asked].round(9)))
        np.testing.assert_array_equal(place[asked].argsort(), order)


def test_what_is_chosen_is_what_validation_says_of_known_items():
    valid = world(2, 1.0, 1.0, cold_targets=0.1)
    valid = replace(valid, label=np.where(valid.known, valid.label, 0))  # new targets would decide the lift
    found = choose_fusion(valid)
    only = {name: getattr(valid, name)[valid.known] for name in ("row", "label", "first", "second", "place")}
    row = only["row"]
    m, b = (by_hand(valid, alpha, 0.0, 0.0)[valid.known] for alpha in (1.0, 0.0))
    rho = np.corrcoef(m, b)[0, 1]
    assert found.rho == pytest.approx(rho)
    assert found.offset == pytest.approx((b - rho * m)[only["label"] > 0].mean() / 2)
    values = {}
    for alpha in (0.0, *SHARES, 1.0):
        scores = alpha * m + (1 - alpha) * b
        rank = [
            (scores[row == u] > scores[(row == u) & (only["label"] > 0)]).sum()
            for u in np.unique(row[only["label"] > 0])
        ]
        values[alpha] = np.where(np.array(rank) < 10, 1 / np.log2(np.array(rank) + 2), 0)
    best = max(SHARES, key=lambda alpha: values[alpha].mean())
    gain = values[best] - max(values[0.0], values[1.0], key=np.mean)
    assert (found.alpha, found.chosen) == (best, "mixture")
    assert found.gain == pytest.approx(gain.mean()) and found.error == pytest.approx(
        gain.std(ddof=1) / len(gain) ** 0.5
    )


def test_one_who_knows_all_is_taken_alone():
    found = choose_fusion(world(2, first=4.0, second=0.0))
    assert (found.alpha, found.chosen) == (1.0, "first") and found.gain <= GUARD * found.error
    found = choose_fusion(world(2, first=0.0, second=4.0))
    assert (found.alpha, found.chosen) == (0.0, "second") and found.rho < 0.1
    found = choose_fusion(world(2, first=0.4, second=4.0))
    assert (found.alpha, found.chosen) == (0.0, "second, unknown items by the first")


@pytest.mark.parametrize(("first", "second"), [(1.5, 1.5), (1.0, 2.0), (2.0, 1.0)])
def test_a_mixture_of_two_who_know_different_things_is_better_on_known_and_no_worse_on_new_targets(first, second):
    found = choose_fusion(world(4, first, second))
    assert found.chosen == "mixture" and found.alpha in SHARES and found.gain > GUARD * found.error
    test = world(5, first, second, cold_targets=0.3)
    new = ~test.known[test.label > 0]
    for alone in (test.place, test.second_place):
        difference = ndcg(test, found.places(test)) - ndcg(test, alone)
        for part, least in ((~new, -1), (new, -2), (new | ~new, 2)):
            own = difference[part]
            assert own.mean() > least * own.std() / math.sqrt(len(own))


def test_new_items_are_not_pushed_down_by_who_cannot_know_them():
    valid, test = world(6, 1.0, 1.5), world(7, 1.0, 1.5, cold_targets=0.5)
    new, target = ~test.known, test.label > 0
    found = choose_fusion(valid)
    for alpha in (0.0, *SHARES):
        place = replace(found, alpha=alpha).places(test)
        assert place[new & ~target].mean() > (N - 1) / 2 - 0.5  # the middle; the second puts them below 3
        assert place[new & target].mean() >= test.place[new & target].mean() - 0.5
    assert test.second_place[new].mean() < 3


@pytest.mark.parametrize(("first", "second"), [(0.3, 2.5), (1.0, 2.0), (1.5, 1.5)])
def test_new_targets_of_validation_say_how_far_unknown_items_are_lifted(first, second):
    gains = []
    for seed in range(6):
        valid, test = world(10 + seed, first, second, cold_targets=0.15), world(20 + seed, first, second, 0.15)
        found, target = choose_fusion(valid), valid.label > 0
        new = ~valid.known[target]
        mllm = ndcg(valid, valid.place)[new].mean()
        values = {}
        silent = replace(valid, label=np.where(valid.known, valid.label, 0))
        whole = choose_fusion(silent)
        whole = replace(whole, chosen=found.chosen, alpha=found.alpha)
        for lift in np.arange(17) / 16:
            less = replace(whole, offset=lift * whole.offset)
            values[less.offset] = ndcg(valid, less.places(valid))[new].mean()
        enough = [offset for offset, value in values.items() if value >= mllm]
        assert found.offset == pytest.approx(enough[0] if enough else whole.offset)
        new = ~test.known[test.label > 0]
        own, theirs = (ndcg(test, one.places(test)) for one in (found, whole))
        above = (own - ndcg(test, test.place))[new]
        assert above.mean() > -2.5 * above.std() / math.sqrt(len(above))
        gains.append((own - theirs)[~new].mean())
    assert min(gains) >= 0 and max(gains) > 0  # known targets pay less


def test_new_items_are_placed_by_chance_rather_than_last_where_validation_has_new_targets():
    for seed in range(3):
        valid, test = world(30 + seed, 0.0, 3.0, cold_targets=0.15), world(40 + seed, 0.0, 3.0, cold_targets=0.15)
        found = choose_fusion(valid)
        assert (found.alpha, found.chosen) == (0.0, "second, unknown items by the first")
        new = ~test.known[test.label > 0]
        fused, alone = ndcg(test, found.places(test)), ndcg(test, test.second_place)
        assert (fused - alone)[new].mean() > 0.1 > 0.01 > (alone - fused)[~new].mean()


def test_ndcg_of_several_targets():
    rng = np.random.default_rng(8)
    label = rng.random((50, 30)) < 0.4
    label[:, 0] = True
    place = rng.permuted(np.tile(np.arange(30), (50, 1)), axis=1)
    expected = []
    for hits, own in zip(label, place, strict=True):
        gains = [hits[own == 29 - rank].item() / math.log2(rank + 2) for rank in range(10)]
        expected.append(sum(gains) / sum(1 / math.log2(rank + 2) for rank in range(min(10, hits.sum()))))
    of = replace(world(1, 0, 0, rows=1), row=np.repeat(np.arange(50), 30), label=label.ravel(), among=np.full(1500, 30))
    np.testing.assert_allclose(ndcg(of, place.ravel()), expected)


def file_of(of: ScoredPairs, score: Any, place: Any, keep: Any = None, **more: Any) -> dict[str, Any]:
    columns = {
        "user": np.array([f"u{row:02d}" for row in of.row]),
        "item": np.array([f"i{n:05d}" for n in range(len(of.row))]),
        "label": of.label.astype("int8"), "score": score, "place": place, **more,
    }  # fmt: skip
    order = np.random.default_rng(0).permutation(np.flatnonzero(np.ones_like(of.label) if keep is None else keep))
    return {name: np.asarray(column)[order] for name, column in columns.items()}


def test_files_of_frozen_candidates_are_aligned():
    of = world(9, 1.0, 1.0, rows=12)
    known = dict(zip([f"i{n:05d}" for n in range(len(of.row))], of.known, strict=True))
    first, second = file_of(of, of.first, of.place), file_of(of, of.second, of.second_place)
    found = align_candidates(first, second, lambda items: np.array([known[item] for item in items]))
    for name in ScoredPairs.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(found, name), getattr(of, name))
    second["item"][3] = "other"
    with pytest.raises(UserError, match="other items"):
        align_candidates(first, second, lambda items: items == items)


def test_files_of_full_rankings_are_aligned_without_a_look_at_the_label():
    """The MLLM was asked about 6 items of 21, each file holds the best 10 and the target."""
    of = world(10, 1.0, 1.0, rows=30)
    among = of.among
    asked = among - 1 - of.place < 6
    answer = np.where(asked, of.first, np.nan)
    mine = file_of(of, of.first, of.place, (of.place >= N - 10) | (of.label > 0), among=among, answer=answer)
    theirs = file_of(
        of, of.second, of.second_place, (of.second_place >= N - 10) | (of.label > 0), among=among, answer=answer
    )
    found = align_candidates(mine, theirs, lambda items: np.ones(len(items), bool))
    assert set(np.bincount(found.row[found.asked])) == {6}
    lowest = np.array([np.sort(of.second[of.row == row])[-10] for row in range(30)])
    assert (found.second >= lowest[found.row] - 1e-12).all()
    place = mixture(0.5).places(found)
    np.testing.assert_array_equal(place[~found.asked], found.place[~found.asked])
    assert ndcg(found, found.place).mean() == pytest.approx(ndcg(of, of.place).mean())
    assert ndcg(found, found.second_place).mean() == pytest.approx(ndcg(of, of.second_place).mean())
    with pytest.raises(UserError, match="all items"):
        align_candidates({k: v for k, v in mine.items() if k != "among"}, theirs, lambda items: items == items)
