"""Families spread over two devices, which are pretended: scores, texts and gradients are those of one place.

A tensor on the wrong device raises there as on GPUs (see ``tests/pretend_devices.py``). No GPU was at hand for this.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models

TESTS = Path(__file__).resolve().parents[1]
QUICK = {"llava_next"}
FAMILIES = [
    pytest.param(build.__name__, marks=() if build.__name__ in QUICK else pytest.mark.slow)
    for build in tiny_models.FAMILIES
]


@pytest.mark.parametrize("family", FAMILIES)
def test_two_devices_are_one_model(family, tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    words = [sys.executable, str(TESTS / "spread_over_cards.py"), str(tmp_path / "found.json"), family]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())[family]
    assert found.pop("devices") == ["card:0", "card:1"] and found.pop("texts")
    assert not found.pop("flat")
    assert len(found) == 5 and max(found.values()) < 1e-5, found
