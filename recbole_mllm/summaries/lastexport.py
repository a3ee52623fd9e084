"""The last ``X.<tag>.usum``: for whom it still holds, and how it is brought up to date without its other rows."""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from recbole_mllm.data import schema
from recbole_mllm.data.atomic import read_values, write_atomic
from recbole_mllm.data.texts import UserSummary
from recbole_mllm.summaries.marks import Mark, Marker, read_marks, write_marks
from recbole_mllm.summaries.store import Store
from recbole_mllm.summaries.users import Earlier, Plan


@dataclass(frozen=True, slots=True)
class Survey:
    """What an export holds of a plan.

    `holds`: the users whose rows in it are right as far as they go; `due`: those whose rows it has not all, with the
    marks they will have. A user in both goes on from the rows there are.
    """

    holds: set[str]
    due: dict[str, Mark]

    def kept(self, written: Container[str]) -> set[str]:
        """Return the users whose rows stay as they are where those of `written` are made anew."""
        return {user for user in self.holds if user not in written}


class LastExport:
    """The export of one tag, as far as its marks say that this program wrote it and nobody changed it since."""

    def __init__(self, path: Path, tag: str, store: Store) -> None:
        self.path, self._tag, self._store = path, tag, store
        self._marks, self._stamp = read_marks(store, tag, path)

    def survey(self, plan: Plan, marker: Marker) -> Survey:
        """Hold each user's history and item texts against what the rows had read: a digest a user, no prompt."""
        found = Survey(set(), {})
        for user, names in plan.by_user():
            known, histories = self._marks.get(user), [plan.histories[name] for name in names]
            mark = marker.mark_of([(h, plan.positions[name]) for h, name in zip(histories, names, strict=True)])
            if known == mark:
                found.holds.add(user)
                continue
            found.due[user] = mark
            if known is None or len(histories) > 1:  # of several, the mark does not say which has changed
                continue
            if known.content == marker.content(histories[0][known.first : known.seen]):
                found.holds.add(user)
        return found

    def rows(self, holds: Container[str], users: Container[str]) -> Earlier:
        """Return what the export holds of `users`, as far as it is right."""
        if not self._marks or not users:
            return {}
        return by_user(line for line in self._lines() if line[0] in users and line[0] in holds)

    def replace(self, survey: Survey, written: Container[str], rows: Iterable[UserSummary]) -> int:
        """Write the export anew: `rows` (by user) of those `written`, and what it holds of the others that is right.

        Nothing is touched where nothing has changed.

        Returns:
            How many rows are of `written`.
        """
        keep = survey.kept(written)
        changed = {user: mark for user, mark in survey.due.items() if user in written}
        gone = [user for user in self._marks if user not in keep and user not in changed]
        if self._stamp is not None and not changed and not gone:
            return 0
        kept = (line for line in self._lines() if line[0] in keep)
        new = Counted(map(line_of, rows))
        write_atomic(self.path, schema.USUM_TYPES, heapq.merge(kept, new, key=itemgetter(0)))
        write_marks(self._store, self._tag, self.path, self._stamp, changed, gone)
        return new.count

    def _lines(self) -> Iterator[list[str]]:
        if self._stamp is not None:
            yield from (values for _, values in read_values(self.path))


def line_of(row: UserSummary) -> list[str]:
    """Return `row` as it stands in a ``.usum``."""
    return [row.user, str(row.seen), row.history, row.text]


def by_user(lines: Iterable[list[str]]) -> dict[str, dict[tuple[int, str], str]]:
    """Return lines of a ``.usum`` as `preferences` takes them."""
    out: dict[str, dict[tuple[int, str], str]] = {}
    for user, seen, history, text in lines:
        out.setdefault(user, {})[int(float(seen)), history] = text
    return out


class Counted:
    """Counts what passes through."""

    def __init__(self, rows: Iterable[list[str]]) -> None:
        self._rows, self.count = rows, 0

    def __iter__(self) -> Iterator[list[str]]:
        for row in self._rows:
            self.count += 1
            yield row
