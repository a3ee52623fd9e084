"""Case studies: what a run of MLLMMSR stores of single users, and what a report shows of them without the model.

Users are drawn by a fixed seed, never by how well they came out, and in one order. A report shows the first of them,
whatever came of them, and at most two more by a rule that it states: where two models disagree most, one each way.
"""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from recbole_mllm.benchmark.leaderboard import Leaderboard
from recbole_mllm.benchmark.records import PAIR_COLUMNS, RunRecord, read_arrays
from recbole_mllm.common.files import whole_file
from recbole_mllm.common.resources import MLLM
from recbole_mllm.data.images import open_image, resolve
from recbole_mllm.data.schema import HISTORY_NUMBER, POSITION

CASES, TITLES = "cases.json", "titles.json"
STORED = 200  # users: enough for a rule to choose from, a megabyte or two on the disk
CASE_SEED = 2024
LAST_ITEMS = 60  # of a history are stored, the newest
SHOWN = 6
DEEPEST = 21  # of a user's best items are shown where all are ranked, as many as candidates where 20 are drawn
BESIDE = "SASRec"  # the baseline that is shown beside, where it has run; else the best one
SIDE = 96  # the longest side of a thumbnail in pixels: enough to recognise an item, too little to replace the picture
TRIES = ((SIDE, 70), (72, 60), (48, 55))  # side in pixels, JPEG quality: the next where the page would grow too big
BUDGET = 1_300_000  # characters that all thumbnails may take, so that the page stays below two megabytes


# ---- what a run stores


def write_cases(outcome: Any, folder: Path) -> Path | None:
    """Write ``cases.json`` of a finished `Outcome` into `folder`; None for a model that reads no preferences."""
    if (preferences := outcome.preferences) is None:
        return None
    data, rows = outcome.dataset, outcome.test_data._dataset.inter_feat
    users, tokens = _raw_ids(data)
    owners, targets = users[rows[data.uid_field].numpy()].tolist(), tokens[rows[data.iid_field].numpy()].tolist()
    histories = map(data.history_names.name, rows[HISTORY_NUMBER].tolist())
    asked = dict(zip(owners, zip(histories, rows[POSITION].tolist(), targets, strict=True), strict=True))
    chosen = drawn(asked, STORED)
    stored = [case_of(preferences, *asked[user]) for user in chosen]
    wanted = {item for case in stored for item in case["history"]} | _ranked(outcome, chosen)
    folders = [Path(str(p)) for p in (outcome.config["data_path"], outcome.config["image_dir"]) if p]
    items = {item: _stored_item(preferences.items, item, folders) for item in sorted(wanted)}
    with whole_file(folder / CASES) as file:
        json.dump({"version": 1, "seed": CASE_SEED, "users": stored, "items": items}, file, ensure_ascii=False)
    return folder / CASES


def write_titles(outcome: Any, folder: Path, titles: Mapping[str, str]) -> None:
    """Write ``titles.json``: titles of the items that a model without texts ranked best for the users that are stored.

    Where all items are ranked, they need not be among those that MLLMMSR's cases name.
    """
    users, _ = _raw_ids(outcome.dataset)
    chosen = drawn(dict.fromkeys(users[np.unique(outcome.pairs["user_id"])].tolist()), STORED)
    with whole_file(folder / TITLES) as file:
        named = {item: titles.get(item, item) for item in sorted(_ranked(outcome, chosen))}
        json.dump(named, file, ensure_ascii=False)


def _raw_ids(data: Any) -> tuple[NDArray[np.str_], NDArray[np.str_]]:
    users, items = (np.asarray(data.field2id_token[field]).astype(str) for field in (data.uid_field, data.iid_field))
    return users, items


def _ranked(outcome: Any, users: Sequence[str]) -> set[str]:
    """Return the items that were ranked for `users`."""
    names, tokens = _raw_ids(outcome.dataset)
    own = np.isin(names[outcome.pairs["user_id"]], users)
    return set(tokens[np.unique(outcome.pairs["item_id"][own])].tolist())


def drawn(users: Mapping[str, Any], limit: int) -> list[str]:
    """Return up to `limit` users in an order that depends on their names and a fixed seed alone."""
    names = sorted(users)
    return [names[index] for index in np.random.default_rng(CASE_SEED).permutation(len(names))[:limit]]


def case_of(preferences: Any, history: str, position: int, target: str) -> dict[str, Any]:
    """Return what the recommender knew when it was asked for `target` at `position` of the `history` of this name.

    ``history`` holds items ``[start, position)`` of the whole history that was read, under a control another one than
    the user's; each step has read items ``[since, seen)`` of it on top of the step before; ``read`` is the text that
    stood in the question.
    """
    from recbole_mllm.data.histories import user_of

    name, end = preferences.place(history, position)
    start = max(0, end - LAST_ITEMS)
    return {
        "user": user_of(history),
        "target": target,
        "start": start,
        "position": end,
        "history": list(preferences.requests.histories[name][start:end]),
        "steps": [{"since": s.since, "seen": s.seen, "text": text} for s, text in preferences.chain(history, position)],
        "read": preferences.of(history, position),
    }


def _stored_item(items: Any, item: str, folders: list[Path]) -> dict[str, str]:
    """Return title and image; the image's path is relative to the first of `folders` that holds it."""
    image, path = items.image(item), ""
    if image is not None:
        roots = (folder.resolve() for folder in folders)
        path = next((str(image.resolve().relative_to(r)) for r in roots if image.resolve().is_relative_to(r)), "")
    return {"title": items.title(item), "image": path}


# ---- what a report shows


class Shown(NamedTuple):
    """An item as the page shows it; `image` is a data URI or empty."""

    title: str
    image: str = ""


class Candidate(NamedTuple):
    """An item in a user's ranking of `of` items; `p` is P(Yes) where an MLLM was asked, None where it was not."""

    item: str
    score: float
    hit: bool
    rank: int
    of: int
    p: float | None


Order = dict[str, list[Candidate]]
"""For each user the candidates, best first: all of them or, where all items are ranked, the best and the target."""


class Piece(NamedTuple):
    """Words that are the ``same``, ``new`` or ``gone``; a list of these without the ``gone`` is the later text."""

    change: str
    text: str


@dataclass(frozen=True, slots=True)
class Block:
    """Some items of a history, and the preference after them, in pieces; None where no text has read them."""

    first: int
    last: int
    shown: Sequence[str]
    text: Sequence[Piece] | None
    unchanged: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """One user: why they are shown, their history after the `earlier` items, and the rankings of two models."""

    user: str
    why: str
    earlier: int
    blocks: Sequence[Block]
    mine: Sequence[Candidate]
    theirs: Sequence[Candidate]


@dataclass(frozen=True, slots=True)
class CaseStudies:
    """All cases of a page, with the items they name by raw id; `problem` says why there are none."""

    model: str
    beside: str
    seed: int
    cases: Sequence[Case] = ()
    items: Mapping[str, Shown] = field(default_factory=dict)
    drawn_from: int = 0
    images: str = "none"  # or "some", or "off"
    problem: str = ""

    def show(self, item: str) -> Shown:
        """Return an item's title, its id where none is known, and its picture."""
        return self.items.get(item, Shown(item))


def read_cases(board: Leaderboard, results: Path, *, embed_images: bool = True) -> CaseStudies | None:
    """Return the cases of MLLMMSR itself, else of its best variant that stored some, or None if none did."""
    baselines = {row.model: row.runs[0] for row in board.ranked if row.kind == "baseline"}
    beside = BESIDE if BESIDE in baselines else board.best_baseline or ""
    rows = sorted((row for row in board.ranked if row.kind == "mllm"), key=lambda row: row.runs[0].label != MLLM)
    for model, run in ((row.model, run) for row in rows for run in row.runs):
        path = (results / str(run.per_user)).with_name(CASES)
        if not path.is_file():
            continue
        book = CaseStudies(model, beside, run.seed)
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            return _fill(book, stored, run, baselines.get(beside), results, embed_images)
        except Exception as error:  # whatever a damaged file leads to: it costs the case studies alone
            why = " ".join(f"{type(error).__name__}: {error}".split())
            problem = f"{path.name} of run {run.run_id} cannot be shown ({why}); run that model again with --force"
            return replace(book, problem=problem)
    return None


def _fill(
    book: CaseStudies, stored: Mapping[str, Any], run: RunRecord, other: RunRecord | None, results: Path, embed: bool
) -> CaseStudies:
    users, known = {case["user"]: case for case in stored["users"]}, stored["items"]
    mine, theirs = (read_order(each, results, list(users)) for each in (run, other))
    cases = [
        Case(user, why, users[user]["start"], _blocks(users[user]), mine[user], theirs.get(user, []))
        for user, why in choose(list(users), mine, theirs, book).items()
    ]
    used = [known[item]["image"] for case in cases
            for item in (*users[case.user]["history"], *(one.item for one in case.mine))]  # fmt: skip
    folders = [Path(str(value)) for key in ("data_path", "image_dir") if (value := run.config.get(key))]
    pictures = thumbnails(used, folders) if embed else {}
    path = (results / str(other.per_user)).with_name(TITLES) if other is not None else None
    titles = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else {}
    items = {item: Shown(title) for item, title in titles.items()}
    items |= {item: Shown(entry["title"] or item, pictures.get(entry["image"], "")) for item, entry in known.items()}
    images = "off" if not embed else "some" if pictures else "none"
    return replace(book, cases=cases, items=items, drawn_from=len(users), images=images)


def read_order(run: RunRecord | None, results: Path, users: Sequence[str]) -> Order:
    """Return how a run ranked the candidates of `users`: by the places it stored, else by score, then by item id."""
    if run is None or run.scores is None:
        return {}
    arrays = read_arrays(results / run.scores, PAIR_COLUMNS)
    arrays = {name: column[np.isin(arrays["user"], users)] for name, column in arrays.items()}
    owner, item, label, score = (arrays[name] for name in PAIR_COLUMNS)
    place, among = arrays.get("place", score), arrays.get("among")
    # places without a file's ``answer`` are those of a model whose score is its answer
    answer = arrays.get("answer", score if run.kind == "mllm" else np.full(len(score), np.nan))
    sizes = Counter(owner.astype(str).tolist())
    order: Order = {}
    for row in np.lexsort((item, -place, owner)):
        own = order.setdefault(str(owner[row]), [])
        of = sizes[str(owner[row])] if among is None else int(among[row])
        rank = len(own) + 1 if among is None else int(of - place[row])
        p = None if np.isnan(answer[row]) else float(1 / (1 + np.exp(-float(answer[row]))))
        if among is None or rank <= DEEPEST or label[row] > 0:
            own.append(Candidate(str(item[row]), float(score[row]), bool(label[row] > 0), rank, of, p))
    return order


def choose(names: Sequence[str], mine: Order, theirs: Order, book: CaseStudies) -> dict[str, str]:
    """Return the users to show and why each is: the first drawn, then the furthest apart of the rest, one each way."""
    chosen = dict.fromkeys(names[:SHOWN], "drawn by seed, whatever came of it")
    rest = [name for name in names[SHOWN:] if name in theirs]
    ours, other = (
        {name: next(one.rank for one in order[name] if one.hit) for name in rest} for order in (mine, theirs)
    )
    rule = f"chosen for disagreement: of {len(rest)} other users, the one where {{}} ranks the hit furthest above {{}}"
    for above, below, pair in ((ours, other, (book.model, book.beside)), (other, ours, (book.beside, book.model))):
        ahead = {name: below[name] - above[name] for name in rest}
        best = max(ahead, key=ahead.__getitem__, default=None)  # the first drawn of equals
        if best is not None and ahead[best] > 0:
            chosen[best] = rule.format(*pair)
    return chosen


def _blocks(case: Mapping[str, Any]) -> list[Block]:
    """Part the history where a text was written; a model without a chain has one block and what it read."""
    start, end, before = case["start"], case["position"], None
    steps = case["steps"] or [{"since": start, "seen": end, "text": case["read"]}]
    blocks = []
    for step in steps:
        text = [Piece("same", step["text"])] if before is None else word_changes(before, step["text"])
        items = case["history"][max(0, step["since"] - start) : max(0, step["seen"] - start)]
        blocks.append(Block(step["since"] + 1, step["seen"], items, text, before == step["text"]))
        before = step["text"]
    if (seen := steps[-1]["seen"]) < end:
        blocks.append(Block(seen + 1, end, case["history"][max(0, seen - start) :], None))
    return blocks


def word_changes(before: str, after: str) -> list[Piece]:
    """Return `after` in pieces, with what has gone from `before` where it stood."""
    old, new = before.split(), after.split()
    pieces: list[Piece] = []
    for tag, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        gone, come = " ".join(old[a:b]), " ".join(new[c:d])
        found = [Piece("same", come)] if tag == "equal" else [Piece("gone", gone), Piece("new", come)]
        pieces += [piece for piece in found if piece.text]
    return pieces


def thumbnails(images: Iterable[str], folders: Sequence[Path]) -> Mapping[str, str]:
    """Return a JPEG data URI for each of `images`, paths relative to one of `folders`, that can be had.

    An image is counted as often as it is given, as the page holds it that often. What cannot be read, lies outside the
    folders or does not fit the budget is left out.
    """
    uses = Counter(image for image in images if image)
    opened = {image: picture for image in uses if (picture := _open_small(image, folders)) is not None}
    for side, quality in TRIES:
        uris = {image: _encode(picture, side, quality) for image, picture in opened.items()}
        spent = np.cumsum([len(uri) * uses[image] for image, uri in uris.items()])
        if not opened or spent[-1] <= BUDGET:
            break
    return {image: uri for (image, uri), total in zip(uris.items(), spent, strict=True) if total <= BUDGET}


def _open_small(image: str, folders: Sequence[Path]) -> Image.Image | None:
    for path in (resolve(folder, image)[0] for folder in folders):
        if path is not None:
            with suppress(OSError):
                picture = open_image(path)
                picture.thumbnail((SIDE, SIDE))
                return picture
    return None


def _encode(picture: Image.Image, side: int, quality: int) -> str:
    smaller, data = picture.copy(), io.BytesIO()
    smaller.thumbnail((side, side))
    smaller.save(data, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
