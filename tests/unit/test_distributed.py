"""Processes: alone it is the identity and loads nothing; who fails says why, once; work is cut by cost."""

import os
import socket
import subprocess
import sys
from datetime import timedelta
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_mllm.common import distributed

ROOT = Path(__file__).resolve().parents[2]

ALONE = """
import sys
from recbole_mllm.common import distributed
assert (distributed.process_index(), distributed.world_size()) == (0, 1)
assert distributed.is_main() and not distributed.is_launched()
assert distributed.gather_objects({"a": 1}) == [{"a": 1}] and distributed.broadcast_object(3) == 3
assert distributed.on_main(lambda: 4) == 4 and distributed.main_first(lambda: 5) == 5
distributed.start(), distributed.barrier(), distributed.stop()
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
    assert distributed.is_launched() is launched


def test_a_process_that_knows_no_host_leaves_the_word_to_the_main_one(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    for rank, speaks in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert distributed._fail(2) == (speaks, 2)


EARLY = """
import sys
from recbole_mllm.common import distributed
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.distributed import exit_code
def fail(words):
    raise UserError("a mistake")
sys.exit(exit_code(fail, []))
"""


def test_who_fails_before_any_meeting_waits_for_nobody():
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "TORCHELASTIC_"))}
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # where nobody listens
    for rank, said in (("0", "recbole-mllm: a mistake\n"), ("1", "")):
        words = [sys.executable, "-c", EARLY]
        done = subprocess.run(words, cwd=ROOT, env={**kept, **place, "RANK": rank}, capture_output=True, text=True)
        assert (done.stderr, done.returncode) == (said, 2)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_meets_nobody_says_where_it_looked(monkeypatch, rank):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    monkeypatch.setattr(distributed, "_CONNECT", timedelta(seconds=1))
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    connect = distributed._connection.__wrapped__  # which keeps the first answer
    assert f"process {rank} of 2 has not met the others at 127.0.0.1:{port}" in str(connect())
    monkeypatch.delenv("MASTER_PORT")
    assert "MASTER_PORT are not set; start with torchrun" in str(connect())


# -- shares of work


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
    found = distributed.cut(keys, shared, own, parts)
    assert [i for part in found for i in part] == list(range(len(keys))) and len(found) == parts
    assert max(cost(keys, shared, own, part) for part in found) == (cheapest(keys, shared, own, parts) or 0)


@pytest.mark.parametrize(("rows", "parts", "sizes"), [(3, 2, [2, 1]), (1, 2, [1, 0]), (0, 3, [0, 0, 0])])
def test_fewer_rows_than_parts_leave_parts_empty(rows, parts, sizes):
    assert [len(part) for part in distributed.cut(np.arange(rows), np.full(rows, 5), np.ones(rows), parts)] == sizes


def test_the_cut_is_by_cost_and_not_by_count():
    found = distributed.cut(np.repeat([0, 1], [1, 100]), [1000] + [10] * 100, [1] * 101, 2)
    assert found == [range(0, 1), range(1, 101)]
