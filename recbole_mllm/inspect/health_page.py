"""What was measured of a dataset, for people: as text, as one HTML file, and the list of images that are missing.

The page needs no network and no script, and is readable in the dark, on a phone and on paper.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.files import head, may_replace, write_text
from recbole_mllm.common.svg import Axis, Chart, environment, linear_axis, log_count_axis
from recbole_mllm.data.images import MISSING_HEADER, Missing, write_report
from recbole_mllm.data.splits import utc
from recbole_mllm.inspect.findings import findings, many, share
from recbole_mllm.inspect.measure import Health

PAGE, MISSING = "inspect.html", "missing_images.tsv"
TEXT_WIDTH = 110
QUANTILES = {"min": 0.0, "5 %": 0.05, "25 %": 0.25, "50 %": 0.5, "75 %": 0.75, "95 %": 0.95, "max": 1.0}
SPREADS = ("history length", "item popularity")  # facts that have a table of their own on the page
WIDTH, HEIGHT = 420, 260
LEFT, RIGHT, TOP, BOTTOM = 46, 406, 26, 216  # of the area between the axes
MAX_POINTS = 240
_USERS, _INTERACTIONS = ("user", "users"), ("interaction", "interactions")


# ---- text


def facts(health: Health) -> Iterator[tuple[str, str]]:
    """Yield what was measured, each under its name."""
    items, found = health.items, health.found
    yield "users", f"{len(health.lengths):,}"
    listed = f"{len(items.lines):,} in .item" if items.exists else "no .item file"
    alone = f", {found['unused'].count:,} of them without interactions" if found["unused"].count else ""
    yield "items", f"{len(health.popularity):,} with interactions; {listed}{alone}"
    where = " in histories and targets" if health.layout.history else ""
    yield "interactions", f"{health.n_interactions:,}{where}; density {100 * health.density:.3g} %"
    for name, values in zip(SPREADS, (health.lengths, health.popularity), strict=True):
        yield name, "   ".join(f"{label} {value:,}" for label, value in quantiles(values)) or "–"
    repeats, lines = found["pairs_twice"].count, found["lines_twice"].count
    yield "repeats", f"{repeats:,} of the same user and item; {lines:,} identical lines"
    if health.times is None:
        yield "time", "in the histories' order" if health.layout.history else "none"
    else:
        yield "time", " to ".join(map(moment, health.times))
        ties, changed = (many(found[name].count, *_USERS) for name in ("ties", "reordered"))
        yield "order", f"{ties} with equal times; {changed} in another order in RecBole"
    yield "with title", _part(items.titled, health.n_all_items)
    yield "with image", _part(len(items.images.found), health.n_all_items)
    tags = sorted({*health.item_tags, *health.user_tags})
    kinds = {"items": health.item_tags, "users": health.user_tags}
    yield (
        "summaries",
        "; ".join(f"{tag} ({', '.join(kind for kind, known in kinds.items() if tag in known)})" for tag in tags)
        or "none",
    )


def format_health(health: Health) -> str:
    """Return the whole report as text, in aligned columns; a long path or id is never broken."""
    rows, found = list(facts(health)), findings(health)
    width = max(len(name) for name, _ in rows)
    lines = [f"{health.name} ({health.layout.folder})", ""]
    lines += [f"{name.ljust(width)}  {value}" for name, value in rows]
    lines += ["", _warnings(len(found))]
    for finding in found:
        lines += textwrap.wrap(
            " ".join(finding), TEXT_WIDTH, initial_indent="! ", subsequent_indent="  ", break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip
    return "\n".join(lines)


def _warnings(count: int) -> str:
    return many(count, "warning", "warnings") if count else "nothing to warn of"


def _part(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({share(part, whole)})"


def quantiles(ascending: NDArray[np.int64]) -> list[tuple[str, int]]:
    """Return named quantiles that are values of the sample themselves (the lower one, between two)."""
    if not len(ascending):
        return []
    values = np.quantile(ascending, list(QUANTILES.values()), method="lower")
    return list(zip(QUANTILES, values.tolist(), strict=True))


def moment(time: float) -> str:
    """Return a time as a date if it can be one, else as a number."""
    date = utc(time)
    return f"{date:%Y-%m-%d}" if date else f"{time:,.15g}"


# ---- the page


def health_page(health: Health) -> str:
    """Return the page; every text in it is escaped."""
    found = findings(health)
    size = f"{many(len(health.lengths), *_USERS)}, {many(len(health.popularity), 'item', 'items')}"
    spread = zip(quantiles(health.lengths), quantiles(health.popularity), strict=True)
    page = environment(Path(__file__).parent / "templates").get_template("health.html")
    return page.render(
        name=health.name,
        summary=f"{size}, {many(health.n_interactions, *_INTERACTIONS)}: {_warnings(len(found))}.",
        findings=found,
        facts=[(name, value) for name, value in facts(health) if name not in SPREADS],
        spread=[(name, of_user, of_item) for (name, of_user), (_, of_item) in spread],
        charts=charts(health),
    )


def charts(health: Health) -> list[Chart]:
    """Return the charts there is data for."""
    if not health.n_interactions:
        return []
    drawn, times = [_history_lengths(health.lengths), _item_popularity(health.popularity)], health.times
    # places in the order, where one stands for each interaction, would be a flat picture
    if times is not None and health.over_time.any() and times[1] - times[0] + 1 != health.n_interactions:
        counts = health.over_time.tolist()
        starts = [moment(start) for start in np.linspace(*times, len(counts) + 1)]
        x = Axis(0, len(counts), LEFT, RIGHT, labels=[(0, starts[0]), (len(counts), starts[-1])])
        hover = [f"from {starts[n]}: {many(count, *_INTERACTIONS)}" for n, count in enumerate(counts)]
        edges = range(len(counts) + 1)
        drawn.append(_bars("Interactions over time", x, edges, counts, hover, "time", "interactions"))
    return drawn


def _history_lengths(lengths: NDArray[np.int64]) -> Chart:
    """Draw how many users have how many interactions, in bins that grow with the length by a fifth."""
    edges = [int(lengths[0])]
    while edges[-1] <= lengths[-1]:
        edges.append(edges[-1] + max(1, round(edges[-1] * 0.2)))
    counts = np.histogram(lengths, bins=np.array(edges))[0].tolist()
    x = log_count_axis(edges[0], edges[-1], LEFT, RIGHT)
    bins = [f"{a:,}" if b == a + 1 else f"{a:,} to {b - 1:,}" for a, b in pairwise(edges)]
    hover = [f"{bin_} interactions: {many(n, *_USERS)}" for bin_, n in zip(bins, counts, strict=True)]
    return _bars("History lengths", x, edges, counts, hover, "interactions of a user, log scale", "users")


def _bars(
    title: str, x: Axis, edges: Sequence[float], counts: list[int], hover: list[str], x_title: str, y_title: str
) -> Chart:
    y = linear_axis(0, max(counts), BOTTOM, TOP, counts=True)
    bars = []
    for (low, high), count, text in zip(pairwise(edges), counts, hover, strict=True):
        left, right, top = x(low), x(high), y(count)
        width = max(0.5, right - left - min(1.5, 0.2 * (right - left)))
        bars.append({"x": left, "y": top, "width": round(width, 1), "height": round(BOTTOM - top, 1), "hover": text})
    return Chart(title, x, y, WIDTH, HEIGHT, x_title, y_title, bars, more={"note": "", "line": ""})


def _item_popularity(popularity: NDArray[np.int64]) -> Chart:
    """Draw interactions against rank, both on log axes; `popularity` ascends."""
    counts = popularity[::-1]
    ranks = np.unique(np.geomspace(1, len(counts), MAX_POINTS).round().astype(int))
    x = log_count_axis(1, max(2, len(counts)), LEFT, RIGHT)
    y = log_count_axis(1, max(2, int(counts[0])), BOTTOM, TOP)
    line = " ".join(f"{x(rank)},{y(int(counts[rank - 1]))}" for rank in ranks.tolist())
    fifth = counts[: max(1, len(counts) // 5)].sum() / counts.sum()
    note = f"The most popular fifth of the items has {100 * fifth:.0f} % of the interactions."
    titles = "items by popularity, log scale", "interactions, log scale"
    return Chart("Item popularity", x, y, WIDTH, HEIGHT, *titles, more={"note": note, "line": line})


# ---- files


def is_page(start: bytes) -> bool:
    """Return whether a file that begins so is a page of `inspect`, in whatever version."""
    return start.startswith(b"<!DOCTYPE html>") and b": dataset health</title>" in start


def _still_missing(listed: Path, health: Health) -> list[Missing]:
    """Return the rows of an earlier list whose items name no image now: `convert` says there why it left theirs out."""
    images = health.items.images
    other = {*images.found, *(one.item for one in (*images.missing, *images.absent))}
    lines = listed.read_text("utf-8", "replace").splitlines()[1:] if listed.is_file() else []
    rows = [Missing(*row) for line in lines if len(row := line.split("\t")) == len(Missing._fields)]
    return [row for row in rows if row.item in health.items.lines and row.item not in other]


def write_health(health: Health, output: Path | None) -> list[str]:
    """Write ``inspect.html``, or `output`, and ``missing_images.tsv`` beside it; return lines that say where.

    A dataset's folder that cannot be written to is no mistake: a line names it, and what to do.

    Raises:
        UserError: `output` cannot be written.
    """
    page = output or health.layout.folder / PAGE
    if output is None and page.is_file() and page.stat().st_size and not is_page(head(page)):
        return [f"page: not written, as {page} is not a page of `inspect`; give --output=FILE.html"]
    missing = [*health.items.images.missing, *health.items.images.absent]
    listed, lines = page.with_name(MISSING), []
    try:
        write_text(page, health_page(health))
        lines.append(f"page: {page}")
        if not may_replace(listed, {MISSING: MISSING_HEADER}):
            lines.append(f"missing images: not listed, as {listed} is not a list of `inspect`; give --output=FILE.html")
        elif missing or listed.is_file():  # an older list must not contradict
            missing += _still_missing(listed, health)
            write_report(listed, missing)
            lines += [f"missing images: {listed}"] * bool(missing)
    except OSError as error:
        if output is not None:
            raise UserError(f"--output {output} cannot be written: {error.strerror}") from None
        what = "missing images" if lines else "page"
        lines.append(
            f"{what}: not written, as {page.parent} cannot be written to ({error.strerror}); give --output=FILE.html"
        )
    return lines
