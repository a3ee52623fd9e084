"""What changed between two texts, word by word, in pieces that a reader can follow."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from itertools import groupby
from typing import Literal, NamedTuple

Change = Literal["same", "gone", "new"]
SHORT = 2  # fewer unchanged words between two changes are part of the change: single "the"s make no text readable


class Piece(NamedTuple):
    """Some words and what became of them; without the ``gone`` pieces, a list of these is the later text."""

    change: Change
    text: str


def word_changes(before: str, after: str) -> list[Piece]:
    """Return `after` in pieces, with what has gone from `before` where it stood."""
    old, new = re.findall(r"\S+", before), re.findall(r"\S+", after)
    blocks = SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    told: list[tuple[bool, list[str], list[str]]] = []
    for number, (tag, a, b, c, d) in enumerate(blocks):
        inner = 0 < number < len(blocks) - 1
        told.append((tag == "equal" and not (inner and b - a < SHORT), old[a:b], new[c:d]))
    pieces: list[Piece] = []
    for same, parts in groupby(told, key=lambda part: part[0]):
        pairs = list(parts)
        gone = [word for _, left, _ in pairs for word in left]
        come = [word for _, _, right in pairs for word in right]
        if same:
            pieces.append(Piece("same", " ".join(come)))
            continue
        if gone:
            pieces.append(Piece("gone", " ".join(gone)))
        if come:
            pieces.append(Piece("new", " ".join(come)))
    return pieces
