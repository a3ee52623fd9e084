"""Texts that stand for summaries nobody has written yet: as long as those will be, and as different from each other."""

from __future__ import annotations

import os.path
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recbole_mllm.data.sampling import hash64

Sample = tuple[str, int]


@dataclass(frozen=True, slots=True)
class StandIns:
    """Makes texts of one kind, the same for the same name.

    Args:
        samples: Texts of that kind with their tokens, from the store or a probe; their lengths are taken, and the words
            they all begin with.
        words: What texts are made of where there is no sample.
        length: How many of those words a text then has.
        tokens: And how many tokens it is taken to have, the end included.
    """

    samples: Sequence[Sample]
    words: Sequence[str]
    length: int
    tokens: int

    def of(self, *name: object) -> Sample:
        """Return the text that stands for `name`, and its tokens."""
        rng = random.Random(hash64("stand-in", *name))
        if not self.samples:
            return " ".join(rng.choices(self.words, k=self.length)), self.tokens
        text, new = self.samples[rng.randrange(len(self.samples))]
        words, kept = text.split(), len(self.beginning)
        # the same words in another order: equal texts would make prompts share more than they will
        tail = words[kept:]
        rng.shuffle(tail)
        return " ".join([*words[:kept], *tail]), new

    @property
    def beginning(self) -> list[str]:
        """The words all samples begin with."""
        return list(os.path.commonprefix([text.split() for text, _ in self.samples]))


class Texts(dict[Any, str]):
    """Texts that are known, and a stand-in for each that is not; "" where there is nothing to summarise."""

    def __init__(self, known: dict[Any, str], made: StandIns) -> None:
        super().__init__(known)
        self.made = made

    def __missing__(self, name: Any) -> str:
        return self.made.of(name)[0]

    def get(self, name: Any, default: Any = None) -> Any:
        """Return the text of `name`, or its stand-in; `default` is not needed."""
        return self[name]
