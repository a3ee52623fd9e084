"""Times that no interaction can have are counted, whatever their unit, and places in an order are left in peace."""

from __future__ import annotations

import time

import pytest

from recbole_mllm.data.values import find_impossible_times, impossible_times

DAY = 86_400
NOW = time.time()


@pytest.mark.parametrize("unit", [1, 10**3, 10**6, 10**9])
def test_times_before_1970_and_after_tomorrow_are_counted_in_any_unit(unit: int) -> None:
    fine = [int((NOW - days * DAY) * unit) for days in range(0, 9000, 100)]
    today, in_a_week = int((NOW + DAY / 2) * unit), int((NOW + 7 * DAY) * unit)
    assert impossible_times([*fine, today]) == (0, 0)
    assert impossible_times([0, -1, *fine, today, in_a_week, -5 * unit]) == (3, 1)
    early, late = find_impossible_times([0, *fine, in_a_week])
    assert early.nonzero()[0].tolist() == [0] and late.nonzero()[0].tolist() == [len(fine) + 1]


def test_a_few_times_in_another_unit_are_found_among_seconds() -> None:
    assert impossible_times([1.5e9] * 5 + [1.5e12]) == (0, 1)


@pytest.mark.parametrize("places", [[1, 2, 3], [0, 1, 2, 0, 1], list(range(1000)), [1] * 40])
def test_places_in_an_order_are_no_dates(places: list[int]) -> None:
    assert impossible_times(places) == (0, 0)


@pytest.mark.parametrize(
    ("times", "told"),
    [
        ([], (0, 0)),
        ([0, 0, 0], (3, 0)),
        ([-1, 1, 2], (1, 0)),
        ([-3, -2], (2, 0)),
        ([1000, 1001, 0], (1, 0)),
        ([float("nan"), 1.6e9], (0, 0)),
        ([float("inf"), float("-inf"), 1.6e9, 1.6e9], (1, 1)),
        ([4e9, 4.1e9, 4.2e9], (0, 3)),
    ],
)
def test_what_counts(times: list[float], told: tuple[int, int]) -> None:
    assert impossible_times(times) == told
