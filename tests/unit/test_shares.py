"""Work is cut in order, each entry into one part, and no other contiguous cut has a cheaper costliest part."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_mllm.shares import cut


def cost(keys, shared, own, part):
    runs = [i for i in part if i == part.start or keys[i] != keys[i - 1]]
    return sum(own[i] for i in part) + sum(shared[i] for i in runs)


def cheapest(keys, shared, own, parts):
    best = None
    for stops in combinations(range(len(keys) + parts), parts - 1):
        places = [stop - n for n, stop in enumerate(stops)]
        bounds = [0, *(min(p, len(keys)) for p in places), len(keys)]
        worst = max(cost(keys, shared, own, range(a, b)) for a, b in zip(bounds, bounds[1:], strict=False))
        best = worst if best is None else min(best, worst)
    return best


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), max_size=8), st.integers(1, 4))
def test_no_cut_is_cheaper(entries, parts):
    keys = [key for key, _ in entries]
    own = [size for _, size in entries]
    shared = [7 * key for key in keys]
    found = cut(keys, shared, own, parts)
    assert [i for part in found for i in part] == list(range(len(keys))) and len(found) == parts
    assert max(cost(keys, shared, own, part) for part in found) == (cheapest(keys, shared, own, parts) or 0)


@pytest.mark.parametrize(("rows", "parts", "sizes"), [(3, 2, [2, 1]), (1, 2, [1, 0]), (0, 3, [0, 0, 0])])
def test_fewer_rows_than_parts_leave_parts_empty(rows, parts, sizes):
    assert [len(part) for part in cut(np.arange(rows), np.full(rows, 5), np.ones(rows), parts)] == sizes


def test_the_cut_is_by_cost_and_not_by_count():
    found = cut(np.repeat([0, 1], [1, 100]), [1000] + [10] * 100, [1] * 101, 2)
    assert found == [range(0, 1), range(1, 101)]
