"""The dataset's health as plain text, in aligned columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from recbole_mllm.health.findings import Finding, findings
from recbole_mllm.health.measure import Health
from recbole_mllm.health.wording import SORTED, many, of, quantiles, span

WIDTH = 110
Fact = tuple[str, str]


def facts(health: Health) -> list[Fact]:
    """Return what was measured, each under its name."""
    return [*_size(health), *_time(health), *_content(health), *_summaries(health)]


def _size(health: Health) -> Iterable[Fact]:
    items = health.items
    yield "users", f"{health.n_users:,}"
    listed = f"{len(items.lines):,} in .item" if items.exists else "no .item file"
    unused = f", {health.ids.unused.count:,} of them without interactions" if health.ids.unused.count else ""
    yield "items", f"{health.n_items:,} with interactions; {listed}{unused}"
    density = f"density {100 * health.density:.3g} %"
    if health.layout.history is None:
        yield "interactions", f"{health.n_interactions:,}; {density}"
    else:
        rows = ", ".join(f"{part} {count:,}" for part, count in health.parts.items())
        yield "interactions", f"{health.n_interactions:,} in histories and targets; {density}; rows: {rows}"
    yield "history length", _spread(quantiles(health.lengths))
    yield "item popularity", _spread(quantiles(health.popularity))
    yield "repeats", f"{health.pairs_twice.count:,} of the same user and item; {health.rows_twice:,} identical lines"


def _spread(values: list[tuple[str, int]]) -> str:
    return "   ".join(f"{name} {value:,}" for name, value in values) or "–"


def _time(health: Health) -> Iterable[Fact]:
    order = health.order
    if order is None:
        yield "time", "in the histories' order" if health.layout.history else "none"
        return
    yield "time", f"{span(order)}; {SORTED[order.sorted]}"
    ties = many(order.ties, "user with", "users with")
    changed = many(order.reordered.count, "user", "users")
    yield "order", f"{ties} equal times; {changed} in another order in RecBole"


def _content(health: Health) -> Iterable[Fact]:
    total = health.n_all_items
    yield "with title", of(health.items.titled, total)
    yield "with image", of(health.items.n_images, total)


def _summaries(health: Health) -> Iterable[Fact]:
    if not health.summaries:
        yield "with summary", "none yet; recbole-mllm summarize makes them"
    for found in health.summaries:
        if found.users is None:
            yield "with summary", f"{of(found.rows, health.n_all_items)}: {found.tag}"
        else:
            yield "user summaries", f"{found.rows:,} of {many(found.users, 'user', 'users')}: {found.tag}"


def format_health(health: Health) -> str:
    """Return the whole report."""
    rows = facts(health)
    width = max(len(name) for name, _ in rows)
    lines = [f"{health.layout.name} ({health.layout.folder})", ""]
    lines += [f"{name.ljust(width)}  {value}" for name, value in rows]
    told = findings(health)
    lines += ["", many(len(told), "warning", "warnings") if told else "nothing to warn of"]
    return "\n".join(lines + [line for finding in told for line in _warning(finding)])


def _warning(finding: Finding) -> list[str]:
    """Return the finding and what to do, wrapped; a long path or id is never broken."""
    text = f"{finding.what} {finding.todo}"
    return textwrap.wrap(text, WIDTH, initial_indent="! ", subsequent_indent="  ", break_long_words=False,
                         break_on_hyphens=False)  # fmt: skip
