"""Candidates and ties: the same for everyone, never seen, never twice, and blind to the label."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from recbole_mllm.common.errors import UserError
from recbole_mllm.data.sampling import Pairs, hashes64, limited_users, sample_users, tie_keys
from recbole_mllm.evaluation.candidates import Pool, candidates_digest, draw_negatives
from recbole_mllm.evaluation.loader import ranks

ITEMS = [f"i{n}" for n in range(60)]


def draw(seen, count=20, items=ITEMS, counts=None, phase="test", seed=1, wanted=None):
    """Number users and items as they come, draw, and return raw ids by raw user."""
    raw_users, raw_items = np.array(["[PAD]", *seen]), np.array(["[PAD]", *items])
    ids = {item: number for number, item in enumerate(raw_items.tolist())}
    pairs = [(user, ids[item]) for user, own in enumerate(seen.values(), 1) for item in own]
    met = Pairs(*np.array(pairs, int).reshape(-1, 2).T, len(raw_items))
    if counts is None:
        pool = Pool.uniform(np.arange(1, len(raw_items)), raw_items)
    else:
        pool = Pool.popular(np.array([0, *(counts[item] for item in items)]), raw_items)
    users = np.arange(1, len(raw_users))
    wanted = np.full(len(users), count) if wanted is None else np.array(wanted)
    drawn = draw_negatives(pool, met, users, wanted, raw_users, phase, seed)
    parts = np.split(raw_items[drawn], np.cumsum(wanted)[:-1])
    return {user: part.tolist() for user, part in zip(seen, parts, strict=True)}


@given(st.sets(st.sampled_from(ITEMS), min_size=1, max_size=40), st.integers(0, 99))
def test_negatives_are_distinct_and_never_seen(seen, seed):
    found = draw({"u": seen}, seed=seed)["u"]
    assert len(set(found)) == 20 and not set(found) & seen


def test_the_order_of_users_and_items_changes_nothing():
    seen = {f"u{n}": ITEMS[n : n + 7 * (n % 6)] for n in range(20)}
    one = draw(seen, 5)
    assert one == draw(dict(reversed(seen.items())), 5, items=ITEMS[::-1])
    assert one["u7"] == draw({"u7": seen["u7"]}, 5)["u7"]
    for other in (draw(seen, 5, phase="valid"), draw(seen, 5, seed=2)):
        assert all(one[user] != other[user] for user in seen)


def test_too_few_items_left_is_one_clear_error():
    with pytest.raises(UserError, match="user u leaves fewer than 20 items"):
        draw({"v": [], "u": ITEMS[:41]})
    with pytest.raises(UserError, match="user u leaves fewer than 3 items"):
        draw({"u": ["i1"]}, 3, counts={item: int(item in ("i1", "i2", "i3")) for item in ITEMS})


def _chances(left):
    """Return the chance of each ordered pair drawn without replacement in proportion to weight."""
    total = sum(left.values())
    return {(a, b): left[a] / total * left[b] / (total - left[a]) for a in left for b in left if a != b}


@pytest.mark.parametrize("look", [0, 2, 300])
def test_popular_items_are_drawn_in_proportion(look, monkeypatch):
    """One after the other, without replacement, whether from the stream of proposals or by the race that ends it."""
    monkeypatch.setattr("recbole_mllm.evaluation.candidates._first_look", lambda count: max(1, look))
    monkeypatch.setattr("recbole_mllm.evaluation.candidates._last_look", lambda count: max(1, look))
    counts = {"a": 1, "b": 2, "c": 5, "d": 7, "never": 0}
    drawn = draw({f"u{n}": ["d"] for n in range(6000)}, 2, items=list(counts), counts=counts)
    chances = _chances({"a": 1, "b": 2, "c": 5})
    found = [sum(tuple(own) == pair for own in drawn.values()) for pair in chances]
    assert sum(found) == 6000 and chisquare(found, [6000 * chance for chance in chances.values()]).pvalue > 1e-4


def test_how_far_one_looks_first_changes_nothing(monkeypatch):
    seen = {f"u{n}": ITEMS[: n % 40] for n in range(80)}
    expected = draw(seen)
    for look in (20, 90):
        monkeypatch.setattr("recbole_mllm.evaluation.candidates._first_look", lambda count, look=look: look)
        monkeypatch.setattr("recbole_mllm.evaluation.candidates._CHUNK", 7 * look)
        assert draw(seen) == expected


def digest(drawn):
    """Digest ``{phase: {user: [target, candidates…]}}``."""
    return candidates_digest(
        {
            phase: (
                np.array(list(users)),
                np.array([len(own) for own in users.values()], int),
                hashes64([item for own in users.values() for item in own], "item"),
            )
            for phase, users in drawn.items()
        }
    )


def test_the_digest_knows_every_candidate_and_no_order_of_users():
    one = {"test": {"u": ["t", "a", "b"], "v": ["t", "c"]}, "valid": {"u": ["t", "d"]}}
    same = {"valid": {"u": ["t", "d"]}, "test": {"v": ["t", "c"], "u": ["t", "a", "b"]}}
    others = [
        {"test": {"u": ["t", "a", "c"], "v": ["t", "c"]}, "valid": {"u": ["t", "d"]}},
        {"test": {"u": ["t", "b", "a"], "v": ["t", "c"]}, "valid": {"u": ["t", "d"]}},
        {"test": {"v": ["t", "a", "b"], "u": ["t", "c"]}, "valid": {"u": ["t", "d"]}},
        {"test": {"u": ["t", "a", "b"]}, "valid": {"u": ["t", "d"]}},
        {"test": {"u": ["t", "d"]}, "valid": {"u": ["t", "a", "b"], "v": ["t", "c"]}},
    ]
    assert digest(one) == digest(same) and len({digest(one), *map(digest, others)}) == 6


def test_a_sample_of_users_is_seeded_and_nested():
    users = [f"u{n}" for n in range(100)]
    assert sample_users(users, 10, 1) == sample_users(reversed(users), 10, 1)
    assert sample_users(users, 10, 1) < sample_users(users, 20, 1) and len(sample_users(users, 10, 1)) == 10
    assert sample_users(users, None, 1) == set(users) and sample_users(users, 10, 2) != sample_users(users, 10, 1)


def test_parts_that_split_users_are_limited_apart():
    raw = np.array(["[PAD]", *(f"u{n}" for n in range(90))])
    shared = [np.repeat(np.arange(1, 91), 2), np.arange(1, 90), np.arange(1, 60)]
    train, valid, test = limited_users(raw, shared, 10, 1)
    assert (train == test).all() and (valid == test).all() and set(np.flatnonzero(test)) <= set(range(1, 60))
    assert set(raw[test]) == sample_users(raw[1:60].tolist(), 10, 1)
    apart = [np.arange(1, 61), np.arange(61, 66), np.arange(66, 91)]
    kept = limited_users(raw, apart, 10, 1)
    assert [int(own.sum()) for own in kept] == [10, 5, 10]
    assert all(set(np.flatnonzero(own)) <= set(part) for own, part in zip(kept, apart, strict=True))
    assert [int(own.sum()) for own in limited_users(raw, apart, None, 1)] == [60, 5, 25]


def test_parts_that_share_some_users_are_each_limited_to_as_many():
    raw = np.array(["[PAD]", *(f"u{n}" for n in range(90))])
    temporal = [
        np.arange(1, 71),
        np.arange(50, 81),
        np.arange(60, 91),
    ]  # 31 test users, 21 of them validated, 11 trained on
    whole = limited_users(raw, temporal, 40, 1)
    assert [int(own.sum()) for own in whole] == [40, 31, 31]
    kept = limited_users(raw, temporal, 10, 1)
    assert [int(own.sum()) for own in kept] == [10, 10, 10]
    for own, part in zip(kept, temporal, strict=True):
        assert set(np.flatnonzero(own)) <= set(part)
        assert set(np.flatnonzero(own)) & set(temporal[-1]) == set(np.flatnonzero(kept[-1])) & set(part)


def test_a_constant_scorer_puts_the_answer_anywhere_alike():
    users, items = [f"u{n}" for n in range(4000)], ITEMS[:21]
    keys = tie_keys(users, items, 7)
    owner, item = np.repeat(np.arange(4000), 21), np.tile(np.arange(21), 4000)
    place = ranks(owner, np.zeros(len(owner)), keys(owner, item)).reshape(4000, 21)
    assert (np.sort(place, 1) == np.arange(21)).all()
    for column in (0, 20):  # whichever item is the answer, its place is uniform over 0..20
        assert chisquare(np.bincount(place[:, column], minlength=21)).pvalue > 1e-4
    together = np.corrcoef(place[:, 0], place[:, 1])[0, 1]
    assert abs(together + 1 / 20) < 0.06
