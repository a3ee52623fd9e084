"""The preprocessing hook: make what summaries are missing, export them, and answer which one a row reads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Mapping, Set
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from recbole_mllm.data import schema
from recbole_mllm.data.texts import Items, write_item_summaries
from recbole_mllm.errors import UserError
from recbole_mllm.mllm.base import Decoding, Writer
from recbole_mllm.prompts import Style, titles_as_preference
from recbole_mllm.settings import SummarySettings
from recbole_mllm.summaries.chains import State, before, state_at
from recbole_mllm.summaries.items import item_summaries
from recbole_mllm.summaries.lastexport import LastExport
from recbole_mllm.summaries.leases import Leases
from recbole_mllm.summaries.marks import Marker
from recbole_mllm.summaries.store import Store
from recbole_mllm.summaries.users import Plan, as_rows, preferences
from recbole_mllm.summaries.writing import Scribe


@dataclass(frozen=True, slots=True)
class Preferences:
    """What stands for the user in the recommender's question, for each row."""

    texts: Mapping[tuple[str, State], str]
    plan: Plan
    items: Items
    style: Style
    settings: SummarySettings

    def of(self, user: str, position: int) -> str:
        """Return what a row of `user` at `position` reads: nothing at or after that position.

        Raises:
            UserError: No summary was made for that moment.
        """
        if self.settings.summary_mode == "none":
            before = self.plan.histories[user][max(0, position - self.settings.history_titles) : position]
            return titles_as_preference(self.style, [title for item in before if (title := self.items.title(item))])
        state = state_at(position, self.settings)
        if state is None:
            return self.style.cold
        try:
            return self.texts[user, state]
        except KeyError:
            raise UserError(
                f"user {user} has no summary of the first {state.seen} interactions; "
                "run `python run_recbole_mllm.py summarize` with the same settings"
            ) from None

    def chain(self, user: str, position: int) -> list[tuple[State, str]]:
        """Return the states that led to what a row of `user` at `position` reads, oldest first, with their texts."""
        if self.settings.summary_mode == "none":
            return []
        found: list[tuple[State, str]] = []
        state = state_at(position, self.settings)
        while state is not None:
            found.append((state, self.texts[user, state]))
            state = before(state, self.settings) if self.settings.summary_mode == "recurrent" else None
        return found[::-1]


@dataclass(frozen=True, slots=True)
class Summarizers:
    """The two models that write; `load_*` are called only when something must be written."""

    item_identity: str
    user_identity: str
    load_item: Callable[[], Writer]
    load_user: Callable[[], Writer]


@dataclass(frozen=True, slots=True)
class Stage:
    """Everything the summaries of one dataset are made from."""

    folder: Path
    tag: str
    style: Style
    items: Items
    settings: SummarySettings
    who: Summarizers


def item_scribe(stage: Stage, store: Store) -> Scribe:
    """Return who answers for item summaries."""
    s, who = stage.settings, stage.who
    decoding = _decoding(s, s.item_summary_tokens)
    return Scribe("item", who.load_item, who.item_identity, store, decoding, s.summarize == "auto")


def user_scribe(stage: Stage, store: Store) -> Scribe:
    """Return who answers for user summaries."""
    s, who = stage.settings, stage.who
    decoding = _decoding(s, s.user_summary_tokens)
    return Scribe("user", who.load_user, who.user_identity, store, decoding, s.summarize == "auto")


def make_item_summaries(stage: Stage, store: Store, wanted: list[str]) -> dict[str, str]:
    """Return the summaries of `wanted` items, made where missing, and export them."""
    scribe = item_scribe(stage, store)
    scribe.leases = Leases(store)
    with scribe.progress(len(wanted)):
        found = item_summaries(scribe, stage.style, stage.items, wanted, stage.settings.item_summary)
    scribe.report()
    if stage.settings.item_summary != "none":
        path = schema.isum_file(stage.folder, stage.tag)
        _log_export(path, write_item_summaries(path, found))
    return found


def make_preferences(stage: Stage, plan: Plan) -> Preferences:
    """Make every summary that some row of `plan` reads, item summaries first, and export both."""
    s = stage.settings
    texts: dict[tuple[str, State], str] = {}
    if s.summary_mode != "none":
        with closing(Store(schema.store_file(stage.folder))) as store:
            texts = _refreshed(stage, store, plan, None, plan.positions).texts
    return Preferences(texts, plan, stage.items, stage.style, s)


def refresh(stage: Stage, plan: Plan, users: Set[str] | None = None) -> list[str]:
    """Write the summaries that `plan`'s rows read and the last export lacks, of `users` alone if given.

    Texts of other users are left on disk: a refresh costs what has changed.

    Returns:
        The users among the others whose rows still lack a summary.
    """
    if stage.settings.summary_mode == "none":
        return []
    with closing(Store(schema.store_file(stage.folder))) as store:
        return _refreshed(stage, store, plan, users, ()).left


@dataclass(frozen=True, slots=True)
class _Refreshed:
    texts: dict[tuple[str, State], str]
    left: list[str]


def _refreshed(stage: Stage, store: Store, plan: Plan, users: Set[str] | None, read: Container[str]) -> _Refreshed:
    """Bring the export up to date for `users` (None: all), and return the texts of those it took and of `read`."""
    s = stage.settings
    summaries = make_item_summaries(stage, store, plan.items(s))
    scribe = user_scribe(stage, store)
    scribe.leases = Leases(store)
    last = LastExport(schema.usum_file(stage.folder, stage.tag), stage.tag, store)
    marker = Marker(stage.style, stage.items, summaries, s, f"{scribe.identity}:{scribe.decoding}")
    survey = last.survey(plan, marker)
    due = {user for user in survey.due if users is None or user in users}
    wanted = plan.of({user for user in plan.positions if user in due or user in read})
    texts = preferences(
        scribe, stage.style, stage.items, summaries, wanted, s, last.rows(survey.holds, wanted.positions)
    )
    scribe.report()
    new = {key: text for key, text in texts.items() if key[0] in due}
    rows = last.replace(survey, due, as_rows(new, plan))
    logging.getLogger().info(f"{last.path}: {len(due)} users' {rows} summaries, {len(survey.kept(due))} others' kept")
    return _Refreshed(texts, [user for user in survey.due if user not in due])


def _decoding(settings: SummarySettings, length: int) -> Decoding:
    return Decoding(length, settings.summary_temperature, settings.summary_top_p, settings.summary_seed)


def _log_export(path: Path, rows: int) -> None:
    logging.getLogger().info(f"{path}: {rows} summaries")
