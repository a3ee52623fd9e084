"""Which text of a prompt too long for a model is cut next, and what helps once nothing is left to cut."""

from __future__ import annotations

from collections.abc import Sequence

FEWEST = 8  # characters a filled-in text keeps
_ONE_QUESTION = 2  # the most texts filled into a question that lists no items: preference and title, image and text

SHORTER_HISTORY = "set a smaller max_history (where summary_mode is recurrent, block_size)"


def longest_text(pieces: Sequence[str]) -> int | None:
    """Return the place of the longest filled-in text in a prompt's `pieces`; None where each is as short as can be."""
    longest = max(range(1, len(pieces), 2), key=lambda i: len(pieces[i]), default=0)
    return longest if longest and len(pieces[longest]) > FEWEST else None


def lists_items(pieces: Sequence[str]) -> bool:
    """Whether a prompt's `pieces` are a list of a history's items, which a shorter history would shorten."""
    return len(pieces) // 2 > _ONE_QUESTION


def first_and_last(pieces: Sequence[str]) -> list[str]:
    """Return what is left of a prompt that lists items when only its first and its last filled-in text are."""
    return [*pieces[:3], *pieces[-2:]]
