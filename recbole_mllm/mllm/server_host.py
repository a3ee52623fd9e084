"""One OpenAI-compatible server: its client, what its failures mean, and how long it is set aside after one."""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.settings import ServerSettings
from recbole_mllm.mllm.interface import Answer

_RETRIES = 2  # of the client itself, which waits as long as a Retry-After of up to two minutes says
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_LIST_TIMEOUT_S = 10.0
_WORDS = 300  # characters of what a server says that are shown
_SERVERS_OWN = {408, 409, 425, 429, 502, 503, 504}  # these say nothing about the prompt itself
# what reading an answer of any form can raise: a dict for a list, a number beyond all, a thousand brackets
_UNREADABLE = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)
_TOO_LONG = re.compile(r"context|too long|max(?:imum)?[ _](?:model[ _])?(?:length|tokens)|input length", re.IGNORECASE)
# fields of ours beside OpenAI's, which some servers refuse to know
_OWN_FIELDS = {
    "chat_template_kwargs": "set server_thinking: auto, and start the server so that it does not think",
    "repetition_penalty": "set summary_repetition_penalty: null, and start the server with one",
}


class FailureKind(Enum):
    """What a failure asks for."""

    SERVER = auto()  # the server's trouble: the same prompt later, or elsewhere
    UNCLEAR = auto()  # may be the prompt's own doing: again, a few times
    TOO_LONG = auto()
    REFUSED = auto()  # this prompt never
    FATAL = auto()  # no prompt ever: the user must act


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no answer, in words to show behind the server's URL; `status` is HTTP's, 0 where there is none."""

    kind: FailureKind
    text: str
    status: int = 0


class Host:
    """A server with its client.

    Attributes:
        resume_at: When (``time.monotonic``) it may be sent a prompt again.
        failing_since: Its first failure since an answer, None while it is well.
        answered: Whether it ever has.
    """

    def __init__(self, url: str, model: str, settings: ServerSettings, key: str | None) -> None:
        self.url, self.model, self.settings, self._key = url, model, settings, key
        self._client = self._connect()
        self.resume_at = 0.0
        self.failing_since: float | None = None
        self.last_failure = ""
        self.answered = False
        self._failures, self._last_failed = 0, 0.0

    def _connect(self) -> Any:
        """Return an OpenAI client that follows no redirect.

        Raises:
            UserError: It is not installed, or the environment names a proxy or certificates that it cannot take.
        """
        try:
            from openai import AsyncOpenAI, DefaultAsyncHttpxClient
        except ImportError:
            raise UserError('models behind a server need the client: pip install "recbole-mllm[server]"') from None
        for name in ("openai", "httpx", "httpx2", "httpcore", "httpcore2"):  # a line a request, headers at debug level
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            # `call` says how long a request may take, the client's retries included
            http = DefaultAsyncHttpxClient(follow_redirects=False, timeout=None)
        except (ImportError, ValueError, OSError) as error:
            raise UserError(
                f"the client for servers cannot start with this environment ({' '.join(str(error).split())}); fix or "
                "unset HTTP_PROXY, HTTPS_PROXY and ALL_PROXY, in small letters too, or SSL_CERT_FILE and SSL_CERT_DIR"
            ) from None
        return AsyncOpenAI(
            base_url=self.url, api_key=self._key or "EMPTY", max_retries=_RETRIES, timeout=None, http_client=http
        )

    @property
    def most_requests(self) -> int:
        """How many it is sent at once; a failing server is tried with one prompt."""
        return self.settings.server_concurrency if self.failing_since is None else 1

    def record(self, outcome: Answer | Failure, sent: float) -> None:
        """Set the server aside after a failure of its own, for longer each time; any other outcome ends that.

        Failures of what was `sent` before the last one do not make it longer.
        """
        now, log = time.monotonic(), logging.getLogger()
        if isinstance(outcome, Failure) and outcome.kind in (FailureKind.SERVER, FailureKind.UNCLEAR):
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
        if self.failing_since is not None:
            log.info(f"server {self.url} answers again")
            self._failures, self.failing_since = 0, None

    async def call(self, request: Callable[[Any], Awaitable[Answer]]) -> Answer | Failure:
        """Make a `request` with the server's client. What goes wrong is a value, and never holds the key."""
        import openai

        timeout = self.settings.server_timeout
        try:
            return await asyncio.wait_for(request(self._client), timeout)
        except (openai.OpenAIError, *_UNREADABLE) as error:
            caught = error
        except TimeoutError:
            return Failure(FailureKind.UNCLEAR, f"no answer within {timeout:g} s")
        # outside of the handler, so that no traceback chains what the client raised
        if isinstance(caught, openai.APIStatusError):
            return await self._of_status(caught.status_code, self._words(caught.body))
        if isinstance(caught, openai.APIConnectionError):
            return Failure(FailureKind.SERVER, self._words(str(caught.__cause__ or caught)))
        return Failure(FailureKind.UNCLEAR, self._words(str(caught)) or "an answer that cannot be read")

    @property
    def unthinking(self) -> dict[str, Any]:
        """The fields of a chat request beside OpenAI's own that ask for an answer without a thought before it."""
        off = self.settings.server_thinking == "off"
        return {"chat_template_kwargs": {"enable_thinking": False}} if off else {}

    async def _of_status(self, status: int, words: str) -> Failure:
        text = f"{status} {words}".strip()
        kind = FailureKind.REFUSED
        if status in (401, 403):
            kind, text = FailureKind.FATAL, self._no_entry(status)
        elif 300 <= status < 400:
            kind, text = FailureKind.FATAL, "it redirects, which is not followed; give the address it leads to"
        elif status in _SERVERS_OWN:
            kind = FailureKind.SERVER
        elif status >= 500:
            kind = FailureKind.UNCLEAR
        elif status == 404:
            kind, text = FailureKind.FATAL, await self._unknown_model(text)
        elif status in (400, 413, 422) and _TOO_LONG.search(words):
            kind = FailureKind.TOO_LONG
        else:
            for advice in (advice for field, advice in _OWN_FIELDS.items() if field in words):
                kind, text = FailureKind.FATAL, f"{text}; {advice}"
        return Failure(kind, text, status)

    def _no_entry(self, status: int) -> str:
        name = self.settings.server_key_env
        if name is None:
            return f"it wants a key ({status}); set server_key_env to the environment variable that holds it"
        state = "it refuses the key in" if self._key else "it wants a key; put it in"
        return f"{state} the environment variable {name} ({status}); server_key_env names another one"

    async def _unknown_model(self, text: str) -> str:
        import openai

        try:
            found = await self._client.with_options(timeout=_LIST_TIMEOUT_S, max_retries=0).models.list()
            listed = ", ".join([str(model.id) for model in found.data][:20])
        except (openai.OpenAIError, *_UNREADABLE):
            listed = ""
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
