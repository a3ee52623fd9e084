"""The preprocessing hook: make what summaries are missing, export them, and answer which one a row reads."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Set
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from recbole_mllm import ranks
from recbole_mllm.data import schema
from recbole_mllm.data.peruser import user_of
from recbole_mllm.data.texts import Items, write_item_summaries
from recbole_mllm.errors import UserError
from recbole_mllm.prompts import Style, titles_as_preference
from recbole_mllm.settings import SummarySettings
from recbole_mllm.summaries.chains import State, before, state_at
from recbole_mllm.summaries.items import summarize_items
from recbole_mllm.summaries.lastexport import LastExport
from recbole_mllm.summaries.shards import opened_store
from recbole_mllm.summaries.sharing import take_parts, write_in_shares
from recbole_mllm.summaries.stage import Stage, Summarizers, claiming, item_scribe, marker_of, one_model, user_scribe
from recbole_mllm.summaries.store import Spent, Store
from recbole_mllm.summaries.users import Plan, as_rows, preferences

__all__ = [
    "Preferences",
    "Stage",
    "Summarizers",
    "item_scribe",
    "make_item_summaries",
    "make_preferences",
    "refresh",
    "user_scribe",
]


@dataclass(frozen=True, slots=True)
class Preferences:
    """What stands for the user in the recommender's question, for each row.

    `spent` is what writing the summaries took, whichever run did it; `load_s` what this one took to load their models.
    """

    texts: Mapping[tuple[str, State], str]
    plan: Plan
    items: Items
    style: Style
    settings: SummarySettings
    spent: Spent = Spent()
    load_s: float = 0.0

    def of(self, history: str, position: int) -> str:
        """Return what a row at `position` of the `history` of this name reads: nothing at or after that position.

        Raises:
            UserError: No summary was made for that moment.
        """
        if self.settings.summary_mode == "none":
            before = self.plan.histories[history][max(0, position - self.settings.history_titles) : position]
            return titles_as_preference(self.style, [title for item in before if (title := self.items.title(item))])
        state = state_at(position, self.settings)
        if state is None:
            return self.style.cold
        try:
            return self.texts[history, state]
        except KeyError:
            raise UserError(
                f"user {user_of(history)} has no summary of the first {state.seen} interactions; "
                "run `python run_recbole_mllm.py summarize` with the same settings"
            ) from None

    def chain(self, history: str, position: int) -> list[tuple[State, str]]:
        """Return the states that led to what a row at `position` of `history` reads, oldest first, with their texts."""
        if self.settings.summary_mode == "none":
            return []
        found: list[tuple[State, str]] = []
        state = state_at(position, self.settings)
        while state is not None:
            found.append((state, self.texts[history, state]))
            state = before(state, self.settings) if self.settings.summary_mode == "recurrent" else None
        return found[::-1]


def make_item_summaries(stage: Stage, plan: Plan) -> None:
    """Make the summaries of all items that some row of `plan` reads, and export them."""
    write_in_shares(stage, plan, None, only_items=True)

    def export() -> None:
        with closing(opened_store(stage.folder)) as store:
            export_item_summaries(stage, store, plan.items(stage.settings))

    ranks.on_main(export)


def make_preferences(stage: Stage, plan: Plan) -> Preferences:
    """Make every summary that some row of `plan` reads, item summaries first, and export both."""
    s = stage.settings
    if s.summary_mode == "none":
        return Preferences({}, plan, stage.items, stage.style, s)
    started = time.time()
    load_s = write_in_shares(stage, plan, None, only_items=False)
    found = ranks.main_first(lambda: _refreshed(stage, plan, None, read_all=True))
    load_s += found.load_s
    spent = ranks.main_first(lambda: _spent(stage, found, started))
    return Preferences(found.texts, plan, stage.items, stage.style, s, spent, load_s)


def _spent(stage: Stage, found: _Refreshed, started: float) -> Spent:
    """Return what writing the summaries that a run reads took; those written since `started` are its own."""
    who = stage.who
    with closing(opened_store(stage.folder)) as store:
        items = store.seconds("item", who.item_identity, found.items.values(), started)
        users = store.seconds("user", who.user_identity, found.texts.values(), started)
    return Spent(items.seconds + users.seconds, items.reused + users.reused)


def refresh(stage: Stage, plan: Plan, users: Set[str] | None = None) -> list[str]:
    """Write the summaries that `plan`'s rows read and the last export lacks, of `users` alone if given.

    Texts of other users are left on disk: a refresh costs what has changed.

    Returns:
        The users among the others whose rows still lack a summary; in the main process alone.
    """
    left: list[str] = []
    if stage.settings.summary_mode != "none":
        write_in_shares(stage, plan, users, only_items=False)
        ranks.on_main(lambda: left.extend(_refreshed(stage, plan, users, read_all=False).left))
    return left


@dataclass(frozen=True, slots=True)
class _Refreshed:
    texts: dict[tuple[str, State], str]
    left: list[str]
    items: dict[str, str]
    load_s: float


def _refreshed(stage: Stage, plan: Plan, users: Set[str] | None, *, read_all: bool) -> _Refreshed:
    """Bring the export up to date for `users` (None: all), and return the texts of those it took, or of all users."""
    s, log = stage.settings, logging.getLogger()
    with closing(opened_store(stage.folder)) as store:
        summaries, load_s = _exported(stage, store, plan.items(s))
        with one_model(partial(user_scribe, stage)) as make:
            scribe = claiming(make(store))
            last = LastExport(schema.usum_file(stage.folder, stage.tag), stage.tag, store)
            survey = last.survey(plan, marker_of(stage, summaries, scribe))
            due = {user for user in survey.due if users is None or user in users}
            wanted = plan if read_all else plan.of(due)
            earlier = {**last.rows(survey.holds, survey.holds if read_all else due), **take_parts(stage)}
            texts = preferences(scribe, stage.style, stage.items, summaries, wanted, s, earlier)
            scribe.report()
            load_s += scribe.tally.load_s
        new = {key: text for key, text in texts.items() if user_of(key[0]) in due}
        rows = last.replace(survey, due, as_rows(new, plan))
        log.info(f"{last.path}: {len(due)} users' {rows} summaries, {len(survey.kept(due))} others' kept")
    return _Refreshed(texts, [user for user in survey.due if user not in due], summaries, load_s)


def export_item_summaries(stage: Stage, store: Store, wanted: list[str]) -> dict[str, str]:
    """Make the summaries of `wanted` items that are missing, export all of them, and return them."""
    return _exported(stage, store, wanted)[0]


def _exported(stage: Stage, store: Store, wanted: list[str]) -> tuple[dict[str, str], float]:
    """Return what `export_item_summaries` does, and the seconds that loading their model took."""
    with one_model(partial(item_scribe, stage)) as make:
        scribe = claiming(make(store))
        with scribe.progress(len(wanted)):
            found = summarize_items(scribe, stage.style, stage.items, wanted, stage.settings.item_summary)
        scribe.report()
    if stage.settings.item_summary != "none" and ranks.is_main():
        path = schema.isum_file(stage.folder, stage.tag)
        rows = write_item_summaries(path, found)
        logging.getLogger().info(f"{path}: {rows} summaries")
    return found, scribe.tally.load_s
