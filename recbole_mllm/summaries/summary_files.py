"""``X.<tag>.isum`` and ``X.<tag>.usum``: which answer is whose summary, and what a person writes in its place.

Keys of answers are digests. Beside them the store keeps, for each tag, whose summary an answer is, what it has read and
the digest of the file that was exported: so a summary is found by item or user, and an edited file is noticed.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.files import digest, set_file_aside
from recbole_mllm.common.prompts import Prompt, Style, item_line, preference_prompt
from recbole_mllm.data import schema
from recbole_mllm.data.atomic import clean, read_columns, read_numbered, write_atomic
from recbole_mllm.data.item_table import Items, read_titles
from recbole_mllm.mllm.interface import Decoding
from recbole_mllm.summaries.generator import SummarySetup, decodings
from recbole_mllm.summaries.item_summaries import summarize_items
from recbole_mllm.summaries.store import Store, StoredAnswer, answer_key, shortened_key

USER_ORIGIN = "user"
_NAME = re.compile(r"\.(?P<tag>[^.]+)\.(?P<kind>[iu])sum(\.edited-\d+)?$")
_TYPES = {"item": schema.ISUM_TYPES, "user": schema.USUM_TYPES}
_FILE = {"item": schema.isum_file, "user": schema.usum_file}
_TABLES = (
    "CREATE TABLE IF NOT EXISTS tags (number INTEGER PRIMARY KEY, tag TEXT NOT NULL UNIQUE, about TEXT NOT NULL, "
    "item_file TEXT NOT NULL DEFAULT '', user_file TEXT NOT NULL DEFAULT '')",
    "CREATE TABLE IF NOT EXISTS summaries (tag INTEGER NOT NULL, kind TEXT NOT NULL, owner TEXT NOT NULL, "
    "seen INTEGER NOT NULL, history TEXT NOT NULL, earlier TEXT NOT NULL, read TEXT NOT NULL, key BLOB NOT NULL, "
    "PRIMARY KEY (tag, kind, owner, seen, history)) WITHOUT ROWID",
)
_RECORD = (
    "INSERT INTO summaries VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET earlier = excluded.earlier, "
    "read = excluded.read, key = excluded.key WHERE key != excluded.key OR read != excluded.read"
)
_TEXTS = "LEFT JOIN answers a ON a.key = lower(hex(s.key)) WHERE s.tag = ? AND s.kind = ?"


class Place(NamedTuple):
    """Whose summary: an item's (`seen` 0, no `history`), or a user's after `seen` interactions of that digest."""

    owner: str
    seen: int = 0
    history: str = ""

    def __str__(self) -> str:
        return f"user {self.owner}, position {self.seen}" if self.seen else f"item {self.owner}"


class Summary(NamedTuple):
    """An exported summary: the ids of the items (of an item: the path of the image) that its prompt shows, its key.

    `earlier` is the digest of what the state has read that it continues; empty where it is a chain's first.
    """

    place: Place
    read: tuple[str, ...]
    earlier: str
    key: str

    @property
    def continues(self) -> Place:
        """The state that this one continues."""
        return Place(self.place.owner, self.place.seen - len(self.read), self.earlier)


@dataclass(frozen=True, slots=True)
class Tag:
    """Everything that the texts of one tag were generated with."""

    number: int
    name: str
    about: Mapping[str, Any] = field(compare=False)

    @property
    def style(self) -> Style:
        """The wording."""
        return Style(**self.about["style"])

    def key(self, store: Store, kind: str, prompt: Prompt) -> str:
        """Return the key of the answer to a prompt, which `store` may have to the prompt as it was shortened."""
        key = answer_key(self.identity(kind), prompt, Decoding(**self.about[kind]["decoding"]))
        limit = self.about[kind].get("limit")
        return other if limit and store.get([other := shortened_key(key, limit)]) else key

    def identity(self, kind: str) -> str:
        """Return what names the model that writes the summaries of a `kind`."""
        return str(self.about[kind]["identity"])


class Current(NamedTuple):
    """A summary as the next run finds it: `text` is None where that run will generate it."""

    summary: Summary
    prompts: list[Prompt]
    key: str | None
    text: str | None


# Exporting


def export(
    store: Store, setup: SummarySetup, kind: str, summaries: Iterable[Summary], rows: Iterable[tuple[Place, str]]
) -> None:
    """Write the file of a `kind` of summaries, its texts in `rows`, and keep whose they are.

    Raises:
        UserError: The file that is there was edited.
    """
    path = _FILE[kind](setup.folder, setup.tag)
    check_unedited(store, path, setup.tag, kind, replaced=True)
    how = decodings(setup.settings, setup.summarizers)
    about = {
        "style": asdict(setup.style),
        "item_field": setup.item_field,
        "item_summary": setup.settings.item_summary,
        **{
            k: {"identity": one.identity, "decoding": asdict(how[k]), "limit": one.limit}
            for k, one in setup.summarizers.items()
        },
    }
    with _tables(store) as db:
        said = json.dumps(about)
        db.execute(
            "INSERT INTO tags (tag, about) VALUES (?, ?) ON CONFLICT (tag) DO UPDATE SET about = excluded.about",
            (setup.tag, said),
        )
        _record(db, _tags(db, setup.tag)[0], kind, summaries)
    count = _write(path, kind, rows)
    _note_file(store, setup.tag, kind, digest(path))
    logging.getLogger().info(f"{path}: {count} summaries")


def check_unedited(store: Store, path: Path, tag: str, kind: str, *, replaced: bool = False) -> None:
    """Refuse to continue where somebody has edited the file that the next export would replace.

    Where the store does not know whose the texts are (it is new, or of an earlier version), the file may be of another
    store: it is set aside once it is to be `replaced`.

    Raises:
        UserError: With the command that reads it.
    """
    try:
        edited = _edited(store, path, tag, kind)
    except UserError as error:
        raise UserError(f"{error}; or remove the file, and it is written again") from error
    if edited is None or not edited[0]:
        return
    rows, known = edited
    first = next(iter(rows))
    what = f"{path}:{rows[first][0]}: {len(rows)} texts are not the store's ({first})"
    if known:
        raise UserError(
            f"{what}, so the file was edited: `recbole-mllm store import {path}` takes them into the store; remove the "
            "file to have the store's instead"
        )
    if replaced:
        aside = set_file_aside(path, "edited")
        hint = f"`recbole-mllm store import {path.parent} {aside}` takes them in"
        logging.getLogger().warning(f"{what}; the file is now {aside.name}, and {hint}")


def _edited(store: Store, path: Path, tag: str, kind: str) -> tuple[dict[Place, tuple[int, str]], bool] | None:
    """Return the rows, line and text, that are not what the store has exported, and whether it knows whose they are.

    None where the file is absent or as it was exported.
    """
    if not path.is_file():
        return None
    with _tables(store) as db:
        found = db.execute(f"SELECT number, {kind}_file FROM tags WHERE tag = ?", (tag,)).fetchone()
        if found is not None and found[1] == digest(path):
            return None
        query = f"SELECT owner, seen, history, coalesce(text, '') FROM summaries s {_TEXTS}"
        known = {Place(*row[:3]): row[3] for row in db.execute(query, (found[0] if found else -1, kind))}
        texts = set() if known else {text for (text,) in db.execute("SELECT text FROM answers WHERE kind = ?", (kind,))}
    rows = dict(read_rows(path, kind))
    return {
        place: (line, text)
        for place, (line, text) in rows.items()
        if (text != known.get(place, "") if known else text and text not in texts)
    }, bool(known)


def read_rows(path: Path, kind: str) -> Iterator[tuple[Place, tuple[int, str]]]:
    """Yield the line and the text of each row of an exported file, by whose it is.

    Raises:
        UserError: The file is none of its kind; file and line are named.
    """
    if (columns := read_columns(path)) != (wanted := _TYPES[kind]):
        right = "  ".join(f"{name}:{form}" for name, form in wanted.items())
        raise UserError(f"{path}:1: the columns are {', '.join(columns)}; they must be {right}, as exported")
    met: dict[Place, int] = {}
    for line, row in read_numbered(path):
        try:
            seen = int(count := float(row[schema.SEEN])) if kind == "user" else 0
            if kind == "user" and seen != count:
                raise ValueError
        except (ValueError, OverflowError):  # OverflowError: inf
            said = row[schema.SEEN][:40]
            raise UserError(f"{path}:{line}: {schema.SEEN} is {said!r}; it must be a whole number") from None
        place = Place(row[schema.USER if kind == "user" else schema.ITEM], seen, row.get(schema.HISTORY, ""))
        if (first := met.setdefault(place, line)) != line:
            raise UserError(f"{path}:{line}: {place} is already in line {first}; keep one of the two")
        yield place, (line, clean(row[schema.SUMMARY]))


@contextmanager
def _tables(store: Store) -> Iterator[Any]:
    with store.transaction(write=True) as db:
        for statement in _TABLES:
            db.execute(statement)
        yield db


def _has_tables(db: Any) -> bool:
    return db.execute("SELECT 1 FROM sqlite_master WHERE name = 'tags'").fetchone() is not None


def _record(db: Any, tag: Tag, kind: str, summaries: Iterable[Summary]) -> None:
    rows = ((tag.number, kind, *s.place, s.earlier, "\t".join(s.read), bytes.fromhex(s.key)) for s in summaries)
    db.executemany(_RECORD, rows)


def _note_file(store: Store, tag: str, kind: str, content: str) -> None:
    with _tables(store) as db:
        db.execute(f"UPDATE tags SET {kind}_file = ? WHERE tag = ?", (content, tag))


def _tags(db: Any, name: str | None = None) -> list[Tag]:
    query = "SELECT number, tag, about FROM tags WHERE ? IN ('', tag) ORDER BY tag"
    return [Tag(number, tag, json.loads(about)) for number, tag, about in db.execute(query, (name or "",))]


# Looking up


def find(store: Store, kind: str, owner: str, tag: str | None = None) -> dict[Tag, list[Summary]]:
    """Return the summaries of an item or a user by tag, a user's oldest first.

    Raises:
        UserError: There is none.
    """
    with store.transaction() as db:
        tags = _tags(db) if _has_tables(db) else []
        found = {one: _summaries(db, one, kind, owner) for one in tags if tag in (None, one.name)}
    if tag is not None and not found:
        raise UserError(
            f"{store.path} has no summaries of tag {tag!r}; it has {', '.join(t.name for t in tags) or '-'}"
        )
    if not (found := {one: rows for one, rows in found.items() if rows}):
        raise UserError(
            f"{store.path} knows no summary of {kind} {owner!r}; `recbole-mllm summarize` writes it, and finds those "
            "that an earlier version has written"
        )
    return found


def _summaries(db: Any, tag: Tag, kind: str, owner: str | None = None) -> list[Summary]:
    query = "SELECT owner, seen, history, read, earlier, lower(hex(key)) FROM summaries WHERE tag = ? AND kind = ?"
    rows = db.execute(f"{query} AND ? IN ('', owner) ORDER BY owner, seen, history", (tag.number, kind, owner or ""))
    return [Summary(Place(*row[:3]), tuple(filter(None, row[3].split("\t"))), *row[4:]) for row in rows]


def current(
    store: Store, folder: Path, tag: Tag, summaries: Sequence[Summary], edits: Mapping[Place, str] | None = None
) -> list[Current]:
    """Return `summaries` (an item's, or all of a user, oldest first) as the next run finds them.

    Prompts are put together from what titles and earlier texts are today, as that run does it; `edits` take the place
    of what the store holds.
    """
    edits, items = edits or {}, {item for s in summaries if s.place.seen for item in s.read}
    items |= {s.place.owner for s in summaries if not s.place.seen}
    titles = read_titles(folder, tag.about["item_field"], items)
    out: list[Current] = []
    if not summaries[0].place.seen:
        for summary in summaries:
            prompts = _item_prompts(store, tag, summary, titles)
            text = edits.get(summary.place, store.get([summary.key]).get(summary.key))
            out.append(Current(summary, prompts, summary.key, text))
        return out
    with store.transaction() as db:
        query = f"SELECT owner, text FROM summaries s {_TEXTS} AND owner IN (SELECT value FROM json_each(?))"
        read = dict(db.execute(query, (tag.number, "item", json.dumps(sorted(items)))).fetchall())
    texts: dict[Place, str | None] = {}
    for summary in summaries:
        place, previous = summary.place, texts.get(summary.continues) if summary.earlier else None
        if (summary.earlier and previous is None) or any(read.get(item, "") is None for item in summary.read):
            out.append(Current(summary, [], None, None))
            texts[place] = None
            continue
        lines = [item_line(tag.style, titles.get(item, ""), read.get(item, "")) for item in summary.read]
        prompt = preference_prompt(tag.style, lines, previous)
        key = tag.key(store, "user", prompt)
        texts[place] = edits.get(place, store.get([key]).get(key))
        out.append(Current(summary, [prompt], key, texts[place]))
    return out


def _item_prompts(store: Store, tag: Tag, summary: Summary, titles: Mapping[str, str]) -> list[Prompt]:
    """Return the prompts that asked for an item's summary; none where its title, image or a text has changed since."""
    asked: dict[str, Prompt] = {}

    def answer(prompts: Mapping[str, Prompt]) -> dict[str, str]:
        keys = {name: tag.key(store, "item", prompt) for name, prompt in prompts.items()}
        asked.update(zip(keys.values(), prompts.values(), strict=True))
        known = store.get(keys.values())
        return {name: known.get(key, "") for name, key in keys.items()}

    item = summary.place.owner
    images = dict.fromkeys([item] if summary.read else [], Path(*summary.read))
    try:
        summarize_items(answer, tag.style, Items(titles, images), [item], tag.about["item_summary"])
    except OSError:  # the image is gone
        return []
    return list(asked.values()) if summary.key in asked else []


def names_by_key(db: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield whose summary an answer is, by key in order, as `store export` writes it."""
    query = (
        "SELECT lower(hex(key)), tags.tag, kind, owner, seen FROM summaries JOIN tags ON number = summaries.tag "
        "ORDER BY key, tags.tag, owner, seen"
    )
    for key, tag, kind, owner, seen in db.execute(query) if _has_tables(db) else ():
        yield key, {"tag": tag, kind: owner, **({"position": seen} if kind == "user" else {})}


# Editing


def set_text(
    store: Store, folder: Path, kind: str, owner: str, position: int | None, text: str, tag: str | None
) -> str:
    """Put `text` in the place of an item's summary, or of a user's at `position` (None: the latest).

    The exported file says so too. Returns what was done, in a line.

    Raises:
        UserError: There is no such summary, several tags have one, the text is empty, or the file was edited.
    """
    found = find(store, kind, owner, tag)
    if len(found) > 1:
        names = ", ".join(one.name for one in found)
        raise UserError(f"{kind} {owner!r} has summaries of several tags; add --tag, one of {names}")
    ((of, summaries),) = found.items()
    at = summaries[-1].place.seen if position is None or kind == "item" else position
    places = [s.place for s in summaries if s.place.seen == at]
    if not places:
        there = ", ".join(dict.fromkeys(str(s.place.seen) for s in summaries))
        raise UserError(f"user {owner!r} has no summary at position {at} of tag {of.name}; it has {there}")
    path = _FILE[kind](folder, of.name)
    if len(places) > 1:
        raise UserError(
            f"user {owner!r} has {len(places)} summaries at position {at}, of histories that begin elsewhere; write it "
            f"into its row of {path} and run `store import` with that file"
        )
    if not (text := clean(text)):
        raise UserError("--text is empty; give the summary that is to be read")
    checked = digest(path) if path.is_file() else ""
    check_unedited(store, path, of.name, kind)
    said = _apply(store, folder, of, kind, dict.fromkeys(places, text), USER_ORIGIN, checked)
    return f"{places[0]} of tag {of.name} is set; {said}"


def _write(path: Path, kind: str, rows: Iterable[tuple[Place, str]]) -> int:
    """Write ``X.<tag>.isum`` or ``X.<tag>.usum``; return how many rows."""
    names = len(_TYPES[kind]) - 1  # of a place: an item's is its id alone
    return write_atomic(path, _TYPES[kind], ((*map(str, place[:names]), text) for place, text in rows))


def _while_unchanged(path: Path, found: str, rows: Iterable[tuple[Place, str]]) -> Iterator[tuple[Place, str]]:
    """Yield `rows`, made of the file of that digest; refuse to end where somebody has edited it meanwhile."""
    yield from rows
    if digest(path) != found:
        raise UserError(
            f"{path} was edited at this very moment; the store has your text, `store import {path}` the rest"
        )


def is_summary_file(path: Path) -> bool:
    """Return whether a file is named as exported summaries are, also one that was set aside."""
    return _NAME.search(path.name) is not None


def import_file(store: Store, folder: Path, path: Path, origin: str | None) -> str:
    """Take the texts of an edited file into the store; return what was done, in a line.

    Raises:
        UserError: A row is of no known item or state; nothing is changed then.
    """
    found = _NAME.search(path.name)
    assert found is not None
    name, kind = found["tag"], "item" if found["kind"] == "i" else "user"
    with _tables(store) as db:
        tag = next(iter(_tags(db, name)), None)
        known = {s.place for s in _summaries(db, tag, kind)} if tag else set()
    if tag is None:
        raise UserError(
            f"{path}: the store does not know tag {name}; run `summarize` with the settings it was written with, "
            "and import it then"
        )
    read = digest(path)  # what is edited after it is noticed by the next run
    edited = _edited(store, path, name, kind)
    changed = edited[0] if edited else {}
    for place, (line, text) in changed.items():
        if place not in known:
            raise UserError(f"{path}:{line}: {place} has no summary of tag {name} in the store; remove the line")
        if not text:
            raise UserError(f"{path}:{line}: the summary of {place} is empty; write one, or put the old one back")
    edits = {place: text for place, (_, text) in changed.items()}
    own = path.resolve() == _FILE[kind](folder, name).resolve()
    said = _apply(store, folder, tag, kind, edits, origin or USER_ORIGIN, read if own else "", in_file=edits)
    return f"{path}: {len(edits)} summaries replaced; {said}"


def _apply(
    store: Store,
    folder: Path,
    tag: Tag,
    kind: str,
    edits: Mapping[Place, str],
    origin: str,
    checked: str,
    in_file: Collection[Place] = (),
) -> str:
    """Store `edits`, each under the key that the next run asks for; return what else reads them, in words.

    They are put into the exported file, but for those that are `in_file`, with all that share an answer with them.
    `checked` is the digest of that file when its other texts were the store's; empty where it is left alone.
    """
    texts: dict[str, tuple[Place, str]] = {}
    changed: list[Summary] = []
    for owner in dict.fromkeys(place.owner for place in edits):
        for one in current(store, folder, tag, find(store, kind, owner, tag.name)[tag], edits):
            place = one.summary.place
            if place not in edits:
                continue
            if one.key is None:
                raise UserError(f"{place} follows a summary that is not written yet; run `summarize` first")
            other, text = texts.setdefault(one.key, (place, edits[place]))
            if text != edits[place]:
                raise UserError(f"{other} and {place} have one prompt, so one answer; give both the same text")
            changed.append(one.summary._replace(key=one.key))
    now, model = time.time(), tag.identity(kind)
    rows = (StoredAnswer(key, text, kind, model, 0, 0, 0.0, now, origin) for key, (_, text) in texts.items())
    store.insert(rows, replace=True)
    with _tables(store) as db:
        _record(db, tag, kind, changed)
        keys = json.dumps([key.upper() for key in texts])
        columns, given = "tag, kind, owner, seen, history, lower(hex(key))", "SELECT value FROM json_each(?)"
        found = db.execute(f"SELECT {columns} FROM summaries WHERE hex(key) IN ({given})", (keys,)).fetchall()
        shared = len(found) - len(edits)
        same = {Place(*row[2:5]): texts[row[5]][1] for row in found if row[:2] == (tag.number, kind)}
        if checked:
            missing = {place: text for place, text in same.items() if place not in in_file}
            _update_file(db, _FILE[kind](folder, tag.name), tag, kind, missing, checked)
        again = _read_them(_summaries(db, tag, "user"), edits)
        own = {key for (key,) in db.execute("SELECT key FROM answers WHERE origin = ?", (USER_ORIGIN,))}
    said = [f"{len(again)} user summaries were written from what it replaces; `summarize` writes them again"]
    if lost := sum(summary.key in own for summary in again):
        said.append(f"{lost} of those were set by you: set them again afterwards")
    if shared > 0:
        said.append(f"{shared} more with the same prompt share the answer")
    return ", ".join(said)


def _update_file(db: Any, path: Path, tag: Tag, kind: str, texts: Mapping[Place, str], checked: str) -> None:
    """Put `texts` into the exported file, and keep its digest unless somebody has edited it since it was `checked`."""
    found = digest(path)
    rows = {place: text for place, (_, text) in read_rows(path, kind)}
    fresh = rows | {place: text for place, text in texts.items() if place in rows}
    if fresh != rows:
        _write(path, kind, _while_unchanged(path, found, fresh.items()))
    if found == checked:  # else the next run notices, as the store knows another file
        db.execute(f"UPDATE tags SET {kind}_file = ? WHERE tag = ?", (digest(path), tag.name))


def _read_them(states: Iterable[Summary], edits: Collection[Place]) -> list[Summary]:
    """Return the states, oldest first of each user, that have read an edited summary and are not edited themselves."""
    stale, out = set(edits), []
    for state in states:
        reads = (state.earlier and state.continues in stale) or any(Place(item) in edits for item in state.read)
        if reads and state.place not in edits:
            stale.add(state.place)
            out.append(state)
    return out
