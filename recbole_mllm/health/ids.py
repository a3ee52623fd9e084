"""Ids that look wrong: unknown, unused, unfit for RecBole's reader, or so alike that they may be one."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from recbole_mllm.data.atomic import id_problem, word_problem
from recbole_mllm.health.interactions import Interactions
from recbole_mllm.health.items import Items
from recbole_mllm.health.sample import Sample


@dataclass(frozen=True, slots=True)
class Ids:
    """Counts of suspicious ids, each with an example.

    Attributes:
        unlisted: Items with interactions that have no row in ``X.item``.
        unused: Items of ``X.item`` without interactions.
        unfit: Ids that RecBole's reader loses or changes.
        alike_users, alike_items: Ids that differ only in case or outer space from one before.
        invisible: Ids with characters nobody sees, such as zero-width spaces.
    """

    unlisted: Sample
    unused: Sample
    unfit: Sample
    alike_users: Sample
    alike_items: Sample
    invisible: Sample


def measure_ids(inter: Interactions, items: Items, in_histories: bool) -> Ids:
    """Look at every id; inside histories (``token_seq``) an id must hold no space."""
    played = set(inter.items)
    item_ids = [*inter.items, *(item for item in items.lines if item not in played)]
    return Ids(
        unlisted=_sample(_outside(inter.items, items.lines)) if items.exists else Sample(),
        unused=_sample(_outside(items.lines, played)),
        unfit=_unfit(inter.users, item_ids, in_histories),
        alike_users=_alike(inter.users),
        alike_items=_alike(item_ids),
        invisible=_sample(i for i in (*inter.users, *item_ids) if not i.isprintable() and id_problem(i) is None),
    )


def _outside(ids: Iterable[str], known: Collection[str]) -> Iterable[str]:
    return (item for item in ids if item not in known)


def _sample(ids: Iterable[str]) -> Sample:
    found = Sample()
    for text in ids:
        found.add(repr(text[:60]))
    return found


def _unfit(users: Iterable[str], items: Iterable[str], in_histories: bool) -> Sample:
    found = Sample()
    for kind, ids in (("user", users), ("item", items)):
        judge = word_problem if in_histories and kind == "item" else id_problem
        for text in ids:
            if (problem := judge(text)) is not None:
                found.add(f"{kind} {text[:60]!r} {problem}")
    return found


def _alike(ids: Iterable[str]) -> Sample:
    found, first_with = Sample(), dict[str, str]()
    for text in ids:
        first = first_with.setdefault(text.strip().casefold(), text)
        if first is not text:
            found.add(f"{first[:60]!r} and {text[:60]!r}")
    return found
