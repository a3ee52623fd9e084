"""Candidates and ties: the same for everyone, never seen, never twice, and blind to the label."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from recbole_mllm.data.sampling import sample_users
from recbole_mllm.errors import UserError
from recbole_mllm.evaluation.draw import Pool, candidates_digest, draw_negatives
from recbole_mllm.evaluation.ties import ranks, tie_keys

ITEMS = [f"i{n}" for n in range(60)]


@given(st.sets(st.sampled_from(ITEMS), min_size=1, max_size=40), st.integers(0, 99))
def test_negatives_are_distinct_and_never_seen(seen, seed):
    found = draw_negatives(Pool.uniform(ITEMS), {"u": ["t"]}, {"u": seen}, 20, "test", seed)["u"]
    assert len(set(found)) == 20 and not set(found) & seen


def test_the_order_of_users_and_items_changes_nothing():
    seen = {user: {user} for user in ("i1", "i2", "i3")}
    targets = {user: [user] for user in seen}
    one = draw_negatives(Pool.uniform(ITEMS), targets, seen, 5, "test", 1)
    two = draw_negatives(Pool.uniform(reversed(ITEMS)), dict(reversed(targets.items())), seen, 5, "test", 1)
    assert one == two
    assert one != draw_negatives(Pool.uniform(ITEMS), targets, seen, 5, "valid", 1)


def test_too_few_items_left_is_one_clear_error():
    with pytest.raises(UserError, match="user u leaves fewer than 20 items"):
        draw_negatives(Pool.uniform(ITEMS), {"u": ["t"]}, {"u": set(ITEMS[:41])}, 20, "test", 1)


def test_popular_items_are_drawn_in_proportion():
    counts = {"a": 1, "b": 2, "c": 5, "never": 0}
    targets = {f"u{n}": ["t"] for n in range(3000)}
    drawn = draw_negatives(Pool.popular(counts), targets, dict.fromkeys(targets, set()), 1, "test", 1)
    found = [sum(d == [item] for d in drawn.values()) for item in "abc"]
    assert sum(found) == 3000 and chisquare(found, [375, 750, 1875]).pvalue > 1e-4


def test_the_digest_knows_every_candidate():
    one = {"test": {"u": (["t"], ["a", "b"])}}
    assert candidates_digest(one) == candidates_digest({"test": {"u": (["t"], ["a", "b"])}})
    assert candidates_digest(one) != candidates_digest({"test": {"u": (["t"], ["a", "c"])}})


def test_a_sample_of_users_is_seeded_and_nested():
    users = [f"u{n}" for n in range(100)]
    assert sample_users(users, 10, 1) == sample_users(reversed(users), 10, 1)
    assert sample_users(users, 10, 1) < sample_users(users, 20, 1) and len(sample_users(users, 10, 1)) == 10
    assert sample_users(users, None, 1) == set(users) and sample_users(users, 10, 2) != sample_users(users, 10, 1)


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


def test_ranks_follow_scores_and_only_ties_follow_keys():
    owner, scores = np.array([0, 0, 0, 1, 1]), np.array([0.5, 0.9, 0.5, 1.0, 2.0])
    assert ranks(owner, scores, np.array([3, 1, 2, 9, 1])).tolist() == [1, 2, 0, 0, 1]
