"""What is asked: prompts with a name, some of them known only when others have been answered."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import NamedTuple, Protocol

from recbole_mllm.prompts import Prompt


class Question(NamedTuple):
    """A prompt with the name its asker knows it by, and the preference it continues, if any."""

    name: Hashable
    prompt: Prompt
    previous: str = ""


class Asker(Protocol):
    """Asks questions, some of them only when others have been answered."""

    def ready(self, count: int) -> list[Question]:
        """Return up to `count` questions that can be asked now, each once."""
        ...

    def told(self, name: Hashable, text: str) -> None:
        """Take an answer."""
        ...


class Listed:
    """Questions that are all known from the start."""

    def __init__(self, prompts: Iterable[tuple[Hashable, Prompt]]) -> None:
        self.waiting = [Question(name, prompt) for name, prompt in prompts]
        self.texts: dict[Hashable, str] = {}

    def ready(self, count: int) -> list[Question]:
        """Return the next ones."""
        out = self.waiting[:count]
        del self.waiting[:count]
        return out

    def told(self, name: Hashable, text: str) -> None:
        """Keep the text."""
        self.texts[name] = text
