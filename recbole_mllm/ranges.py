"""Which numbers a setting takes: a range stands beside each, and one function checks them all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

from recbole_mllm.errors import UserError


class WrongValue(UserError):
    """A setting's value is none it takes; `where` is where the value was given, once that is known."""

    def __init__(self, key: str, value: object, wanted: object, where: str = "") -> None:
        self.key, self.value, self.wanted, self.where = key, value, wanted, where
        told = repr(value)[:_SHOWN] + "…" * (len(repr(value)) > _SHOWN)
        super().__init__(f"{key} is {told}; it must be {wanted}" + (f" ({where})" if where else ""))

    def at(self, where: str) -> WrongValue:
        """Return the same complaint with the place that the value comes from."""
        return WrongValue(self.key, self.value, self.wanted, where)


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers of a setting: of a `kind`, finite, from `least` (or more than `above`) to `most` (or under `below`).

    A truth value is no number, and a whole float is an integer.
    """

    kind: type[int] | type[float]
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def __str__(self) -> str:
        return self.told(None)

    def told(self, value: object) -> str:
        """Return the range in words; the bound that every number has is only told where `value` is beyond it."""
        beyond = isinstance(value, int | float) and value > _LARGEST
        most = _LARGEST if self.most is None and beyond else self.most
        bounds = {"at least": self.least, "above": self.above, "at most": most, "below": self.below}
        told = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
        return ("a whole number" if self.kind is int else "a number") + (f", {told}" if told else "")

    def read(self, value: Any) -> int | float | None:
        """Return `value` as a number of this kind, or None where it is none of them."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if self.kind is int and value != int(value):
            return None
        inside = (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and value <= (_LARGEST if self.most is None else self.most)
        )
        return self.kind(value) if inside else None

    def checked(self, key: str, value: Any) -> int | float:
        """Return `value` as a number of this kind.

        Raises:
            WrongValue: It is none of them.
        """
        found = self.read(value)
        if found is None:
            raise WrongValue(key, value, self.told(value))
        return found


_SHOWN = 80  # characters of a value that a complaint repeats
_LARGEST = 2**53  # what floats count exactly; a number beyond it is a slip, and arrays of it would not fit anywhere

COUNT = Range(int, least=1)
SEED = Range(int, least=0, most=2**32 - 1)  # what numpy takes
Count = Annotated[int, COUNT]
Seed = Annotated[int, SEED]
Share = Annotated[float, Range(float, least=0, most=1)]
