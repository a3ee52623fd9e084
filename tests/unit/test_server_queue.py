"""Prompts among several servers: a broken one costs none of them, and one that hangs gets no more than it may."""

import threading
from dataclasses import replace

from planned_server import Planned, completion, error, serving

from recbole_mllm.common.endpoints import Endpoint
from recbole_mllm.common.prompts import Prompt
from recbole_mllm.common.settings import ServerSettings
from recbole_mllm.mllm.interface import Batch, Decoding
from recbole_mllm.mllm.server import ServerModel

SETTINGS = ServerSettings(2, 5.0, 20.0, None)


def test_prompts_that_failed_at_a_server_which_never_answered_are_not_given_up_for_it():
    prompts = [Prompt(f"p{n}") for n in range(12)]
    with serving(Planned(lambda n, text: error(500, "broken"))) as broken, serving(Planned(delay=0.3)) as slow:
        work = Batch(prompts, Decoding(1))
        ServerModel(Endpoint("m", (broken.url, slow.url)), SETTINGS).write(work)
    assert {place: answer.text for place, answer in work.answers.items()} == {n: f"P{n}" for n in range(12)}


def test_no_more_than_allowed_is_under_way_at_a_server_that_hung_in_an_earlier_round():
    freed = threading.Event()

    def plan(n, text):
        freed.wait(20)
        return completion(text.upper())

    with serving(Planned(plan)) as hangs, serving(Planned(delay=0.02)) as other:
        model = ServerModel(Endpoint("m", (hangs.url, other.url)), replace(SETTINGS, server_timeout=20.0))
        for _ in range(4):
            work = Batch([Prompt(f"p{n}") for n in range(20)], Decoding(1))
            model.write(work)
            assert len(work.answers) == 20
        assert hangs.most_active <= 2 and len(hangs.bodies) <= 2
        freed.set()
