"""A model behind OpenAI-compatible servers, as a writer: servers share the prompts, and a failing one is set aside."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.model_names import Endpoint
from recbole_mllm.common.settings import ServerSettings
from recbole_mllm.mllm.interface import Answer, Ask, Work
from recbole_mllm.mllm.server_host import Failure, FailureKind, Host
from recbole_mllm.mllm.server_messages import answer_of, messages

_TRIES = 3  # times a prompt may draw an error that could be its own doing, each retried by the client
_HOPELESS = 3  # prompts refused before any was answered: it is not the prompts
_TICK_S = 0.2
_START = "start them again"
_ADVICE = {  # by how what all servers have failed with begins
    "429": "set a smaller server_concurrency",
    "no answer within": f"set a larger server_timeout, or {_START},",
}
EVERY_S = 20.0  # without an answer, after which a line says what is waited for, and again
Request = Callable[[Host, Ask, int], Coroutine[Any, Any, Answer | Failure]]
"""Asks a server for the answer to a prompt, whose longest text is halved so many times.

Raises `UserError` where the prompt cannot be sent: nothing is left to halve, or an image cannot be read.
"""


class ServerModel:
    """A `Writer` that has a bounded number of prompts at each server, and hands answers over as they come.

    Raises:
        UserError: As `make_hosts`.
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
        Requests(work, self.hosts, self.settings, _complete).run()


def make_hosts(endpoint: Endpoint, settings: ServerSettings) -> list[Host]:
    """Return the servers of `endpoint`, with the key that the environment holds, if any.

    Raises:
        UserError: The client is not installed or cannot start, or what the environment holds is no key.
    """
    name = settings.server_key_env
    key = os.environ.get(name, "").strip() if name else ""
    if not key.isascii() or len(key.split()) > 1:
        raise UserError(f"the environment variable {name} holds a space or letters that no key has; set it again")
    return [Host(url, endpoint.model, settings, key or None) for url in endpoint.urls]


async def _complete(host: Host, ask: Ask, shortened: int) -> Answer | Failure:
    """Ask for a chat completion."""
    turns, decoding = messages(ask.prompt, shortened), ask.decoding
    sampled = {"top_p": decoding.top_p, "seed": decoding.seed} if decoding.temperature else {}
    beside = (json.loads(decoding.rules) if decoding.rules else {}) | host.unthinking  # a repetition penalty

    async def request(client: Any) -> Answer:
        completion = await client.chat.completions.create(
            model=host.model,
            messages=turns,
            max_tokens=decoding.max_new_tokens,
            temperature=decoding.temperature,
            extra_body=beside or None,
            **sampled,
        )
        return answer_of(completion, decoding.most_characters)

    return await host.call(request)


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """Return the event loop of all requests, in a thread of its own: a notebook's own thread has one already."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="requests to servers", daemon=True).start()
    return loop


@dataclass(slots=True, eq=False)
class _Waiting:
    ask: Ask
    tries: int = 0
    shortened: int = 0


@dataclass(slots=True)
class _Sent:
    prompt: _Waiting
    host: Host
    at: float


class Requests:
    """The prompts of a `work`, those that wait and those that are sent to `hosts`, each by a `request`."""

    def __init__(self, work: Work, hosts: Sequence[Host], settings: ServerSettings, request: Request) -> None:
        self.work, self.hosts, self.settings, self.request = work, hosts, settings, request
        self.waiting: deque[_Waiting] = deque()
        self.sent: dict[Future[Answer | Failure], _Sent] = {}
        self.refused: list[str] = []
        self.errors: list[BaseException] = []  # what ends the run
        self.shortened = 0
        self.started = self.reported = time.monotonic()

    def run(self) -> None:
        """Send all and hand over what arrives.

        Raises:
            UserError: As `ServerModel.write`, when all that has arrived is out.
        """
        try:
            while self._fill():
                self._send()
                answers = self._arrived()
                self._send()  # before the store is busy with the answers
                self.work.give(answers)  # none too, so that what has arrived is stored while all others take long
                if self.errors:
                    raise self.errors[0]
                self._check()
        finally:
            for future in self.sent:
                future.cancel()
        if self.shortened:
            logging.getLogger().warning(
                f"{self.shortened} prompts were too long for the server and had a text shortened"
            )
        if self.refused:
            raise self._refusal()

    def _fill(self) -> bool:
        """Have as many prompts at hand as the servers could take twice; return whether any are left."""
        room = 2 * len(self.hosts) * self.settings.server_concurrency - len(self.waiting) - len(self.sent)
        self.waiting += [_Waiting(ask) for ask in (self.work.take(room) if room > 0 else [])]
        return bool(self.waiting or self.sent)

    def _send(self) -> None:
        """Send prompts to servers with room, those with the fewest first."""
        at, now = Counter(sent.host for sent in self.sent.values()), time.monotonic()
        hosts = [host for host in self.hosts if host.resume_at <= now]
        while self.waiting and (free := [host for host in hosts if at[host] < host.most_requests]):
            host = min(free, key=lambda one: at[one])
            at[host] += 1
            prompt = self.waiting.popleft()
            made = self.request(host, prompt.ask, prompt.shortened)
            self.sent[asyncio.run_coroutine_threadsafe(made, _loop())] = _Sent(prompt, host, now)

    def _arrived(self) -> list[tuple[int, Answer]]:
        """Return the answers that have arrived, waiting a moment for the first; a prompt that failed waits again."""
        if not self.sent:  # all servers are set aside
            time.sleep(_TICK_S)
        answers: list[tuple[int, Answer]] = []
        for future in wait(self.sent, _TICK_S, FIRST_COMPLETED).done:
            sent = self.sent.pop(future)
            if (error := future.exception()) is not None:
                if isinstance(error, UserError):
                    self.refused.append(str(error))
                else:  # a bug, which must stop the run
                    self.errors.append(error)
                continue
            outcome, prompt = future.result(), sent.prompt
            sent.host.record(outcome, sent.at)
            if isinstance(outcome, Answer):
                self.reported = time.monotonic()
                answers.append((prompt.ask.place, replace(outcome, shortened=prompt.shortened > 0)))
                self.shortened += prompt.shortened > 0
            else:
                self._failed(prompt, sent.host, outcome)
        return answers

    def _failed(self, prompt: _Waiting, host: Host, failure: Failure) -> None:
        text = f"server {host.url}: {failure.text}"
        # a server that has answered nothing says nothing about a prompt while others answer
        counts = host.answered or not any(other.answered for other in self.hosts)
        prompt.tries += failure.kind is FailureKind.UNCLEAR and counts
        prompt.shortened += failure.kind is FailureKind.TOO_LONG
        if failure.kind is FailureKind.FATAL:
            self.errors.append(UserError(text))
        elif failure.kind is FailureKind.REFUSED or prompt.tries >= _TRIES:
            self.refused.append(text)
        else:
            self.waiting.append(prompt)

    def _check(self) -> None:
        """Stop where all prompts are refused, or all servers have failed for too long."""
        if len(self.refused) >= _HOPELESS and not any(host.answered for host in self.hosts):
            raise self._refusal()
        since = [host.failing_since for host in self.hosts if host.failing_since is not None]
        patience, now = self.settings.server_patience, time.monotonic()
        failing = now - max(self.started, *since) if len(since) == len(self.hosts) else 0.0
        if failing < patience:
            self._tell(now, failing)
            return
        who = "; ".join(f"{host.url}: {host.last_failure}" for host in self.hosts)
        failures = [host.last_failure for host in self.hosts]
        advice = next((text for start, text in _ADVICE.items() if all(f.startswith(start) for f in failures)), _START)
        raise UserError(
            f"no server has answered for {patience:g} s ({who}); {advice} and repeat the command; finished work is "
            "saved (server_patience sets how long the run waits)"
        )

    def _tell(self, now: float, failing: float) -> None:
        """Say from time to time that no server answers, and for how long that may continue."""
        if now - self.reported < EVERY_S:
            return
        self.reported = now
        if failing:
            who, waited, most = self.hosts, failing, self.settings.server_patience
        else:
            who = list(dict.fromkeys(sent.host for sent in self.sent.values()))
            waited, most = (
                now - min((sent.at for sent in self.sent.values()), default=now),
                self.settings.server_timeout,
            )
        urls = ", ".join(host.url for host in who)
        logging.getLogger().info(f"waiting for {urls}: {waited:.0f} s of {most:g} s")

    def _refusal(self) -> UserError:
        return UserError(
            f"{len(self.refused)} prompts were refused, the first for this: {self.refused[0]}; "
            "fix that and repeat the command; finished work is saved"
        )
