"""What the rest of the project knows of a model that writes: prompts in, answers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from recbole_mllm.common.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated text with what it cost, in tokens (0 where a server does not say).

    `truncated`: it reached the limit before its end. `shortened`: a text in its prompt was, to fit.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    truncated: bool = False
    shortened: bool = False


@dataclass(frozen=True, slots=True)
class Scored(Answer):
    """The log-odds of Yes against No; `missing` counts the words of the two that the server gave no number for."""

    log_odds: float = 0.0
    missing: int = 0


MOST_CHARACTERS = 1_000_000  # of an answer; what is longer would not fit into a file of texts


@dataclass(frozen=True, slots=True)
class Decoding:
    """How an answer is decoded: its length, and greedily unless `temperature` is above 0.

    `rules` are further rules for its tokens, as JSON (a model's ``generation_config``, see `own_rules`); "" is none.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    rules: str = ""

    @property
    def most_characters(self) -> int:
        """How long an answer may be, far above what so many tokens can say."""
        return min(MOST_CHARACTERS, 10_000 + 1_000 * self.max_new_tokens)

    def __str__(self) -> str:
        """Return what stands for it in an answer's key."""
        sampled = f":{self.temperature}:{self.top_p}:{self.seed}" if self.temperature else ""
        how = "sampled" if sampled else "greedy"
        return f"{how}:{self.max_new_tokens}{sampled}" + (f":{self.rules}" if self.rules else "")


class Ask(NamedTuple):
    """A prompt that waits for an answer; `place` is how its answer is handed back."""

    place: int
    prompt: Prompt
    decoding: Decoding


class Work(Protocol):
    """Prompts that wait for an answer; some appear only when others have been answered."""

    def take(self, count: int) -> list[Ask]:
        """Return up to `count` prompts that wait now; they are the caller's to answer."""
        ...

    def give(self, arrived: Sequence[tuple[int, Answer]]) -> None:
        """Hand over answers by place, or now and then none; more prompts may wait afterwards."""
        ...

    def fail(self, place: int, reason: str) -> None:
        """Say that a prompt cannot be answered; the others are not affected."""
        ...


class Writer(Protocol):
    """A model that answers prompts with text; `identity` names everything about it that changes an answer."""

    identity: str

    def write(self, work: Work) -> None:
        """Take prompts and give their answers, in any order, until none waits and none is under way."""
        ...


class Batch:
    """Work that is known from the start."""

    def __init__(self, prompts: Sequence[Prompt], decoding: Decoding) -> None:
        self.waiting = [Ask(place, prompt, decoding) for place, prompt in enumerate(prompts)]
        self.answers: dict[int, Answer] = {}
        self.failures: dict[int, str] = {}

    def take(self, count: int) -> list[Ask]:
        """Return the next `count` prompts."""
        out, self.waiting = self.waiting[:count], self.waiting[count:]
        return out

    def give(self, arrived: Sequence[tuple[int, Answer]]) -> None:
        """Add the answers."""
        self.answers.update(arrived)

    def fail(self, place: int, reason: str) -> None:
        """Add the reason."""
        self.failures[place] = reason
