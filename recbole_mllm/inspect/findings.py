"""What of the measurements somebody should know, each with a count, an example and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from recbole_mllm.inspect.measure import LONG_TITLE, Health

FEW = 3  # of a shorter history, leave-one-out keeps a training row at most: sequential models are not tested on it
SAMPLES = (
    ("quoted", "value starts", "values start", "with a quote",
     "remove the quotes: RecBole drops them or, where the second is missing, cannot read the file"),
    ("twice", "item stands", "items stand", "twice in .item",
     "keep one row of each: RecBole would shift all items behind it, and MLLMMSR refuses the file"),
    ("unfit", "id does", "ids do", "not survive RecBole's reader",
     "rename them; a run stops at an id that is empty, and RecBole alone drops its rows"),
    ("alike_users", "user id differs", "user ids differ", "from another only in case or outer space",
     "make them one where they mean the same"),
    ("alike_items", "item id differs", "item ids differ", "from another only in case or outer space",
     "make them one where they mean the same"),
    ("invisible", "id holds", "ids hold", "invisible characters", "remove them where they came in by accident"),
    ("unlisted", "item with interactions has", "items with interactions have", "no row in .item",
     "add them; without a title and an image MLLMMSR can only guess"),
    ("lines_twice", "line repeats", "lines repeat", "an earlier one",
     "remove them: a history would hold the same event twice"),
    ("met_again", "interaction repeats", "interactions repeat", "an earlier one of the same user and item",
     "keep them if people do come back to an item; else set rm_dup_inter: first (RecBole keeps one)"),
    ("early", "time lies", "times lie", "at or before 1970-01-01, and so first in a history",
     "check the raw times: they are to be seconds or milliseconds since 1970"),
    ("late", "time lies", "times lie", "after tomorrow, and so last in a history",
     "check the raw times: they are to be seconds or milliseconds since 1970"),
    ("untimed", "interaction has", "interactions have", "no time", "add it: a run stops at the first of them"),
    ("reordered", "user has", "users have",
     "their items in another order in RecBole, which rounds times to float32, than by exact time",
     "sort the rows by time: RecBole keeps the file's order where rounded times are equal"),
    ("other_last", "user has", "users have", "another last item in that order",
     "a leave-one-out test of RecBole alone asks for a wrong one; sort the rows by time"),
    ("untitled", "item has", "items have", "no title", "add them; MLLMMSR's prompts name items by their title"),
    ("long_title", "title is", "titles are", f"longer than {LONG_TITLE:,} characters",
     "shorten them; a prompt holds ten and is cut at max_text_tokens"),
    ("same_title", "item has", "items have", "the title of another", "check that they are not one item under two ids"),
    ("unusable", "image cannot", "images cannot", "be used",
     "fix or remove them; until then they count as missing (missing_images.tsv lists them)"),
    ("imageless", "item has", "items have", "no image",
     "add them, or let MLLMMSR read these items' text alone (missing_images.tsv lists them)"),
)  # fmt: skip
"""What each sample means: its name, a subject and verb for one and for several, the rest, and what to do."""


class Finding(NamedTuple):
    """Something that matters: what it is, and what to do about it."""

    what: str
    todo: str


def many(count: int, one: str, several: str) -> str:
    """Return the count with its noun."""
    return f"{count:,} {one if count == 1 else several}"


def share(part: int, whole: int) -> str:
    """Return `part` of `whole` as a percentage that is 0 or 100 only where it is exact."""
    if not whole or part in (0, whole):
        return "100 %" if whole and part == whole else "0 %"
    percent = 100 * part / whole
    return "< 0.1 %" if percent < 0.1 else "> 99.9 %" if percent > 99.9 else f"{percent:.1f} %"


def findings(health: Health) -> list[Finding]:
    """Return what matters: first what the samples show, then what is missing or too thin."""
    found = [*_samples(health), *_others(health)]
    return [Finding(*(f"{words[0].upper()}{words[1:]}." for words in finding)) for finding in found]


def _samples(health: Health) -> Iterator[Finding]:
    for name, one, several, rest, todo in SAMPLES:
        sample = health.found[name]
        if name == "met_again" and health.layout.is_split:
            todo = "keep them if people do come back to an item; else remove them, and split again"
        if sample.count:
            example = f", the first: {sample.example}" if sample.example else ""
            yield Finding(f"{many(sample.count, one, several)} {rest}{example}", todo)


def _others(health: Health) -> Iterator[Finding]:
    items, layout = health.items, health.layout
    few = int((health.lengths < FEW).sum())
    if health.times is None and not layout.history:
        what = f"there is no usable time ({layout.time}), so the order is that of the file"
        yield Finding(what, "add a column timestamp:float, or name yours as TIME_FIELD in dataset.yaml")
    if few and not layout.history and not layout.is_split:
        yield Finding(
            f"{many(few, 'user has', 'users have')} fewer than {FEW} interactions ({share(few, len(health.lengths))})",
            "a leave-one-out test of sequential models asks nothing of them; "
            'user_inter_num_interval: "[3,inf)" leaves them out',
        )
    if not items.exists:
        todo = f"write it, with columns {layout.item}:token, title:token_seq, image:token"
        yield Finding(f"there is no {health.name}.item", todo)
        return
    if not items.has_titles:
        todo = "add title:token_seq; MLLMMSR's prompts name items by it"
        yield Finding(f"{health.name}.item has no column of titles", todo)
    if not (items.images.found or items.images.missing or items.images.absent):
        todo = "give --image_dir=DIR with files named after item ids, or add a column image:token to .item"
        yield Finding("no item has an image", todo)
