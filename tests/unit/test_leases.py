"""Claims on a store: one writer an answer, none for the dead, none for what is answered."""

import os
import subprocess
import sys

from recbole_mllm.mllm.base import Answer
from recbole_mllm.summaries.leases import Leases
from recbole_mllm.summaries.store import Store


def other_process(path, keys):
    """Let another process claim `keys` and say which it got; it then waits for a line."""
    code = (
        "import os, sys\nfrom pathlib import Path\n"
        "from recbole_mllm.summaries.leases import Leases\nfrom recbole_mllm.summaries.store import Store\n"
        f"print(*sorted(Leases(Store(Path(sys.argv[1]))).claim({keys!r}).mine), flush=True)\nsys.stdin.readline()"
    )
    words = [sys.executable, "-c", code, str(path)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_what_a_living_process_claimed_is_left_and_a_dead_ones_is_taken(tmp_path):
    store = Store(tmp_path / "s")
    other = other_process(store.path, ["a", "b"])
    assert other.stdout.readline() == "a b\n"
    mine = Leases(store)
    assert mine.claim(["a", "b", "c"]) == ({"c"}, {})
    other.kill()  # and not waited for: a zombie is as dead
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    assert mine.claim(["a", "b"]).mine == {"a", "b"}
    other.communicate()


def test_what_is_answered_is_told_and_not_claimed(tmp_path):
    store = Store(tmp_path / "s")
    store.add("user", "m", ["a"], [Answer("known", 1, 1)], 1.0)
    assert Leases(store).claim(["a", "b"]) == ({"b"}, {"a": "known"})


def test_a_lease_ends_with_time_and_when_it_is_given_back(tmp_path, monkeypatch):
    store = Store(tmp_path / "s")
    other = other_process(store.path, ["a", "b"])
    other.stdout.readline()
    mine = Leases(store)
    assert mine.claim(["a"]).mine == set()
    monkeypatch.setattr("recbole_mllm.summaries.leases.time.time", lambda: 4e9)
    assert mine.claim(["a"]).mine == {"a"}
    mine.release(["a"])
    with store.transaction() as db:
        assert db.execute("SELECT key FROM leases").fetchall() == [("b",)]
    other.communicate("\n")
