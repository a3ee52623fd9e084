"""Prompts on their way to servers: who has which, and which have been away so long that another server is asked too.

A prompt is sent once more, to a server that has room, when it has been away several times as long as answers usually
take, and again after twice that: so neither servers that hang nor slow ones hold up what waits for their last answers.
The first answer counts.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from recbole_mllm.mllm.base import Ask
from recbole_mllm.mllm.host import Host

_LATE, _LATE_S = 3.0, 0.5  # a prompt is late after so many times the usual, and so many seconds, where a server is idle
_LOST, _LOST_S = 10.0, 2.0  # and even while others wait
_MOST_LENIENT = 8.0
_TRIES = 5  # times a prompt may draw an error that could be its own doing, and more where errors are common
_BY_CHANCE = 1e-9
_USUAL_OF = 101  # the latest answers of whose times the median is what is usual


@dataclass(slots=True, eq=False)
class Job:
    """A prompt, and the servers that have it now, with the times at which they got it."""

    ask: Ask
    tries: int = 0
    shortened: int = 0
    away: dict[Host, float] = field(default_factory=dict)
    lost: bool = False  # sent once more while others waited
    done: bool = False


class Jobs:
    """A queue that remembers what it has handed out. Threads share it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._away: dict[Job, None] = {}  # in the order in which they went
        self._times: deque[float] = deque(maxlen=_USUAL_OF)
        self._usual: float | None = None
        self._lenient = 1.0  # by how much longer prompts may be away while others wait
        self._answered, self._in_vain = 0, 0  # prompts, and their tries before that
        self._closed = False

    def put(self, job: Job) -> None:
        """Let a job wait for a server.

        One that drew an error waits at a place by chance: behind a balancer with one broken server of two every second
        request fails, and a job that kept its place in the turn could be it for ever.
        """
        with self._changed:
            self._waiting.insert(random.randint(0, len(self._waiting)) if job.tries else len(self._waiting), job)
            self._changed.notify()

    def close(self) -> None:
        """Let nobody wait any longer: what comes next is nothing, at once."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def next(self, host: Host, timeout: float, may_ask: Callable[[], bool] = lambda: True) -> Job | None:
        """Return a job for `host`, waiting for one for at most `timeout` seconds; none where it `may_ask` no more."""
        with self._changed:
            job = lost = self._overdue(host, _LOST * self._lenient, _LOST_S * self._lenient)
            if job is None and not self._waiting and not self._closed:
                self._changed.wait(timeout)
                job = None if self._waiting else self._overdue(host, _LATE, _LATE_S)
            if self._closed or not may_ask():  # the server may have failed while this thread waited
                self._changed.notify()  # whoever put a job there may have woken this thread alone
                return None
            if job is None and self._waiting:
                job = self._waiting.popleft()
            if job is not None:
                job.lost = job.lost or job is lost
                job.away[host] = time.monotonic()
                self._away[job] = None
            return job

    def hopeless(self, job: Job) -> bool:
        """Return whether a prompt has drawn more errors than those did by chance that were answered in the end."""
        common = self._in_vain / max(1, self._in_vain + self._answered)
        return job.tries >= _TRIES and common**job.tries < _BY_CHANCE

    def _overdue(self, host: Host, times: float, least: float) -> Job | None:
        """Return a job that other servers have had for long; none for a server that is failing itself.

        Each time it is sent once more it is left alone for twice as long, as it may be one that takes long anywhere.
        """
        if self._usual is None or host.failing_since is not None:
            return None
        now, late = time.monotonic(), max(least, times * self._usual)
        for job in self._away:
            if host not in job.away and now - max(job.away.values()) > late * 2 ** (len(job.away) - 1):
                return job
        return None

    def back(self, job: Job, host: Host, *, answered: bool) -> bool:
        """Take a job back; return whether it is the caller's to go on with: not where another server still has it.

        Once answered, it is done for all.
        """
        with self._changed:
            sent = job.away.pop(host)
            if job.done:
                return False
            if answered:
                self._learn(job, sent)
                self._answered, self._in_vain = self._answered + 1, self._in_vain + job.tries
                self._times.append(time.monotonic() - sent)
                self._usual = sorted(self._times)[len(self._times) // 2]
                job.done = True
            if answered or not job.away:
                del self._away[job]
                return True
            return False

    def _learn(self, job: Job, sent: float) -> None:
        """Send fewer prompts once more where it was for nothing: some rightly take long. More, where it has helped."""
        if job.lost and job.away:
            in_vain = sent < min(job.away.values())
            self._lenient = min(_MOST_LENIENT, self._lenient * 2) if in_vain else max(1.0, self._lenient / 2)
