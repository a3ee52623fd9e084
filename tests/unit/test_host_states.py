"""One server's doors under a clock of ours, whatever the order in which answers, failures and new prompts come."""

import threading
from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from recbole_mllm.mllm import host as host_module
from recbole_mllm.mllm.base import Answer
from recbole_mllm.mllm.host import Host, Kind, Trouble
from recbole_mllm.settings import ServerSettings

pytest.importorskip("openai")

MOST = 3  # in flight at once
LONGEST_S = 30.0  # that a failing server which asks for nothing itself is left alone
ANSWER = Answer("a", 1, 1)


class Once:
    """A stop that is set as soon as somebody waits: then `admit` looks once."""

    def __init__(self):
        self.stopped, self.waited = False, 0.0

    def is_set(self):
        return self.stopped


class Doors(threading.Condition().__class__):
    """A condition on which nobody waits."""

    once = None

    def wait(self, timeout=None):
        self.once.waited, self.once.stopped = timeout, True
        return False


class HostStates(RuleBasedStateMachine):
    """Threads enter, ask, are answered or not, and leave; another shift begins while some are still inside."""

    def __init__(self):
        super().__init__()
        self.now = 1000.0
        self.patched = pytest.MonkeyPatch()
        clock = SimpleNamespace(monotonic=lambda: self.now, time=lambda: self.now)
        self.patched.setattr(host_module, "time", clock)
        self.patched.setattr(host_module, "make_client", lambda *_: None)  # nothing is sent here
        self.host = Host("http://127.0.0.1:9/v1", "m", ServerSettings(MOST, 5.0, 5.0, None), None)
        self.host._changed = Doors()
        self.shift = 0
        self.idle, self.asking = {}, {}  # pass -> shift; pass -> (shift, when asked, whether as a trial)
        self.left_alone_until = self.back_at_the_latest = 0.0  # what servers ask for is stretched by a tenth at most
        self.failing, self.last_failure = False, 0.0

    def teardown(self):
        self.patched.undo()

    def trials(self):
        return [1 for shift, _, trial in self.asking.values() if trial and shift == self.shift]

    def enter(self):
        self.host._changed.once = once = Once()
        given = self.host.admit(once)
        assert given or 0 < once.waited <= 0.2  # it looks again soon, whoever forgets to wake it
        return given

    @rule(seconds=st.sampled_from([0.01, 0.3, 1.0, 7.0, 40.0]))
    def time_passes(self, seconds):
        self.now += seconds

    @rule()
    def a_thread_comes(self):
        inside = len(self.idle) + len(self.asking)
        if given := self.enter():
            assert inside < MOST and given not in self.idle and given not in self.asking
            assert self.now >= self.left_alone_until
            self.idle[given] = self.shift
        else:
            away = self.failing and self.now < max(self.back_at_the_latest, self.last_failure + LONGEST_S)
            tried = self.failing and self.shift in [*self.idle.values(), *(shift for shift, *_ in self.asking.values())]
            assert inside == MOST or away or tried, "a free server and a prompt that waits"

    @precondition(lambda self: self.idle)
    @rule(data=st.data())
    def a_prompt_is_there(self, data):
        given = data.draw(st.sampled_from(sorted(self.idle)))
        shift = self.idle.pop(given)
        if shift == self.shift and self.host.may_ask(given):
            assert self.now >= self.left_alone_until
            assert not (self.failing and self.trials()), "two trials of a server that fails"
            self.asking[given] = (shift, self.now, self.failing)
        else:
            assert shift != self.shift or self.failing
            self.host.leave(given)

    @precondition(lambda self: self.idle)
    @rule(data=st.data())
    def no_prompt_is_there(self, data):
        given = data.draw(st.sampled_from(sorted(self.idle)))
        del self.idle[given]
        self.host.leave(given)

    @precondition(lambda self: self.asking)
    @rule(
        data=st.data(),
        status=st.sampled_from([0, 0, 400, 429, 500, 503]),
        wait=st.sampled_from([None, None, "0", "-5", "nan", "soon", "2", "60", "1e9"]),
    )
    def an_outcome_comes(self, data, status, wait):
        given = data.draw(st.sampled_from(sorted(self.asking)))
        _, started, _ = self.asking.pop(given)
        outcome = self.host._status(status, "no", {"retry-after": wait} if wait else {}) if status else ANSWER
        self.host._note(outcome, started)
        self.host.leave(given)
        if isinstance(outcome, Trouble) and outcome.kind in (Kind.AGAIN, Kind.AGAIN_BUT_COUNT):
            self.failing, self.last_failure = True, self.now
            asked_for = {"2": 2.0, "60": 60.0, "1e9": 3600.0}.get(wait, 0.0)
            self.left_alone_until = max(self.left_alone_until, self.now + asked_for)
            self.back_at_the_latest = max(self.back_at_the_latest, self.now + 1.1 * asked_for)
        elif self.now >= self.back_at_the_latest:
            self.failing = False
        elif self.now >= self.left_alone_until:
            self.failing = self.host.failing_since is not None

    @rule()
    def new_prompts_begin(self):
        self.shift += 1
        self.host.begin()
        if self.now >= self.back_at_the_latest and len(self.idle) + len(self.asking) < MOST:
            given = self.enter()
            assert given, "a server is tried at once"
            self.idle[given] = self.shift

    @invariant()
    def failing_is_said(self):
        assert (self.host.failing_since is not None) == self.failing


HostStates.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestHostStates = HostStates.TestCase
