"""Case studies for the report: a few users' histories, what was written about them, and how two models ranked for them.

The users are the first that a fixed seed has drawn, whatever came of them, and at most two more by a rule that is told:
where the two models disagree most, one each way.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recbole_mllm.benchmark.cases import CASES, TITLES
from recbole_mllm.benchmark.field import MLLM
from recbole_mllm.benchmark.leaderboard import Leaderboard
from recbole_mllm.benchmark.records import PAIR_COLUMNS, RunRecord, read_arrays
from recbole_mllm.benchmark.thumbnails import thumbnails
from recbole_mllm.benchmark.wordiff import Piece, word_changes
from recbole_mllm.errors import UserError

SHOWN = 6
DEEPEST = 21
"""How many of a user's best items are shown where all are ranked, as many as candidates where 20 are drawn."""

BESIDE = "SASRec"
"""The baseline that is shown beside, where it has run; else the best one."""


@dataclass(frozen=True, slots=True)
class Shown:
    """An item as the page shows it; `image` is a data URI or empty."""

    item: str
    title: str
    image: str = ""


@dataclass(frozen=True, slots=True)
class Block:
    """Some items of a history, and the preference after them, in pieces; None where no text has read them."""

    first: int
    last: int
    items: tuple[Shown, ...]
    text: tuple[Piece, ...] | None
    unchanged: bool = False


@dataclass(frozen=True, slots=True)
class Ranked:
    """A candidate in a model's ranking; `p` is P(Yes) of a model that answers with one."""

    rank: int
    shown: Shown
    score: float
    hit: bool
    p: float | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """One user; `of` is how many items were ranked for them."""

    user: str
    why: str
    earlier: int
    blocks: tuple[Block, ...]
    of: int
    mine: tuple[Ranked, ...]
    theirs: tuple[Ranked, ...]

    @property
    def target(self) -> Ranked:
        """The item the user took."""
        return next(ranked for ranked in self.mine if ranked.hit)

    @property
    def their_rank(self) -> int | None:
        """Where the other model ranked it, if there is one."""
        return next((ranked.rank for ranked in self.theirs if ranked.hit), None)


@dataclass(frozen=True, slots=True)
class Casebook:
    """All cases of a page; `problem` says why there are none."""

    model: str
    beside: str
    seed: int
    cases: tuple[Case, ...] = ()
    drawn_from: int = 0
    images: str = "none"
    problem: str = ""


class Place(NamedTuple):
    """A candidate in a user's ranking; `p` is P(Yes) where an MLLM was asked, None where it was not."""

    item: str
    score: float
    hit: bool
    rank: int
    of: int
    p: float | None


Order = dict[str, list[Place]]
"""For each user the candidates, best first: all of them or, where all items are ranked, the best and the target."""


def read_casebook(board: Leaderboard, results: Path, *, embed_images: bool = True) -> Casebook | None:
    """Return the cases of MLLMMSR itself, else of its best variant that kept some, or None if none did."""
    rows = [row for row in board.rows if row.ok and row.kind == "mllm"]
    for row in sorted(rows, key=lambda row: row.runs[0].label != MLLM):
        for run in row.runs:
            path = results / str(run.per_user)
            if (path := path.with_name(CASES)).is_file():
                other = _beside(board)
                book = Casebook(row.model, other[0], run.seed)
                try:
                    return _fill(book, json.loads(path.read_text(encoding="utf-8")), (run, other[1]), results,
                                 embed_images)  # fmt: skip
                except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError) as error:
                    told = " ".join(f"{type(error).__name__}: {error}".split())
                    return replace(book, problem=f"{path.name} of run {run.run_id} cannot be shown ({told}); "
                                                 "run that model again with --force")  # fmt: skip
    return None


def _beside(board: Leaderboard) -> tuple[str, RunRecord | None]:
    baselines = {row.model: row.runs[0] for row in board.rows if row.ok and row.kind == "baseline"}
    name = BESIDE if BESIDE in baselines else board.best_baseline
    return (name, baselines[name]) if name else ("", None)


def _fill(
    book: Casebook, kept: Mapping[str, Any], runs: tuple[RunRecord, RunRecord | None], results: Path, embed: bool
) -> Casebook:
    names = [case["user"] for case in kept["users"]]
    mine, theirs = (read_order(run, results, names) for run in runs)
    chosen = choose(names, mine, theirs, book)
    told = {case["user"]: case for case in kept["users"]}
    used = [kept["items"][item]["image"] for user in chosen for item in _items(told[user], mine[user])]
    folders = [Path(str(value)) for key in ("data_path", "image_dir") if (value := runs[0].config.get(key))]
    pictures = thumbnails(used, folders) if embed else {}
    titles = _titles(runs[1], results)
    shown = {i: Shown(i, title) for i, title in titles.items()}
    shown |= {i: Shown(i, e["title"] or i, pictures.get(e["image"], "")) for i, e in kept["items"].items()}
    cases = [_case(told[user], why, shown, (mine[user], theirs.get(user, []))) for user, why in chosen.items()]
    state = "off" if not embed else "some" if pictures else "none"
    return replace(book, cases=tuple(cases), drawn_from=len(names), images=state)


def _titles(run: RunRecord | None, results: Path) -> dict[str, str]:
    """Return the titles that a run without texts of its own kept of the items it ranked best."""
    path = (results / str(run.per_user)).with_name(TITLES) if run is not None else None
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path is not None and path.is_file() else {}


def _items(case: Mapping[str, Any], order: Sequence[Place]) -> list[str]:
    return [*case["history"], *(place.item for place in order)]


def read_order(run: RunRecord | None, results: Path, users: Sequence[str]) -> Order:
    """Return how a run ranked the candidates of `users`: by the places it kept, else by score, then by item id."""
    if run is None or run.scores is None:
        return {}
    arrays = read_arrays(results / run.scores, PAIR_COLUMNS)
    mask = np.isin(arrays["user"], users)
    owner, item, label, score = (arrays[name][mask] for name in PAIR_COLUMNS)
    order: Order = {}
    among = arrays["among"][mask] if "among" in arrays else None
    # places without a file's ``answer`` are those of a model whose score is its answer
    answer = (
        arrays["answer"][mask] if "answer" in arrays else score if run.kind == "mllm" else np.full(len(score), np.nan)
    )
    place = arrays.get("place", arrays["score"])[mask]
    sizes = Counter(owner.astype(str).tolist())
    for row in np.lexsort((item, -place, owner)):
        own = order.setdefault(str(owner[row]), [])
        of = int(among[row]) if among is not None else sizes[str(owner[row])]
        rank = len(own) + 1 if among is None else int(of - place[row])
        p = None if np.isnan(answer[row]) else float(1 / (1 + np.exp(-float(answer[row]))))
        if among is None or rank <= DEEPEST or label[row] > 0:
            own.append(Place(str(item[row]), float(score[row]), bool(label[row] > 0), rank, of, p))
    return order


def choose(names: Sequence[str], mine: Order, theirs: Order, book: Casebook) -> dict[str, str]:
    """Return the users to show and why each is: the first drawn, then the furthest apart of the rest, one each way."""
    chosen = dict.fromkeys(names[:SHOWN], "drawn by seed, whatever came of it")
    rest = [name for name in names[SHOWN:] if name in theirs]
    ahead = {name: _target_rank(theirs[name]) - _target_rank(mine[name]) for name in rest}
    rule = f"chosen for disagreement: of {len(rest)} other users, the one where {{}} ranks the hit furthest above {{}}"
    for sign, pair in ((1, (book.model, book.beside)), (-1, (book.beside, book.model))):
        best = max(rest, key=lambda name: sign * ahead[name], default=None)  # the first drawn of equals
        if best is not None and sign * ahead[best] > 0:
            chosen[best] = rule.format(*pair)
    return chosen


def _target_rank(order: Sequence[Place]) -> int:
    return next(place.rank for place in order if place.hit)


def _case(case: Mapping[str, Any], why: str, shown: Mapping[str, Shown], orders: Any) -> Case:
    first, second = (
        tuple(Ranked(p.rank, shown.get(p.item, Shown(p.item, p.item)), p.score, p.hit, p.p) for p in order)
        for order in orders
    )
    return Case(case["user"], why, case["start"], _blocks(case, shown), orders[0][0].of, first, second)


def _blocks(case: Mapping[str, Any], shown: Mapping[str, Shown]) -> tuple[Block, ...]:
    """Part the history where a text was written; a model without a chain has one block and what it read."""
    start, end = case["start"], case["position"]
    steps = case["steps"] or [{"since": start, "seen": end, "text": case["read"]}]

    def items(first: int, last: int) -> tuple[Shown, ...]:
        return tuple(shown[item] for item in case["history"][max(0, first - start) : max(0, last - start)])

    blocks, before = [], None
    for step in steps:
        text = [Piece("same", step["text"])] if before is None else word_changes(before, step["text"])
        since, unchanged, before = step["since"], before == step["text"], step["text"]
        blocks.append(Block(since + 1, step["seen"], items(since, step["seen"]), tuple(text), unchanged))
    if steps[-1]["seen"] < end:
        seen = steps[-1]["seen"]
        blocks.append(Block(seen + 1, end, items(seen, end), None))
    return tuple(blocks)
