"""What of the measurements somebody should know, each with a count, an example and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from recbole_mllm.data.values import MAX_CHARACTERS, clean
from recbole_mllm.health.items import LONG_TITLE
from recbole_mllm.health.measure import Health
from recbole_mllm.health.sample import Sample
from recbole_mllm.health.wording import many, share

FEW = 3  # of a shorter history, leave-one-out keeps a training row at most: sequential models are not tested on it


class Finding(NamedTuple):
    """Something that matters: what it is, and what to do about it."""

    what: str
    todo: str


def findings(health: Health) -> list[Finding]:
    """Return what matters, the gravest first: what breaks reading, then what changes results, then what is thin."""
    found = [*_reading(health), *_ids(health), *_repeats(health), *_order(health), *_thin(health), *_items(health)]
    return [Finding(_sentence(what), _sentence(todo)) for what, todo in found]


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _told(sample: Sample, one: str, several: str, todo: str) -> Iterable[Finding]:
    if sample.count:
        yield Finding(f"{many(sample.count, one, several)}, the first: {sample.example}", todo)


def _reading(health: Health) -> Iterable[Finding]:
    for name in health.marked:
        yield Finding(
            f"{name} begins with a byte order mark, which RecBole without this package takes for a part of a name",
            "save it as UTF-8 without BOM",
        )
    quoted = Sample(
        health.quoted.count + health.items.quoted.count, health.quoted.example or health.items.quoted.example
    )
    yield from _told(
        quoted, "value starts with a quote", "values start with a quote",
        "remove the quotes: RecBole drops them or, where the second is missing, cannot read the file",
    )  # fmt: skip
    yield from _told(
        health.items.too_long, f"value is longer than {MAX_CHARACTERS:,} characters",
        f"values are longer than {MAX_CHARACTERS:,} characters", "shorten them: RecBole's reader stops there",
    )  # fmt: skip
    yield from _told(
        health.items.twice, "item stands twice in .item", "items stand twice in .item",
        "keep one row of each: RecBole would shift all items behind it, and MLLMMSR refuses the file",
    )  # fmt: skip


def _ids(health: Health) -> Iterable[Finding]:
    ids = health.ids
    yield from _told(
        ids.unfit, "id does not survive RecBole's reader", "ids do not survive RecBole's reader",
        "rename them; a run stops at an id that is empty, and RecBole alone drops its rows",
    )  # fmt: skip
    for sample, kind in ((ids.alike_users, "user"), (ids.alike_items, "item")):
        yield from _told(
            sample, f"{kind} id differs from another only in case or outer space",
            f"{kind} ids differ from another only in case or outer space", "make them one where they mean the same",
        )  # fmt: skip
    yield from _told(
        ids.invisible, "id holds invisible characters", "ids hold invisible characters",
        "remove them where they came in by accident",
    )  # fmt: skip
    yield from _told(
        ids.unlisted, "item with interactions has no row in .item", "items with interactions have no row in .item",
        "add them; without a title and an image MLLMMSR can only guess",
    )  # fmt: skip


def _repeats(health: Health) -> Iterable[Finding]:
    if health.rows_twice:
        lines = many(health.rows_twice, "line repeats an earlier one", "lines repeat an earlier one")
        yield Finding(lines, "remove them: a history would hold the same event twice")
    pairs = Sample(max(0, health.pairs_twice.count - health.rows_twice), health.pairs_twice.example)
    yield from _told(
        pairs, "interaction is not the first of its user with its item",
        "interactions are not the first of their user with their item",
        "keep them if people do come back to an item; else set rm_dup_inter: first (RecBole keeps one)",
    )  # fmt: skip


def _order(health: Health) -> Iterable[Finding]:
    order = health.order
    for count, where in zip(health.impossible_times, ("at or before 1970-01-01", "after tomorrow"), strict=True):
        if count:
            place = "first" if where.startswith("at") else "last"
            yield Finding(
                f"{many(count, 'time lies', 'times lie')} {where}, so that they come {place} in their histories",
                "check the raw times: they are to be seconds or milliseconds since 1970",
            )
    if order is None:
        if health.layout.history is None:
            what = f"there is no usable time ({health.layout.time}), so the order is that of the file"
            yield Finding(what, "add a column timestamp:float, or name yours as TIME_FIELD in dataset.yaml")
        return
    if order.missing:
        what = many(order.missing, "interaction has no time", "interactions have no time")
        yield Finding(what, "add it: a run stops at the first of them")
    if order.reordered.count:
        users = many(order.reordered.count, "user's", "users'")
        yield Finding(
            f"{users} items stand in another order in RecBole, which rounds times to float32, than by exact time; "
            f"{order.other_last:,} with another last item; the first is user {order.reordered.example!r}",
            "sort the rows by time: RecBole keeps the file's order where rounded times are equal",
        )


def _thin(health: Health) -> Iterable[Finding]:
    few = int((health.lengths < FEW).sum())
    if few and health.layout.history is None:
        what = many(few, f"user has fewer than {FEW} interactions", f"users have fewer than {FEW} interactions")
        yield Finding(
            f"{what} ({share(few, health.n_users)})",
            "a leave-one-out test of sequential models asks nothing of them; "
            'user_inter_num_interval: "[3,inf)" leaves them out',
        )


def _items(health: Health) -> Iterable[Finding]:
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
    if items.long.count:
        length, item = items.longest
        what = many(items.long.count, "title is", "titles are")
        yield Finding(
            f"{what} longer than {LONG_TITLE:,} characters, the longest ({length:,}) of item {item!r}",
            "shorten them; a prompt holds ten and is cut at max_text_tokens",
        )
    yield from _told(
        items.same_title, "item has the title of another", "items have the title of another",
        "check that they are not one item under two ids",
    )  # fmt: skip
    yield from _images(health)


def _images(health: Health) -> Iterable[Finding]:
    if health.items.missing:
        item, path, reason = health.items.missing[0]
        what = many(len(health.items.missing), "image cannot be used", "images cannot be used")
        yield Finding(
            f"{what}, the first of item {item!r}: {clean(path)} {reason}",
            "mend or remove them; until then they count as missing (missing_images.tsv lists them)",
        )
    if health.items.lengthy:
        item, path, reason = health.items.lengthy[0]
        what = many(len(health.items.lengthy), "image is hardly one", "images are hardly any")
        yield Finding(
            f"{what}, the first of item {item!r}: {clean(path)} {reason}",
            "mend or remove them: Qwen-VL's processor refuses them, and a run with it counts them as missing "
            "(missing_images.tsv lists them)",
        )
    if not health.items.n_images and not health.items.missing:
        todo = "give --image_dir=DIR with files named after item ids, or add a column image:token to .item"
        yield Finding("no item has an image", todo)
    elif health.items.absent:
        item, _, reason = health.items.absent[0]
        what = many(len(health.items.absent), "item has", "items have")
        yield Finding(
            f"{what} no image: item {item!r}: {reason}",
            "add them, or let MLLMMSR read these items' text alone (missing_images.tsv lists them)",
        )
