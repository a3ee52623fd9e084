"""Alone, everything that knows of other processes is the identity, and loads nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from recbole_mllm import ranks

ROOT = Path(__file__).resolve().parents[2]

ALONE = """
import sys
from recbole_mllm import ranks
from recbole_mllm.launched import exit_code
assert (ranks.rank(), ranks.world_size(), ranks.is_main(), ranks.is_launched()) == (0, 1, True, False)
assert ranks.gather_objects({"a": 1}) == [{"a": 1}] and ranks.broadcast_object(3) == 3
assert ranks.on_main(lambda: 4) == 4 and ranks.main_first(lambda: 5) == 5
assert ranks.sum_gradients([], 0.5, 2) == [0.5, 2] and ranks.report_failure(2)
ranks.start(), ranks.meet(), ranks.stop(), ranks.copy_from_main([])
print(sorted({"torch", "numpy", "accelerate", "recbole"} & set(sys.modules)))
"""


def test_alone_it_is_the_identity_and_loads_nothing():
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(("size", "launched"), [(None, False), ("1", False), ("2", True)])
def test_one_process_is_no_launched_run(monkeypatch, size, launched):
    monkeypatch.setenv("RANK", "0")
    if size is None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("WORLD_SIZE", size)
    assert ranks.is_launched() is launched


def test_a_process_that_knows_no_host_leaves_the_word_to_the_main_one(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    for rank, speaks in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert ranks.report_failure(2) is speaks
