"""A model behind OpenAI-compatible servers, as a writer: servers share the prompts, and a failing one is set aside."""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.model_names import Endpoint
from recbole_mllm.common.settings import ServerSettings
from recbole_mllm.mllm.interface import Answer, Ask, Work
from recbole_mllm.mllm.server_host import Failure, FailureKind, Host
from recbole_mllm.mllm.server_messages import answer_of, message

_TRIES = 3  # times a prompt may draw an error that could be its own doing, each retried by the client
_HOPELESS = 3  # prompts refused before any was answered: it is not the prompts
_TICK_S = 0.2
_GRACE_S = 1.0  # beyond the time for a request, which its client notices itself unless it retries
Ended = Answer | Failure | Exception
Requesting = Callable[[Host, Ask, int], Answer | Failure]
"""Makes a server's request of one prompt, its longest text halved so many times; called in a thread of its own.

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


def _complete(host: Host, ask: Ask, shortened: int) -> Answer | Failure:
    """Ask for a chat completion."""
    turn, decoding = message(ask.prompt, shortened), ask.decoding
    sampled = {"top_p": decoding.top_p, "seed": decoding.seed} if decoding.temperature else {}
    beside = (json.loads(decoding.rules) if decoding.rules else {}) | host.unthinking  # a repetition penalty
    return host.call(
        lambda client: answer_of(
            client.chat.completions.create(
                model=host.model,
                messages=[turn],
                max_tokens=decoding.max_new_tokens,
                temperature=decoding.temperature,
                extra_body=beside or None,
                **sampled,
            ),
            decoding.most_characters,
        )
    )


@dataclass(slots=True, eq=False)
class _Waiting:
    ask: Ask
    tries: int = 0
    shortened: int = 0


@dataclass(slots=True, eq=False)
class _Sent:
    prompt: _Waiting
    host: Host
    at: float


class Requests:
    """The prompts of a `work`, those that wait and those that are sent to `hosts`, each by a `request`.

    One thread decides; each request has a thread that makes it.
    """

    def __init__(self, work: Work, hosts: Sequence[Host], settings: ServerSettings, request: Requesting) -> None:
        self.work, self.hosts, self.settings, self.request = work, hosts, settings, request
        self.waiting: deque[_Waiting] = deque()
        self.sent: set[_Sent] = set()
        self.arrivals: queue.SimpleQueue[tuple[_Sent, Ended]] = queue.SimpleQueue()
        self.refused: list[str] = []
        self.errors: list[Exception] = []  # what ends the run
        self.shortened = 0
        self.started = time.monotonic()

    def run(self) -> None:
        """Send all and hand over what arrives.

        Raises:
            UserError: As `ServerModel.write`, when all that has arrived is out.
        """
        while self._fill():
            self._send()
            answers = self._settled(self._arrived())
            self._send()  # before the store is busy with the answers
            self.work.give(answers)  # none too, so that what has arrived is stored while all others take long
            if self.errors:
                raise self.errors[0]
            self._check()
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
        """Send prompts to servers with room, those with the fewest first; a failing one is tried with one prompt."""
        at, now = Counter(sent.host for sent in self.sent), time.monotonic()
        hosts = [host for host in self.hosts if host.resume_at <= now]
        while self.waiting and hosts:
            host = min(hosts, key=lambda one: at[one])
            tried = host.failing_since is not None and at[host]
            if tried or not host.slots.acquire(blocking=False):
                hosts.remove(host)
                continue
            at[host] += 1
            sent = _Sent(self.waiting.popleft(), host, now)
            self.sent.add(sent)
            threading.Thread(target=self._make, args=(sent,), daemon=True).start()

    def _make(self, sent: _Sent) -> None:
        """Make one request; in a thread that is a daemon, as it may hang when the run is stopped."""
        outcome: Ended
        try:
            outcome = self.request(sent.host, sent.prompt.ask, sent.prompt.shortened)
        except Exception as error:  # a prompt that cannot be sent, or a bug, which must stop the run and not hang it
            outcome = error
        sent.host.slots.release()
        self.arrivals.put((sent, outcome))

    def _arrived(self) -> list[tuple[_Sent, Ended]]:
        """Return what has arrived, waiting a moment for the first, and the failures of requests that take too long."""
        out: list[tuple[_Sent, Ended]] = []
        with suppress(queue.Empty):
            out.append(self.arrivals.get(timeout=_TICK_S))
            while True:
                out.append(self.arrivals.get_nowait())
        out = [(sent, outcome) for sent, outcome in out if sent in self.sent]  # no longer, where it was too late
        self.sent -= {sent for sent, _ in out}
        end = time.monotonic() - self.settings.server_timeout - _GRACE_S
        late = {sent for sent in self.sent if sent.at < end}
        self.sent -= late
        return out + [(sent, sent.host.too_late()) for sent in late]

    def _settled(self, arrived: list[tuple[_Sent, Ended]]) -> list[tuple[int, Answer]]:
        """Return the answers; a prompt that failed is refused, or waits for a server again."""
        answers: list[tuple[int, Answer]] = []
        for sent, outcome in arrived:
            prompt, host = sent.prompt, sent.host
            if isinstance(outcome, UserError):
                self.refused.append(str(outcome))
            elif isinstance(outcome, Exception):
                self.errors.append(outcome)
            else:
                host.record(outcome, sent.at)
                if isinstance(outcome, Answer):
                    answers.append((prompt.ask.place, replace(outcome, shortened=prompt.shortened > 0)))
                    self.shortened += prompt.shortened > 0
                else:
                    self._failed(prompt, host, outcome)
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
        patience = self.settings.server_patience
        if len(since) < len(self.hosts) or time.monotonic() - max(self.started, *since) < patience:
            return
        who = "; ".join(f"{host.url}: {host.last_failure}" for host in self.hosts)
        raise UserError(
            f"no server has answered for {patience:g} s ({who}); start them again and repeat the command: what was "
            "finished is kept (server_patience sets how long is waited)"
        )

    def _refusal(self) -> UserError:
        return UserError(
            f"{len(self.refused)} prompts were refused, the first for this: {self.refused[0]}; "
            "mend that and repeat the command: what was finished is kept"
        )
