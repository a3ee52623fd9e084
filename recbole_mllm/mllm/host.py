"""One OpenAI-compatible server: it is asked, and set aside for a while when it fails."""

from __future__ import annotations

import json
import logging
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import Enum, auto
from typing import Any, TypeVar

from recbole_mllm.errors import UserError
from recbole_mllm.mllm.base import Answer, Decoding
from recbole_mllm.mllm.chat import answer_of
from recbole_mllm.mllm.client import UnusableReply, by_proxy, make_client
from recbole_mllm.settings import ServerSettings

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_LIST_TIMEOUT_S = 10.0
_GRACE_S = 1.0  # beyond the time for a request, which its client keeps unless not even the headers end
_LONGEST_RETRY_AFTER_S = 3600.0
_WORDS = 300  # characters of what a server says that are shown
_AGAIN = {408, 409, 425, 429}
_NOT_THE_PROMPTS = {408, 409, 425, 429, 502, 503, 504}  # these say nothing about the prompt itself
# what reading an answer of any form can raise: a dict for a list, a number beyond all, a thousand brackets
_UNREADABLE = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)
_TOO_LONG = re.compile(r"context|too long|max(?:imum)?[ _](?:model[ _])?(?:length|tokens)|input length", re.IGNORECASE)


_T = TypeVar("_T")


class Kind(Enum):
    """What a failure asks for."""

    AGAIN = auto()  # the server's trouble: the same prompt later, or elsewhere
    AGAIN_BUT_COUNT = auto()  # may be the prompt's own doing: again, a few times
    TOO_LONG = auto()
    REFUSED = auto()  # this prompt never
    ABSENT = auto()  # it has no such path; only where that was asked about
    FATAL = auto()  # no prompt ever: the user must act


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why there is no answer, in words to show behind the server's URL; `wait` is what its Retry-After asks for."""

    kind: Kind
    text: str
    wait: float | None = None


class Host:
    """A server with its client. Threads share it; while it fails, one of them tries it at a time."""

    def __init__(self, url: str, model: str, settings: ServerSettings, key: str | None) -> None:
        self.url, self.model, self.settings, self._key = url, model, settings, key
        self._client = make_client(url, key, settings.server_timeout)
        self._changed = threading.Condition()
        self._failures, self._resume_at, self._last_failed = 0, 0.0, 0.0
        self._passes, self._trial = 0, 0  # the last pass given out; the one that tries a failing server
        self._not_before = 0.0  # the server's own word, by Retry-After
        self._inside = 0  # threads admitted, those of earlier shifts included
        self.failing_since: float | None = None
        self.last_trouble = ""
        self.answered = False

    def begin(self) -> None:
        """Start on new prompts: a server that was failing is tried at once, unless it asked to be left alone."""
        with self._changed:
            self._resume_at, self._trial = self._not_before, 0
            self._changed.notify_all()

    def admit(self, stop: threading.Event) -> int:
        """Wait until the server may be asked (then a pass, which is never 0) or `stop` is set (then 0)."""
        with self._changed:
            while not stop.is_set():
                wait = self._resume_at - time.monotonic()
                full = self._inside >= self.settings.server_concurrency or (self._failures and self._trial)
                if wait <= 0 and not full:
                    self._passes += 1
                    self._inside += 1
                    self._trial = self._passes if self._failures else 0
                    return self._passes
                self._changed.wait(min(wait, 0.2) if wait > 0 else 0.2)
        return 0

    def may_ask(self, given: int) -> bool:
        """Return whether the pass that was `given` still holds: not where the server has failed since."""
        with self._changed:
            return time.monotonic() >= self._resume_at and (not self._failures or self._trial == given)

    def leave(self, given: int) -> None:
        """Hand the pass back; each is handed back once, whatever was done with it."""
        with self._changed:
            self._inside -= 1
            if self._trial == given:  # and not where another one tries by now
                self._trial = 0
            self._changed.notify()

    def ask(self, message: dict[str, Any], decoding: Decoding) -> Answer | Trouble:
        """Ask for one completion; what goes wrong is a value, and never holds the key."""
        return self.call(lambda _: answer_of(self._complete(message, decoding), decoding.most_characters))

    def call(self, request: Callable[[Any], Answer], absent: Collection[int] = ()) -> Answer | Trouble:
        """Make any `request` of the server, given its client; statuses in `absent` say that it has no such path."""
        started = time.monotonic()
        late: Answer | Trouble = Trouble(Kind.AGAIN_BUT_COUNT, f"no answer within {self.settings.server_timeout:g} s")
        limit = self.settings.server_timeout + _GRACE_S
        outcome = _in_time(limit, lambda: self._guarded(lambda: request(self._client), absent), late)
        self._note(outcome, started)
        return outcome

    @property
    def unthinking(self) -> dict[str, Any]:
        """What a chat request says beside OpenAI's own fields, to get an answer without a thought before it."""
        if self.settings.server_thinking == "auto":
            return {}
        return {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}

    def models(self) -> list[str]:
        """Return the models the server lists; some list none and serve all the same, some cannot be asked now.

        Raises:
            UserError: It refuses the key.
        """
        return _in_time(_LIST_TIMEOUT_S + _GRACE_S, self._listed, [])

    def _listed(self) -> list[str]:
        import openai

        try:
            return [str(model.id) for model in self._client.with_options(timeout=_LIST_TIMEOUT_S).models.list().data]
        except openai.APIStatusError as error:
            status = error.status_code
        except (openai.OpenAIError, UnusableReply, *_UNREADABLE):
            return []
        if status in (401, 403):
            raise UserError(f"server {self.url}: {self._no_entry(status)}")
        return []

    def _complete(self, message: dict[str, Any], decoding: Decoding) -> Any:
        sampled = {"top_p": decoding.top_p, "seed": decoding.seed} if decoding.temperature else {}
        return self._client.chat.completions.create(
            model=self.model,
            messages=[message],
            max_tokens=decoding.max_new_tokens,
            temperature=decoding.temperature,
            **sampled,
            **self._beside(json.loads(decoding.rules) if decoding.rules else {}),
        )

    def _beside(self, rules: dict[str, Any]) -> dict[str, Any]:
        """Return `rules` (a repetition penalty) with what else is said beside OpenAI's own fields."""
        fields = rules | self.unthinking.get("extra_body", {})
        return {"extra_body": fields} if fields else {}

    def _guarded(self, call: Callable[[], Answer], absent: Collection[int]) -> Answer | Trouble:
        import openai

        try:
            return call()
        except (openai.OpenAIError, UnusableReply, *_UNREADABLE) as error:
            caught = error
        # outside of the handler, so that no traceback chains what the client raised
        if isinstance(caught, openai.APIStatusError):
            if caught.status_code in absent:
                return Trouble(Kind.ABSENT, self._words(caught.body))
            return self._status(caught.status_code, self._words(caught.body), caught.response.headers)
        if isinstance(caught, openai.APITimeoutError):
            return Trouble(Kind.AGAIN_BUT_COUNT, f"no answer within {self.settings.server_timeout:g} s")
        unusable = next((e for e in (caught, caught.__cause__) if isinstance(e, UnusableReply)), None)
        if unusable is not None:  # some versions of the client wrap what is raised below them
            return Trouble(Kind.AGAIN_BUT_COUNT, str(unusable))
        if isinstance(caught, openai.APIConnectionError):
            return Trouble(Kind.AGAIN, self._words(str(caught.__cause__ or caught)) + by_proxy(self.url))
        return Trouble(Kind.AGAIN_BUT_COUNT, self._words(str(caught)) or "an answer that cannot be read")

    def _status(self, status: int, words: str, headers: Mapping[str, str]) -> Trouble:
        text = f"{status} {words}".strip()
        if status in (401, 403):
            return Trouble(Kind.FATAL, self._no_entry(status))
        if 300 <= status < 400:
            return Trouble(Kind.FATAL, "it redirects, which is not followed; give the address it leads to")
        if status in _AGAIN or status >= 500:
            kind = Kind.AGAIN if status in _NOT_THE_PROMPTS else Kind.AGAIN_BUT_COUNT
            return Trouble(kind, text, _retry_after(headers))
        if status == 404:
            return Trouble(Kind.FATAL, self._unknown(text))
        if status in (400, 413, 422) and _TOO_LONG.search(words):
            return Trouble(Kind.TOO_LONG, text)
        if "chat_template_kwargs" in words:  # a field of ours beside OpenAI's, which some refuse to know
            return Trouble(Kind.FATAL, f"{text}; set server_thinking: auto, and start the server so that it thinks not")
        if "repetition_penalty" in words:  # likewise
            return Trouble(Kind.FATAL, f"{text}; set summary_repetition_penalty: null, and start the server with one")
        return Trouble(Kind.REFUSED, text)

    def _no_entry(self, status: int) -> str:
        name = self.settings.server_key_env
        if name is None:
            return f"it wants a key ({status}); set server_key_env to the environment variable that holds it"
        state = "it refuses the key in" if self._key else "it wants a key; put it in"
        return f"{state} the environment variable {name} ({status}); server_key_env names another one"

    def _unknown(self, text: str) -> str:
        listed = (
            ", ".join(self.models()[:20]) or "none; check the name and that the URL ends as the server's does, in /v1"
        )
        return f"it does not know model {self.model!r} ({text}); it lists: {listed}"

    def _words(self, body: object) -> str:
        """Return what the server said, on one line, without the key should it repeat it."""
        for name in ("error", "message", "detail"):
            if isinstance(body, Mapping) and name in body:
                body = body[name]
        shown = "".join(letter if letter.isprintable() else " " for letter in str(body or ""))
        text = " ".join(shown.split())
        return (text.replace(self._key, "***") if self._key else text)[:_WORDS]

    def _note(self, outcome: Answer | Trouble, started: float) -> None:
        """Set the server aside after its own trouble, for longer each time; an answer ends that.

        But not the time it asked to be left alone: what it was answering meanwhile says nothing against that.
        """
        with self._changed:
            self.answered = self.answered or isinstance(outcome, Answer)
            if isinstance(outcome, Trouble) and outcome.kind in (Kind.AGAIN, Kind.AGAIN_BUT_COUNT):
                self._failed(outcome, started)
            elif self.failing_since is not None and (now := time.monotonic()) < self._not_before:
                self.failing_since = now
            elif self.failing_since is not None:
                logging.getLogger().info(f"server {self.url} answers again")
                self._failures, self._resume_at, self.failing_since = 0, 0.0, None
            self._changed.notify_all()

    def _failed(self, trouble: Trouble, started: float) -> None:
        now = time.monotonic()
        self.last_trouble = trouble.text
        if self.failing_since is None:
            self.failing_since = now
            logging.getLogger().warning(f"server {self.url}: {trouble.text}; set aside, and tried again in a while")
        if started >= self._last_failed:  # what was asked before the last failure is the same incident
            self._failures += 1
            wait = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** min(self._failures - 1, 16))
            self._resume_at = max(self._resume_at, now + wait * random.uniform(0.5, 1.0))
            self._last_failed = now
        if trouble.wait is not None:
            self._not_before = max(self._not_before, now + trouble.wait * random.uniform(1.0, 1.1))
            self._resume_at = max(self._resume_at, self._not_before)


def _in_time(seconds: float, work: Callable[[], _T], otherwise: _T) -> _T:
    """Return what `work` returns, or raise what it raises; `otherwise` after so many seconds.

    Then its thread is left behind with its connection: headers that come a byte at a time cannot be stopped from here.
    """
    done: queue.SimpleQueue[_T | BaseException] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put(work())
        except BaseException as error:
            done.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        found = done.get(timeout=seconds)
    except queue.Empty:
        return otherwise
    if isinstance(found, BaseException):
        raise found
    return found


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds ``Retry-After`` asks for, given as a number or as a date."""
    text = headers.get("retry-after")
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except ValueError:
            return None
    return min(seconds, _LONGEST_RETRY_AFTER_S) if seconds > 0 else None
