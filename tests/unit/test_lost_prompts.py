"""Who is asked for a prompt, and who else when it has been away for long; under a clock of ours."""

import random
from types import SimpleNamespace

import pytest

from recbole_mllm.mllm import jobs as jobs_module
from recbole_mllm.mllm.base import Ask, Decoding
from recbole_mllm.mllm.jobs import Job, Jobs
from recbole_mllm.prompts import Prompt


class Server:
    """What a queue sees of a server."""

    failing_since = None


class Queue:
    """Jobs of which `usual` seconds are what an answer takes, on a clock that only `now` moves."""

    def __init__(self, patch, usual=0.1):
        self.now = 50.0
        patch.setattr(jobs_module, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.jobs, first = Jobs(), Server()
        self.put("first")
        self.next(first)
        self.now += usual
        assert self.jobs.back(self.taken, first, answered=True)

    def put(self, name):
        self.jobs.put(Job(Ask(0, Prompt(name), Decoding(9))))

    def next(self, host, may_ask=True):
        """Return the name of what `host` gets, if anything."""
        self.taken = self.jobs.next(host, 0.001, lambda: may_ask)
        return self.taken and self.taken.ask.prompt.text


@pytest.fixture
def queue(monkeypatch):
    return Queue(monkeypatch)


def hosts(count):
    return [Server() for _ in range(count)]


def test_a_prompt_that_two_servers_lose_goes_to_a_third(queue):
    one, two, three = hosts(3)
    queue.put("lost")
    assert queue.next(one) == "lost"
    queue.now += 0.4
    assert queue.next(two) is None  # late, but not yet by half a second
    queue.now += 0.2
    assert queue.next(one) is None and queue.next(two) == "lost"
    queue.now += 0.9
    assert queue.next(three) is None  # where it takes long anywhere it is left alone for longer each time
    queue.now += 0.2
    assert queue.next(three) == "lost"
    job = queue.taken
    assert queue.jobs.back(job, three, answered=True)
    assert not queue.jobs.back(job, one, answered=True) and not queue.jobs.back(job, two, answered=False)
    queue.now += 99
    assert [queue.next(host) for host in (one, two, three)] == [None] * 3


def test_while_others_wait_a_prompt_is_sent_once_more_only_when_it_is_lost(queue):
    one, two = hosts(2)
    for name in ("away", "b", "c"):
        queue.put(name)
    assert queue.next(one) == "away"
    queue.now += 1.9
    assert queue.next(two) == "b"
    queue.now += 0.2
    assert queue.next(two) == "away" and queue.next(two) == "c"


def test_a_server_that_fails_is_given_what_waits_but_nothing_that_others_have(queue):
    one, two = hosts(2)
    queue.put("away")
    assert queue.next(one) == "away"
    queue.now += 9
    two.failing_since = queue.now
    assert queue.next(two) is None
    queue.put("waits")
    assert queue.next(two) == "waits"


def test_a_thread_that_may_not_ask_any_more_leaves_the_prompt_to_the_others(queue):
    one, two = hosts(2)
    queue.put("a")
    assert queue.next(one, may_ask=False) is None
    assert queue.next(two) == "a"


def test_a_closed_queue_hands_out_nothing(queue):
    (one,) = hosts(1)
    queue.put("a")
    queue.jobs.close()
    assert queue.next(one) is None


def test_prompts_that_rightly_take_long_are_soon_no_longer_sent_twice(queue):
    one, two = hosts(2)
    twice = 0
    for _ in range(20):
        queue.put("long")
        assert queue.next(one) == "long"
        job = queue.taken
        queue.put("waits")
        queue.now += 2.5  # of a usual 0.1
        if queue.next(two) == "long":
            twice += 1
            assert queue.next(two) == "waits"
        waited = queue.taken
        queue.now += 0.1
        assert queue.jobs.back(waited, two, answered=True) and queue.jobs.back(job, one, answered=True)
        if two in job.away:
            assert not queue.jobs.back(job, two, answered=True)
    assert twice == 1
    queue.put("hangs")
    queue.next(one)
    queue.now += 16.1  # ten times the usual, or two seconds, eight times over: for no reason is it left alone longer
    assert queue.next(two) == "hangs"


def drawn(queue, host, fate):
    """Ask `host` for 300 prompts, an error where `fate` says so; return how many are given up, and after how many."""
    for n in range(300):
        queue.put(str(n))
    given_up = []
    while name := queue.next(host):
        job, well = queue.taken, not fate(name)
        queue.now += 0.01
        assert queue.jobs.back(job, host, answered=well)
        if not well:
            job.tries += 1
            if queue.jobs.hopeless(job):
                given_up.append(job.tries)
            else:
                queue.jobs.put(job)
    return given_up


def test_a_server_that_fails_half_of_the_time_loses_no_prompt_and_one_that_is_well_soon_gives_bad_ones_up(queue):
    (one,), dice = hosts(1), random.Random(1)
    assert drawn(queue, one, lambda name: name.startswith("29")) == [5] * 11
    assert drawn(queue, one, lambda name: dice.random() < 0.5) == []
    given_up = drawn(queue, one, lambda name: name == "7" or dice.random() < 0.5)
    assert len(given_up) == 1 and 5 < given_up[0] <= 40
