"""What the rest of the project knows of a model that writes: prompts in, answers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from recbole_mllm.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Answer:
    """A written text with what it cost, in tokens."""

    text: str
    prompt_tokens: int
    new_tokens: int


class Writer(Protocol):
    """A model that answers prompts with text; `identity` names everything about it that changes an answer."""

    identity: str

    def write(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Answer]:
        """Answer each prompt greedily; one batch."""
        ...
