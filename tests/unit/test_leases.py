"""Claims on a store: one writer an answer, none for the dead, none for what is answered."""

import os
import subprocess
import sys
import threading

from planted_writers import Planted

from recbole_mllm.mllm.base import Answer, Decoding
from recbole_mllm.prompts import Prompt
from recbole_mllm.summaries.generator import Request, Scribe
from recbole_mllm.summaries.store import Leases, Store, owner_of


def other_process(path, keys):
    """Let another process claim `keys` and say which it got; it then waits for a line."""
    code = (
        "import os, sys\nfrom pathlib import Path\n"
        "from recbole_mllm.summaries.store import Leases, Store\n"
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
    monkeypatch.setattr("recbole_mllm.summaries.store.time.time", lambda: 4e9)
    assert mine.claim(["a"]).mine == {"a"}
    mine.release(["a"])
    with store.transaction() as db:
        assert db.execute("SELECT key FROM leases").fetchall() == [("b",)]
    other.communicate("\n")


class InTurn:
    """Asks one prompt after the other."""

    def __init__(self, *texts):
        self.left, self.texts, self.free = list(texts), {}, True

    def ready(self, count):
        if not self.left or not self.free:
            return []
        self.free = False
        return [Request(self.left[0], Prompt(self.left.pop(0)))]

    def receive(self, name, text):
        self.texts[name], self.free = text, True


def test_two_who_wait_for_each_others_last_answer_both_get_it(tmp_path):
    """Each has answered what the other asks next, and nothing more comes that would have it committed."""
    both_claimed, askers = threading.Barrier(2, timeout=20), (InTurn("a", "b"), InTurn("b", "a"))

    def write(asker, owner):
        def reply(prompt):
            both_claimed.wait()
            return f"{prompt.text}, says {owner}"

        store = Store(tmp_path / "s")
        leases = Leases(store)
        if owner == "two":  # as another process that lives
            leases._owner = owner_of(os.getppid())
        Scribe("user", lambda: Planted(reply), "m", store, Decoding(9), leases=leases).generate(asker)

    threads = [
        threading.Thread(target=write, args=each, daemon=True) for each in zip(askers, ("one", "two"), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [asker.texts for asker in askers] == [{"a": "a, says one", "b": "b, says two"}] * 2
