"""The figures of docs/scale.md follow from one another: the fit from its table, the bill from its hours."""

import re
from pathlib import Path

import numpy as np
import pytest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
TIMED = re.findall(
    r"^\| ([\w ]+) \| ([\d.]+) s \| ([\d.]+) s \| ([\d.]+) s \| ([\d.]+) \| (.+) % \|$", PAGE, re.MULTILINE
)
BILL = re.findall(
    r"^\| ([^|]+) \| [\d,]+ (?:prompts|rows|pairs), ([\d.]+) min \| (\d+) \| ([\d,]+) \|$", PAGE, re.MULTILINE
)


def numbers(text):
    return [float(word) for word in re.findall(r"-?\d+(?:\.\d+)?", text)]


def test_the_fit_is_that_of_the_times_it_stands_beside():
    later = re.search(r"tests the fit: ([^%]+) %", PAGE)[1].replace("\n", " ")
    at_1000, beyond = (numbers(part) for part in later.split(" off by "))
    assert len(TIMED) == len(at_1000) == 3
    for (_, *times, exponent, off), seconds, deviation in zip(TIMED, at_1000, beyond, strict=True):
        sizes, found = np.log([125, 250, 500]), np.array(times, float)
        power, level = np.polyfit(sizes, np.log(found), 1)
        assert power == pytest.approx(float(exponent), abs=0.006)
        residuals = 100 * (found / np.exp(level + power * sizes) - 1)
        assert residuals == pytest.approx(numbers(off), abs=0.06)
        told = np.exp(level + power * np.log(1000))
        assert 100 * (seconds / told - 1) == pytest.approx(deviation, abs=0.06)


def test_what_it_says_of_ten_thousand_users_follows_from_its_figures():
    row = r"^\| ([\w ]+) \| (\d+) s \| ([\d,]+) s \| ([\d.]+) \| ([\d.]+) \| ([\d,]+) s \|$"
    found = re.findall(row, PAGE, re.MULTILINE)
    assert [name for name, *_ in found] == [name for name, *_ in TIMED]
    for (_, *told), (_, *times, _, _) in zip(found, TIMED, strict=True):
        small, large, factor, exponent, foretold = (float(text.replace(",", "")) for text in told)
        assert large / small == pytest.approx(factor, abs=0.06)
        assert np.log10(large / small) == pytest.approx(exponent, abs=0.006)
        power, level = np.polyfit(np.log([125, 250, 500]), np.log(np.array(times, float)), 1)
        assert np.exp(level + power * np.log(10_000)) == pytest.approx(foretold, abs=0.6)


def test_the_bill_is_its_hours_at_the_rate_it_names():
    assert len(BILL) == 5
    rate = float(re.search(r"([\d.]+) a device hour", PAGE)[1])
    for stage, minutes, hours, price in BILL:
        assert float(hours) == pytest.approx(float(minutes) / 60 * 1e6 / 2_000, rel=0.02), stage
        assert float(price.replace(",", "")) == pytest.approx(float(hours) * rate, abs=0.6 * rate), stage
    hours, price = re.search(r"^\| all \| [\d.]+ h \| (\d+) \| ([\d,]+) \|$", PAGE, re.MULTILINE).groups()
    assert float(hours) == pytest.approx(sum(float(row[2]) for row in BILL), abs=2)
    assert float(price.replace(",", "")) == pytest.approx(sum(float(row[3].replace(",", "")) for row in BILL), abs=3)
