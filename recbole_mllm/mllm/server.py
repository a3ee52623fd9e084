"""A model behind OpenAI-compatible servers, as a writer: they share the prompts, and a failing one is left alone."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from recbole_mllm.endpoints import Endpoint
from recbole_mllm.errors import UserError
from recbole_mllm.mllm.base import Answer, Ask, Work
from recbole_mllm.mllm.chat import message
from recbole_mllm.mllm.host import Host, Kind, Trouble
from recbole_mllm.mllm.jobs import Job, Jobs
from recbole_mllm.settings import ServerSettings

_HOPELESS = 3  # prompts refused before any was answered: it is not the prompts
_TICK_S = 0.2
_LOOK_S = 3.0  # for which the work waits for what servers list; a slow one is asked all the same
Asking = Callable[[Host, Ask, int], Callable[[], Answer | Trouble]]
"""Readies a server's request of one prompt, its longest text halved so many times; the result makes the request.

Raises `UserError` where the prompt cannot be asked: nothing is left to halve, or an image cannot be read.
"""


class ServerModel:
    """A `Writer` that asks a bounded number of prompts at a time and hands answers over as they come.

    Raises:
        UserError: The client is not installed, or a server refuses the key.
    """

    def __init__(self, endpoint: Endpoint, settings: ServerSettings) -> None:
        self.identity = endpoint.identity
        self.settings = settings
        self.hosts = make_hosts(endpoint, settings)

    def write(self, work: Work) -> None:
        """Answer what `work` holds; answers are handed over as they arrive.

        Raises:
            UserError: A server refuses the key or does not know the model; no server has answered for
                ``server_patience`` seconds; or, after all others are answered, some prompts were refused. What had
                arrived has been handed over before.
        """
        serve(work, self.hosts, self.settings, _written)


def make_hosts(endpoint: Endpoint, settings: ServerSettings) -> list[Host]:
    """Return the servers of `endpoint`, each looked at once.

    Raises:
        UserError: The client is not installed, or a server refuses the key.
    """
    key = _key(settings)
    hosts = [Host(url, endpoint.model, settings, key) for url in endpoint.urls]
    refused: queue.SimpleQueue[UserError] = queue.SimpleQueue()
    looks = [threading.Thread(target=_look_at, args=(host, refused), daemon=True) for host in hosts]
    for look in looks:
        look.start()
    end = time.monotonic() + _LOOK_S
    for look in looks:
        look.join(max(0.0, end - time.monotonic()))
    if not refused.empty():
        raise refused.get()
    return hosts


def serve(work: Work, hosts: Sequence[Host], settings: ServerSettings, asking: Asking) -> None:
    """Have `hosts` answer what `work` holds, each prompt by `asking`; raises as `ServerModel.write` does."""
    shift = _Shift(work, hosts, settings, asking)
    try:
        shift.run()
    finally:
        shift.stop.set()
        shift.jobs.close()


def _written(host: Host, ask: Ask, shortened: int) -> Callable[[], Answer | Trouble]:
    return partial(host.ask, message(ask.prompt, shortened), ask.decoding)


def _key(settings: ServerSettings) -> str | None:
    """Return the key the environment holds, if any."""
    name = settings.server_key_env
    key = os.environ.get(name, "").strip() if name else ""
    if not key.isascii() or len(key.split()) > 1:
        raise UserError(f"the environment variable {name} holds a space or letters that no key has; set it again")
    return key or None


def _look_at(host: Host, refused: queue.SimpleQueue[UserError]) -> None:
    """Say so where the server lists models and not this one; a server that is down now may be up later."""
    try:
        there = host.models()
    except UserError as error:
        refused.put(error)
        return
    if there and host.model not in there:
        listed = ", ".join(there[:20])
        logging.getLogger().warning(f"server {host.url} does not list model {host.model!r}; it lists: {listed}")


@dataclass(frozen=True, slots=True)
class _Refused:
    text: str


class _Shift:
    """Prompts on their way: a queue of jobs, threads for each server that take them, a queue of results."""

    def __init__(self, work: Work, hosts: Sequence[Host], settings: ServerSettings, asking: Asking) -> None:
        self.work, self.hosts, self.settings, self.asking = work, hosts, settings, asking
        self.stop = threading.Event()
        self.jobs = Jobs()
        self.results: queue.SimpleQueue[tuple[Job, Answer] | _Refused | Exception] = queue.SimpleQueue()
        self.under_way = 0
        self.started = time.monotonic()

    def run(self) -> None:
        """Start the threads and hand over what arrives; raise what the user must mend when all that arrived is out."""
        refused: list[_Refused] = []
        answered = shortened = 0
        self._fill()
        self._start()
        while self.under_way:
            arrived = self._arrived()
            self.under_way -= sum(not isinstance(result, Exception) for result in arrived)
            refused += [result for result in arrived if isinstance(result, _Refused)]
            done = [result for result in arrived if isinstance(result, tuple)]
            answered += len(done)
            shortened += sum(job.shortened > 0 for job, _ in done)
            # nothing too, so that what has arrived is kept while all others take long
            self.work.give([(job.ask.place, replace(a, shortened=job.shortened > 0)) for job, a in done])
            for result in arrived:
                if isinstance(result, Exception):
                    raise result
            self._check(answered, refused)
            self._fill()
        if shortened:
            logging.getLogger().warning(f"{shortened} prompts were too long for the server and had a text shortened")
        if refused:
            raise _refusal(refused)

    def _fill(self) -> None:
        """Keep as many jobs waiting as the servers could take at once, so that none of them runs dry."""
        room = 2 * len(self.hosts) * self.settings.server_concurrency - self.under_way
        for ask in self.work.take(room) if room > 0 else []:
            self.jobs.put(Job(ask))
            self.under_way += 1

    def _start(self) -> None:
        for host in self.hosts:
            host.begin()
            for _ in range(self.settings.server_concurrency if self.under_way else 0):
                # daemons, as one may hang in a request when the run is stopped
                threading.Thread(target=self._work, args=(host,), daemon=True).start()

    def _arrived(self) -> list[tuple[Job, Answer] | _Refused | Exception]:
        """Return all results that are there, waiting a moment for the first."""
        out: list[tuple[Job, Answer] | _Refused | Exception] = []
        try:
            out.append(self.results.get(timeout=_TICK_S))
            while True:
                out.append(self.results.get_nowait())
        except queue.Empty:
            return out

    def _check(self, answered: int, refused: Sequence[_Refused]) -> None:
        if not answered and len(refused) >= _HOPELESS:
            raise _refusal(refused)
        since = [host.failing_since for host in self.hosts]
        if (
            None in since
            or time.monotonic() - max(self.started, *(s or 0.0 for s in since)) < self.settings.server_patience
        ):
            return
        who = "; ".join(f"{host.url}: {host.last_trouble}" for host in self.hosts)
        raise UserError(
            f"no server has answered for {self.settings.server_patience:g} s ({who}); start them again and repeat the "
            "command: what was finished is kept (server_patience sets how long is waited)"
        )

    def _work(self, host: Host) -> None:
        try:
            while given := host.admit(self.stop):
                try:
                    self._one(host, given)
                finally:
                    host.leave(given)
        except Exception as error:  # a bug must stop the run, not hang it
            self.results.put(error)

    def _one(self, host: Host, given: int) -> None:
        job = self.jobs.next(host, _TICK_S, partial(host.may_ask, given))
        if job is not None:
            self._settle(job, host, self._ask(job, host))

    def _ask(self, job: Job, host: Host) -> Answer | Trouble:
        try:
            request = self.asking(host, job.ask, job.shortened)
        except UserError as error:
            return Trouble(Kind.REFUSED, str(error))
        outcome = request()
        return replace(outcome, text=f"server {host.url}: {outcome.text}") if isinstance(outcome, Trouble) else outcome

    def _settle(self, job: Job, host: Host, outcome: Answer | Trouble) -> None:
        """Pass an answer on, once; a prompt in trouble goes back to the others, unless a server still has it."""
        if isinstance(outcome, Trouble) and outcome.kind is Kind.FATAL:
            self.results.put(UserError(outcome.text))
            return
        if not self.jobs.back(job, host, answered=isinstance(outcome, Answer)):
            return
        if isinstance(outcome, Answer):
            self.results.put((job, outcome))
            return
        # a server that has answered nothing says nothing about a prompt while others answer
        counts = host.answered or not any(other.answered for other in self.hosts)
        job.tries += outcome.kind is Kind.AGAIN_BUT_COUNT and counts
        job.shortened += outcome.kind is Kind.TOO_LONG
        if outcome.kind is Kind.REFUSED or self.jobs.hopeless(job):
            self.results.put(_Refused(outcome.text))
        else:
            self.jobs.put(job)


def _refusal(refused: Sequence[_Refused]) -> UserError:
    return UserError(
        f"{len(refused)} prompts were refused, the first for this: {refused[0].text}; "
        "mend that and repeat the command: what was finished is kept"
    )
