"""Chains of prompts over several server processes: slow, hanging, broken, killed and started again; and two clients."""

import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from server_processes import reply, served

from recbole_mllm.common.model_names import Endpoint
from recbole_mllm.common.prompts import Prompt
from recbole_mllm.common.settings import ServerSettings
from recbole_mllm.mllm.interface import Decoding
from recbole_mllm.mllm.server import ServerModel
from recbole_mllm.summaries.generator import CachedGenerator, Request
from recbole_mllm.summaries.store import Store

SETTINGS = ServerSettings(4, 120.0, 60.0, None)


class Chains:
    """`count` chains of `steps` prompts, each of which holds the answer before it."""

    def __init__(self, count, steps):
        self.steps, self.waiting, self.texts = steps, [(n, 0, "") for n in range(count)], {}
        self.most_open = 0

    def ready(self, count):
        out, self.waiting = self.waiting[:count], self.waiting[count:]
        return [Request(key, self.prompt(*key), key[2]) for key in out]

    @staticmethod
    def prompt(chain, step, previous):
        return Prompt(f"chain {chain} step {step} after {previous}")

    def receive(self, name, text):
        chain, step, _ = name
        self.texts[chain, step] = text
        if step + 1 < self.steps:
            self.waiting.append((chain, step + 1, text))

    def truth(self):
        """Return what each step must say, worked out here."""
        out = {}
        for chain in {chain for chain, _ in self.texts}:
            text = ""
            for step in range(self.steps):
                text = out[chain, step] = reply(self.prompt(chain, step, text).text)
        return out


def run(folder, servers, chains, settings=SETTINGS):
    """Write all `chains`; return the seconds it took."""
    model = ServerModel(Endpoint("m", tuple(server.url for server in servers)), settings)
    store = Store(folder / "store.sqlite")
    started = time.monotonic()
    CachedGenerator("user", lambda: model, "server:m", store, Decoding(9)).generate(chains)
    took = time.monotonic() - started
    assert chains.texts == chains.truth() and len(store) == len(chains.texts)
    store.close()
    return took


def test_a_hanging_a_broken_a_dead_and_a_slow_server_lose_their_prompts_to_the_others(tmp_path, record_property):
    kinds = {
        "one": (0.1, "well"),
        "two": (0.1, "well"),
        "slow": (1.0, "well"),
        "hangs": (0, "hang"),
        "broken": (0, "500"),
    }
    with served(tmp_path, dead=(0, "well"), **kinds) as servers:
        servers["dead"].kill()
        took = run(tmp_path, list(servers.values()), Chains(60, 4), replace(SETTINGS, server_timeout=2.5))
        asked = {name: len(server.asked()) for name, server in servers.items()}
    ideal = 240 / (2 * 4 / 0.1 + 4 / 1.0)  # what the healthy can do: 84 prompts a second
    record_property("seconds", f"{took:.1f} of at least {ideal:.1f}; {asked}")
    assert took < 2 * ideal + 8  # what hangs is sent elsewhere after 2.5 s
    assert asked["hangs"] <= 4 + 4 and asked["broken"] <= 3 * (4 + 6) and asked["dead"] == 0
    assert 0 < asked["slow"] < asked["one"] / 3
    assert sum(asked.values()) < 240 + 16 + asked["broken"]  # nothing else is asked twice


def test_a_server_that_is_killed_and_comes_back_is_used_again_and_nothing_is_lost(tmp_path):
    with served(tmp_path, stays=(0.1, "well"), goes=(0.05, "well")) as servers:
        goes = servers["goes"]
        before = []

        def disturb():
            while len(goes.asked()) < 20:
                time.sleep(0.05)
            goes.kill()
            before.append(len(goes.asked()))
            time.sleep(1.0)
            goes.start()

        thread = threading.Thread(target=disturb)
        thread.start()
        run(tmp_path, list(servers.values()), Chains(100, 5))
        thread.join()
        texts = Counter(text for server in servers.values() for text in server.asked())
        assert 0 < before[0] < len(goes.asked())
    # what it had when it died
    assert len(texts) == 500 and sum(texts.values()) <= 550


CLIENT = """
import sys
sys.path[:0] = [{tests!r}, {tests!r} + "/pipeline", {root!r}]
from pathlib import Path
from test_many_servers import Chains, SETTINGS
from recbole_mllm.common.model_names import Endpoint
from recbole_mllm.mllm.interface import Decoding
from recbole_mllm.mllm.server import ServerModel
from recbole_mllm.summaries.store import Leases
from recbole_mllm.summaries.store import Store
from recbole_mllm.summaries.generator import CachedGenerator
store = Store(Path(sys.argv[1]))
model = ServerModel(Endpoint("m", (sys.argv[2],)), SETTINGS)
scribe = CachedGenerator("user", lambda: model, "server:m", store, Decoding(9), leases=Leases(store))
chains = Chains(60, 4)
print("ready", flush=True)
sys.stdin.readline()
scribe.generate(chains)
assert chains.texts == chains.truth()
print(scribe.tally.written)
"""
TESTS = Path(__file__).resolve().parent.parent


def two_clients(store, url):
    """Start two clients at one store, neither of which begins before both can."""
    words = [sys.executable, "-c", CLIENT.format(tests=str(TESTS), root=str(TESTS.parent)), str(store), url]
    both = [subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    return both


@pytest.mark.slow
def test_what_a_killed_client_had_claimed_is_written_by_the_other_at_once(tmp_path):
    with served(tmp_path, one=(0.05, "well")) as servers:
        both = two_clients(tmp_path / "store.sqlite", servers["one"].url)
        while len(servers["one"].asked()) < 40:
            time.sleep(0.05)
        both[0].kill()
        assert int(both[1].communicate(timeout=40)[0]) > 120 and both[1].returncode == 0
        both[0].communicate()
        asked = servers["one"].asked()
    assert len(set(asked)) == 240 and len(asked) <= 240 + 32 + 8  # what the killed one had not kept
