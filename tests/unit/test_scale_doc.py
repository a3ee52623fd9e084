"""The figures of docs/scale.md follow from one another: exponents from times, the bill from its hours."""

import re
from pathlib import Path

import numpy as np
import pytest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
BILL = re.findall(
    r"^\| ([^|]+) \| [\d,]+ (?:prompts|rows|pairs), ([\d.]+) min \| (\d+) \| ([\d,]+) \|$", PAGE, re.MULTILINE
)


def test_exponents_are_those_of_the_times_they_stand_beside():
    timed = re.findall(r"^\| [\w ]+ \| ([\d.]+) s \| ([\d.]+) s \| ([\d.]+) s \| ([\d.]+) \|", PAGE, re.MULTILINE)
    later = re.findall(
        r"^\| [\w ]+ \| (\d+) s \| ([\d,]+) s \| [\d.]+ \| ([\d.]+) \| ([\d,]+) s \|$", PAGE, re.MULTILINE
    )
    assert len(timed) == len(later) == 3
    for (*times, exponent), (*two, between, foretold) in zip(timed, later, strict=True):
        power, level = np.polyfit(np.log([125, 250, 500]), np.log(np.array(times, float)), 1)
        assert power == pytest.approx(float(exponent), abs=0.006)
        assert np.exp(level + power * np.log(10_000)) == pytest.approx(float(foretold.replace(",", "")), abs=0.6)
        small, large = (float(text.replace(",", "")) for text in two)
        assert np.log10(large / small) == pytest.approx(float(between), abs=0.006)


def test_the_bill_is_its_hours_at_the_rate_it_names():
    assert len(BILL) == 5
    rate = float(re.search(r"([\d.]+) a device hour", PAGE)[1])
    for stage, minutes, hours, price in BILL:
        assert float(hours) == pytest.approx(float(minutes) / 60 * 1e6 / 2_000, rel=0.02), stage
        assert float(price.replace(",", "")) == pytest.approx(float(hours) * rate, abs=0.6 * rate), stage
    hours, price = re.search(r"^\| all \| [\d.]+ h \| (\d+) \| ([\d,]+) \|$", PAGE, re.MULTILINE).groups()
    assert float(hours) == pytest.approx(sum(float(row[2]) for row in BILL), abs=2)
    assert float(price.replace(",", "")) == pytest.approx(sum(float(row[3].replace(",", "")) for row in BILL), abs=3)
