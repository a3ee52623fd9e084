"""What has arrived is in the store, and what is under way is claimed, however long the servers take over the rest."""

import threading
import time

import pytest
from planned_server import Planned, serving

from recbole_mllm.common.settings import ServerSettings
from recbole_mllm.endpoints import Endpoint
from recbole_mllm.mllm.base import Decoding
from recbole_mllm.mllm.server import ServerModel
from recbole_mllm.prompts import Prompt
from recbole_mllm.summaries import store as store_module
from recbole_mllm.summaries.generator import Scribe
from recbole_mllm.summaries.store import Leases, Store

PROMPTS = [Prompt(f"p{n}") for n in range(4)]


@pytest.fixture
def hanging(tmp_path):
    """A scribe at work in a thread: three prompts are answered at once, the last one when `freed`."""
    freed = threading.Event()

    def plan(number, text):
        return freed.wait(60) and None if text == "p3" else None

    def work(url):
        store = Store(tmp_path / "s")
        model = ServerModel(Endpoint("m", (url,)), ServerSettings(4, 60.0, 60.0, None))
        Scribe("item", lambda: model, "server:m", store, Decoding(9), leases=Leases(store)).answer(PROMPTS)
        store.close()

    with serving(Planned(plan)) as planned:
        thread = threading.Thread(target=work, args=(planned.url,))
        thread.start()
        try:
            yield Store(tmp_path / "s")
        finally:
            freed.set()
            thread.join()


def until(true):
    end = time.monotonic() + 30
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return true()


def test_answers_are_kept_while_the_last_prompt_hangs(hanging):
    assert until(lambda: len(hanging) == 3)


def test_claims_are_renewed_while_nothing_arrives(hanging, monkeypatch):
    assert until(lambda: len(hanging) == 3)

    def lapses():
        with hanging.transaction() as db:
            return db.execute("SELECT until FROM leases").fetchall()

    assert until(lambda: len(lapses()) == 1)  # p3's alone
    before = lapses()[0][0]
    monkeypatch.setattr(store_module, "_RENEW_S", 0.1)
    assert until(lambda: lapses()[0][0] > before)
