"""What the rest of the project knows of a model that writes: prompts in, answers out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from recbole_mllm.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Answer:
    """A written text with what it cost, in tokens (0 where a server does not say)."""

    text: str
    prompt_tokens: int
    new_tokens: int
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Decoding:
    """How an answer is decoded: its length, and greedily unless `temperature` is above 0."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __str__(self) -> str:
        """Return what stands for it in an answer's key."""
        if not self.temperature:
            return f"greedy:{self.max_new_tokens}"
        return f"sampled:{self.max_new_tokens}:{self.temperature}:{self.top_p}:{self.seed}"


class Writer(Protocol):
    """A model that answers prompts with text; `identity` names everything about it that changes an answer."""

    identity: str

    def write(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Answer]:
        """Answer each prompt greedily; one batch."""
        ...


@runtime_checkable
class Streamer(Protocol):
    """A model that takes any number of prompts and hands each answer over when it is there, in any order."""

    identity: str

    def stream(self, prompts: Sequence[Prompt], decoding: Decoding) -> Iterator[list[tuple[int, Answer]]]:
        """Yield what has arrived since the last time, as (the prompt's place, its answer)."""
        ...
