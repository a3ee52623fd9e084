"""How many there are of something, and the first of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Sample:
    """A count of what was found, with the first of it in words."""

    count: int = 0
    example: str = ""

    def add(self, example: str) -> None:
        """Count one more."""
        if not self.count:
            self.example = example
        self.count += 1
