"""What of the measurements somebody should know, each with a count, an example and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from recbole_mllm.data.atomic import MAX_CHARACTERS, clean
from recbole_mllm.data.images import Missing
from recbole_mllm.inspect.measure import LONG_TITLE, Health, Sample

FEW = 3  # of a shorter history, leave-one-out keeps a training row at most: sequential models are not tested on it


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
    """Return what matters, the gravest first: what breaks reading, then what changes results, then what is thin."""
    found = [*_samples(health), *_repeats(health), *_order(health), *_items(health)]
    return [Finding(*(f"{words[0].upper()}{words[1:]}." for words in finding)) for finding in found]


def _of(sample: Sample, one: str, several: str, todo: str) -> Iterator[Finding]:
    if sample.count:
        yield Finding(f"{many(sample.count, one, several)}, the first: {sample.example}", todo)


def _samples(health: Health) -> Iterator[Finding]:
    for name in health.marked:
        yield Finding(
            f"{name} begins with a byte order mark, which RecBole without this package takes for a part of a name",
            "save it as UTF-8 without BOM",
        )
    alike = "differ from another only in case or outer space"
    same = alike.replace("differ", "differs"), "make them one where they mean the same"
    long = f"longer than {MAX_CHARACTERS:,} characters"
    for name, one, several, todo in (
        ("quoted", "value starts with a quote", "values start with a quote",
         "remove the quotes: RecBole drops them or, where the second is missing, cannot read the file"),
        ("too_long", f"value is {long}", f"values are {long}", "shorten them: RecBole's reader stops there"),
        ("twice", "item stands twice in .item", "items stand twice in .item",
         "keep one row of each: RecBole would shift all items behind it, and MLLMMSR refuses the file"),
        ("unfit", "id does not survive RecBole's reader", "ids do not survive RecBole's reader",
         "rename them; a run stops at an id that is empty, and RecBole alone drops its rows"),
        ("alike_users", f"user id {same[0]}", f"user ids {alike}", same[1]),
        ("alike_items", f"item id {same[0]}", f"item ids {alike}", same[1]),
        ("invisible", "id holds invisible characters", "ids hold invisible characters",
         "remove them where they came in by accident"),
        ("unlisted", "item with interactions has no row in .item", "items with interactions have no row in .item",
         "add them; without a title and an image MLLMMSR can only guess"),
    ):  # fmt: skip
        yield from _of(health.found[name], one, several, todo)


def _repeats(health: Health) -> Iterator[Finding]:
    pairs = health.found["pairs_twice"]
    if health.rows_twice:
        lines = many(health.rows_twice, "line repeats an earlier one", "lines repeat an earlier one")
        yield Finding(lines, "remove them: a history would hold the same event twice")
    yield from _of(
        Sample(max(0, pairs.count - health.rows_twice), pairs.example),
        "interaction is not the first of its user with its item",
        "interactions are not the first of their user with their item",
        "keep them if people do come back to an item; else set rm_dup_inter: first (RecBole keeps one)",
    )


def _order(health: Health) -> Iterator[Finding]:
    order, histories = health.order, health.layout.history is not None
    for count, where in zip(health.impossible_times, ("at or before 1970-01-01", "after tomorrow"), strict=True):
        if count:
            place = "first" if where.startswith("at") else "last"
            yield Finding(
                f"{many(count, 'time lies', 'times lie')} {where}, so that they come {place} in their histories",
                "check the raw times: they are to be seconds or milliseconds since 1970",
            )
    if order is None and not histories:
        what = f"there is no usable time ({health.layout.time}), so the order is that of the file"
        yield Finding(what, "add a column timestamp:float, or name yours as TIME_FIELD in dataset.yaml")
    if order is not None and order.missing:
        what = many(order.missing, "interaction has no time", "interactions have no time")
        yield Finding(what, "add it: a run stops at the first of them")
    if order is not None and order.reordered.count:
        users = many(order.reordered.count, "user's", "users'")
        yield Finding(
            f"{users} items stand in another order in RecBole, which rounds times to float32, than by exact time; "
            f"{order.other_last:,} with another last item; the first is user {order.reordered.example!r}",
            "sort the rows by time: RecBole keeps the file's order where rounded times are equal",
        )
    few = int((health.lengths < FEW).sum())
    if few and not histories:
        what = many(few, f"user has fewer than {FEW} interactions", f"users have fewer than {FEW} interactions")
        yield Finding(
            f"{what} ({share(few, health.n_users)})",
            "a leave-one-out test of sequential models asks nothing of them; "
            'user_inter_num_interval: "[3,inf)" leaves them out',
        )


def _items(health: Health) -> Iterator[Finding]:
    items, name = health.items, health.layout.name
    if not items.exists:
        columns = f"{health.layout.item}:token, title:token_seq, image:token"
        yield Finding(f"there is no {name}.item", f"write it, with columns {columns}")
        return
    if not items.has_titles:
        yield Finding(f"{name}.item has no column of titles", "add title:token_seq; MLLMMSR's prompts name items by it")
    elif items.titled < len(items.lines):
        what = many(len(items.lines) - items.titled, "item has no title", "items have no title")
        yield Finding(what, "add them; MLLMMSR's prompts name items by their title")
    if items.long:
        length, item = items.longest
        yield Finding(
            f"{many(items.long, 'title is', 'titles are')} longer than {LONG_TITLE:,} characters, "
            f"the longest ({length:,}) of item {item!r}",
            "shorten them; a prompt holds ten and is cut at max_text_tokens",
        )
    yield from _of(
        health.found["same_title"], "item has the title of another", "items have the title of another",
        "check that they are not one item under two ids",
    )  # fmt: skip
    listed = "(missing_images.tsv lists them)"
    todo = f"mend or remove them; until then they count as missing {listed}"
    yield from _images(items.missing, "image cannot be used", "images cannot be used", todo)
    todo = f"mend or remove them: Qwen-VL's processor refuses them, and a run with it counts them as missing {listed}"
    yield from _images(items.lengthy, "image is hardly one", "images are hardly any", todo)
    if not items.n_images and not items.missing:
        todo = "give --image_dir=DIR with files named after item ids, or add a column image:token to .item"
        yield Finding("no item has an image", todo)
    elif items.absent:
        item, _, reason = items.absent[0]
        what = many(len(items.absent), "item has", "items have")
        yield Finding(
            f"{what} no image: item {item!r}: {reason}",
            "add them, or let MLLMMSR read these items' text alone (missing_images.tsv lists them)",
        )


def _images(listed: list[Missing], one: str, several: str, todo: str) -> Iterator[Finding]:
    if listed:
        item, path, reason = listed[0]
        yield Finding(f"{many(len(listed), one, several)}, the first of item {item!r}: {clean(path)} {reason}", todo)
