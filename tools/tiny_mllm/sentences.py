"""What is said about the demo world's products and users, how it is read back, and the rule behind a preference."""

from __future__ import annotations

import re
from collections.abc import Sequence

from recbole_mllm.demo.attributes import FIELDS, VISIBLE, Item, Traits

# Votes of the preference rule, in twentieths so that sums are exact: item i of a block has 1 + .2 i votes and the
# previous preference 2.05, which is an odd number of twentieths and thus never ties with items.
_FIRST_VOTE, _RECENCY, _PREVIOUS_VOTE = 20, 4, 41

_CAPTION = re.compile(r"A (?P<colour>\w+) (?P<pattern>\w+) (?P<kind>\w+), (?P<scene>\w+) scene\.")
_TEXT_SUMMARY = re.compile(r"A (?P<theme>\w+) product by \w+\.")
_FUSED = re.compile(_CAPTION.pattern.replace(r"scene\.", r"scene, (?P<theme>\w+) theme\."))
_PREFERENCE = re.compile(r"The user prefers (\w+ \w+(?:, \w+ \w+)*)\.")


def caption(item: Item) -> str:
    """Return what the image shows."""
    return f"A {item.colour} {item.pattern} {item.kind}, {item.scene} scene."


def text_summary(item: Item) -> str:
    """Return what the title tells."""
    return f"A {item.theme} product by {item.brand}."


def fused_summary(item: Item) -> str:
    """Return what image and title tell together."""
    return f"A {item.colour} {item.pattern} {item.kind}, {item.scene} scene, {item.theme} theme."


def preference_text(traits: Traits) -> str:
    """Return the preference summary; it lists the known fields only."""
    return "The user prefers " + ", ".join(f"{traits[field]} {field}" for field in FIELDS if field in traits) + "."


def parse_caption(text: str) -> dict[str, str] | None:
    """Read back `caption`, or None where the text is no caption."""
    return _groups(_CAPTION, text)


def parse_text_summary(text: str) -> dict[str, str] | None:
    """Read back `text_summary` (its theme), or None."""
    return _groups(_TEXT_SUMMARY, text)


def parse_fused_summary(text: str) -> dict[str, str] | None:
    """Read back `fused_summary`, or None."""
    return _groups(_FUSED, text)


def parse_preference(text: str) -> dict[str, str] | None:
    """Read back `preference_text`, or None where fields are unknown, twice, or out of order."""
    match = _PREFERENCE.fullmatch(text.strip())
    if not match:
        return None
    pairs = [part.split(" ") for part in match[1].split(", ")]
    named = [field for _, field in pairs]
    in_order = [field for field in FIELDS if field in named]
    return {field: value for value, field in pairs} if named == in_order else None


def known_traits(item: Item, summary: str) -> dict[str, str]:
    """Return what a reader of the item's title and `summary` knows of it: the theme, and the look if it is told."""
    told = parse_caption(summary) or parse_fused_summary(summary) or {}
    return {**{field: told[field] for field in VISIBLE if field in told}, "theme": item.theme}


def summarize(block: Sequence[Traits], previous: Traits | None = None) -> dict[str, str]:
    """Return the preference behind `block` (oldest first), given the `previous` one if any.

    In every field the values vote, later items more; of equal values the one seen last wins, so the answer depends on
    nothing but the arguments. A field nobody knows stays unknown.
    """
    preference = {}
    for field in FIELDS:
        votes: dict[str, tuple[int, int]] = {}  # value -> (votes, when last seen)
        if previous and field in previous:
            votes[previous[field]] = (_PREVIOUS_VOTE, -1)
        for position, traits in enumerate(block):
            if field in traits:
                counted, _ = votes.get(traits[field], (0, 0))
                votes[traits[field]] = (counted + _FIRST_VOTE + _RECENCY * position, position)
        if votes:
            preference[field] = max(votes, key=votes.__getitem__)
    return preference


def _groups(pattern: re.Pattern[str], text: str) -> dict[str, str] | None:
    match = pattern.fullmatch(text.strip())
    return match.groupdict() if match else None
