"""One OpenAI-compatible server: its client, what its failures mean, and how long it is set aside after one."""

from __future__ import annotations

import logging
import math
import random
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.settings import ServerSettings
from recbole_mllm.mllm.interface import Answer

RETRIES = 2  # of the client itself, which waits as long as a Retry-After of up to two minutes says
MOST_BYTES = 1 << 23  # of an answer, unpacked; a completion has some thousands, a long list of models a million
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_LIST_TIMEOUT_S = 10.0
_WORDS = 300  # characters of what a server says that are shown
_SERVERS_OWN = {408, 409, 425, 429, 502, 503, 504}  # these say nothing about the prompt itself
# what reading an answer of any form can raise: a dict for a list, a number beyond all, a thousand brackets
_UNREADABLE = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)
_TOO_LONG = re.compile(r"context|too long|max(?:imum)?[ _](?:model[ _])?(?:length|tokens)|input length", re.IGNORECASE)


class FailureKind(Enum):
    """What a failure asks for."""

    SERVER = auto()  # the server's trouble: the same prompt later, or elsewhere
    UNCLEAR = auto()  # may be the prompt's own doing: again, a few times
    TOO_LONG = auto()
    REFUSED = auto()  # this prompt never
    ABSENT = auto()  # it has no such path; only where that was asked about
    FATAL = auto()  # no prompt ever: the user must act


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no answer, in words to show behind the server's URL."""

    kind: FailureKind
    text: str

    @property
    def sets_aside(self) -> bool:
        """Whether the server is to be left alone for a while."""
        return self.kind in (FailureKind.SERVER, FailureKind.UNCLEAR)


class UnusableReply(Exception):
    """What a server sends is longer than any answer, or does not end in time."""


class Host:
    """A server with its client. Threads share `call` and `slots`; the rest belongs to the one that sends prompts.

    Attributes:
        slots: Room for requests; one that hangs takes up its own, even when its prompt was given to another server.
        resume_at: When (``time.monotonic``) it may be sent a prompt again.
        failing_since: Its first failure since an answer, None while it is well.
        answered: Whether it ever has.
    """

    def __init__(self, url: str, model: str, settings: ServerSettings, key: str | None) -> None:
        self.url, self.model, self.settings, self._key = url, model, settings, key
        self._client = self._connect()
        self._thread = threading.local()  # until when its request may take
        self.slots = threading.Semaphore(settings.server_concurrency)
        self.resume_at = 0.0
        self.failing_since: float | None = None
        self.last_failure = ""
        self.answered = False
        self._failures, self._last_failed = 0, 0.0

    def record(self, outcome: Answer | Failure, sent: float) -> None:
        """Set the server aside after a failure of its own, for longer each time; an answer ends that.

        What it was `sent` before its last failure neither makes that longer nor ends it.
        """
        now, log = time.monotonic(), logging.getLogger()
        if isinstance(outcome, Failure) and outcome.sets_aside:
            self.last_failure = outcome.text
            if self.failing_since is None:
                self.failing_since = now
                log.warning(f"server {self.url}: {outcome.text}; set aside, and tried again in a while")
            if sent >= self._last_failed:
                wait = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** min(self._failures, 16))
                self._failures, self._last_failed = self._failures + 1, now
                self.resume_at = now + wait * random.uniform(0.5, 1.0)
            return
        self.answered = self.answered or isinstance(outcome, Answer)
        if self.failing_since is not None and sent < self._last_failed:
            self.failing_since = now
        elif self.failing_since is not None:
            log.info(f"server {self.url} answers again")
            self._failures, self.failing_since = 0, None

    def call(self, request: Callable[[Any], Answer], absent: Collection[int] = ()) -> Answer | Failure:
        """Make a `request` with the server's client; statuses in `absent` say that it has no such path.

        What goes wrong is a value, and never holds the key.
        """
        import openai

        self._thread.end = time.monotonic() + self.settings.server_timeout
        try:
            return request(self._client)
        except (openai.OpenAIError, UnusableReply, *_UNREADABLE) as error:
            caught = error
        # outside of the handler, so that no traceback chains what the client raised
        if isinstance(caught, openai.APIStatusError):
            words = self._words(caught.body)
            if caught.status_code in absent:
                return Failure(FailureKind.ABSENT, words)
            return self._of_status(caught.status_code, words)
        if isinstance(caught, openai.APITimeoutError):
            return self.too_late()
        unusable = next((e for e in (caught, caught.__cause__) if isinstance(e, UnusableReply)), None)
        if unusable is not None:  # the client wraps what is raised below it
            return Failure(FailureKind.UNCLEAR, str(unusable))
        if isinstance(caught, openai.APIConnectionError):
            return Failure(FailureKind.SERVER, self._words(str(caught.__cause__ or caught)) + _by_proxy(self.url))
        return Failure(FailureKind.UNCLEAR, self._words(str(caught)) or "an answer that cannot be read")

    def too_late(self) -> Failure:
        """Return the failure of a request that took longer than one may."""
        return Failure(FailureKind.UNCLEAR, f"no answer within {self.settings.server_timeout:g} s")

    @property
    def unthinking(self) -> dict[str, Any]:
        """The fields of a chat request beside OpenAI's own that ask for an answer without a thought before it."""
        off = self.settings.server_thinking == "off"
        return {"chat_template_kwargs": {"enable_thinking": False}} if off else {}

    def models(self) -> list[str]:
        """Return the models the server lists; some list none and serve all the same, some cannot be asked now.

        Raises:
            UserError: It refuses the key.
        """
        import openai

        client = self._client.with_options(timeout=_LIST_TIMEOUT_S, max_retries=0)
        try:
            return [str(model.id) for model in client.models.list().data]
        except openai.APIStatusError as error:
            status = error.status_code
        except (openai.OpenAIError, UnusableReply, *_UNREADABLE):
            return []
        if status in (401, 403):
            raise UserError(f"server {self.url}: {self._no_entry(status)}")
        return []

    def _connect(self) -> Any:
        """Return an OpenAI client that follows no redirect, and bounds an answer's time and bytes.

        Raises:
            UserError: It is not installed, or the environment names a proxy or certificates that it cannot take.
        """
        try:
            from openai import DefaultHttpxClient, OpenAI
        except ImportError:
            raise UserError('models behind a server need the client: pip install "recbole-mllm[server]"') from None
        for name in ("openai", "httpx", "httpx2", "httpcore", "httpcore2"):  # a line a request, headers at debug level
            logging.getLogger(name).setLevel(logging.WARNING)

        def bound(response: Any) -> None:
            whole = response.iter_bytes  # which its `read` joins
            response.iter_bytes = lambda: self._bounded(whole())

        timeout = self.settings.server_timeout
        hooks = {"request": [lambda _: self._check_time()], "response": [bound]}
        try:
            http = DefaultHttpxClient(follow_redirects=False, timeout=timeout, event_hooks=hooks)
        except (
            ImportError,
            ValueError,
            OSError,
        ) as error:  # it reads HTTP_PROXY, ALL_PROXY, SSL_CERT_FILE and the like
            raise UserError(
                f"the client for servers cannot start with this environment ({' '.join(str(error).split())}); mend or "
                "unset HTTP_PROXY, HTTPS_PROXY and ALL_PROXY, in small letters too, or SSL_CERT_FILE and SSL_CERT_DIR"
            ) from None
        return OpenAI(
            base_url=self.url, api_key=self._key or "EMPTY", max_retries=RETRIES, timeout=timeout, http_client=http
        )

    def _bounded(self, parts: Iterator[bytes]) -> Iterator[bytes]:
        size = 0
        for part in parts:
            size += len(part)
            if size > MOST_BYTES:
                raise UnusableReply(f"an answer of more than {MOST_BYTES:,} bytes")
            self._check_time()
            yield part

    def _check_time(self) -> None:
        """Refuse to go on with a request, or to retry it, once its time is over; httpx bounds each read alone."""
        if time.monotonic() > getattr(self._thread, "end", math.inf):
            raise UnusableReply(f"no whole answer within {self.settings.server_timeout:g} s")

    def _of_status(self, status: int, words: str) -> Failure:
        text = f"{status} {words}".strip()
        if status in (401, 403):
            return Failure(FailureKind.FATAL, self._no_entry(status))
        if 300 <= status < 400:
            return Failure(FailureKind.FATAL, "it redirects, which is not followed; give the address it leads to")
        if status in _SERVERS_OWN:
            return Failure(FailureKind.SERVER, text)
        if status >= 500:
            return Failure(FailureKind.UNCLEAR, text)
        if status == 404:
            return Failure(FailureKind.FATAL, self._unknown_model(text))
        if status in (400, 413, 422) and _TOO_LONG.search(words):
            return Failure(FailureKind.TOO_LONG, text)
        for field, advice in _OWN_FIELDS.items():
            if field in words:
                return Failure(FailureKind.FATAL, f"{text}; {advice}")
        return Failure(FailureKind.REFUSED, text)

    def _no_entry(self, status: int) -> str:
        name = self.settings.server_key_env
        if name is None:
            return f"it wants a key ({status}); set server_key_env to the environment variable that holds it"
        state = "it refuses the key in" if self._key else "it wants a key; put it in"
        return f"{state} the environment variable {name} ({status}); server_key_env names another one"

    def _unknown_model(self, text: str) -> str:
        listed = ", ".join(self.models()[:20])
        advice = "none; check the name and that the URL ends as the server's does, in /v1"
        return f"it does not know model {self.model!r} ({text}); it lists: {listed or advice}"

    def _words(self, body: object) -> str:
        """Return what the server said, on one line, without the key should it repeat it."""
        for name in ("error", "message", "detail"):
            if isinstance(body, Mapping) and name in body:
                body = body[name]
        shown = "".join(letter if letter.isprintable() else " " for letter in str(body or ""))
        text = " ".join(shown.split())
        return (text.replace(self._key, "***") if self._key else text)[:_WORDS]


# fields of ours beside OpenAI's, which some servers refuse to know
_OWN_FIELDS = {
    "chat_template_kwargs": "set server_thinking: auto, and start the server so that it thinks not",
    "repetition_penalty": "set summary_repetition_penalty: null, and start the server with one",
}


def _by_proxy(url: str) -> str:
    """Return words for a failed connection where the environment sends `url` to a proxy; else nothing."""
    parts, proxies = urlsplit(url), getproxies()
    if not (parts.scheme in proxies or "all" in proxies) or proxy_bypass(parts.hostname or ""):
        return ""
    return " (asked through the proxy of the environment; NO_PROXY names hosts to ask directly)"
