"""The preprocessing step: generate what summaries are missing, export them, and say which one a row reads."""

from __future__ import annotations

import time
from collections.abc import Mapping, Set
from contextlib import closing
from dataclasses import dataclass, replace

from recbole_mllm.common import distributed
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.prompts import Style, titles_as_preference
from recbole_mllm.common.settings import SummarySettings
from recbole_mllm.data import schema
from recbole_mllm.data.histories import user_of
from recbole_mllm.data.item_table import Items
from recbole_mllm.summaries.chains import State, before, history_digest, state_at
from recbole_mllm.summaries.generator import CachedGenerator, SummarySetup, item_generator, user_generator
from recbole_mllm.summaries.item_summaries import summarize_items
from recbole_mllm.summaries.store import Spent, Store, opened_store
from recbole_mllm.summaries.summary_files import Place, Summary, check_unedited, export
from recbole_mllm.summaries.user_summaries import SummaryRequests, as_rows, preferences


@dataclass(frozen=True, slots=True)
class Preferences:
    """What stands for the user in the recommender's question, for each row.

    `spent` is what generating the summaries took, whichever run did it; `load_s` what this one took to load their
    models.
    """

    texts: Mapping[tuple[str, State], str]
    requests: SummaryRequests
    items: Items
    style: Style
    settings: SummarySettings
    spent: Spent = Spent()
    load_s: float = 0.0

    def place(self, history: str, position: int) -> tuple[str, int]:
        """Return up to where of which history a row reads: its own, or what the control puts in its place.

        Raises:
            UserError: The control was drawn for other rows.
        """
        if self.requests.rows is None:
            return history, position
        try:
            return self.requests.rows[history, position]
        except KeyError:
            raise UserError(
                f"control: {self.settings.control} is drawn for the rows of the dataset, and position {position} of "
                f"user {user_of(history)} is none of them; set control: null"
            ) from None

    def of(self, history: str, position: int) -> str:
        """Return what a row at `position` of the `history` of this name reads: nothing at or after that position.

        Raises:
            UserError: There is no summary for that moment.
        """
        history, position = self.place(history, position)
        if self.settings.summary_mode == "none":
            before = self.requests.histories[history][max(0, position - self.settings.history_titles) : position]
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
        history, position = self.place(history, position)
        found: list[tuple[State, str]] = []
        state = state_at(position, self.settings)
        while state is not None:
            found.append((state, self.texts[history, state]))
            state = before(state, self.settings) if self.settings.summary_mode == "recurrent" else None
        return found[::-1]


def make_item_summaries(setup: SummarySetup, requests: SummaryRequests) -> None:
    """Generate the summaries of all items that some row of `requests` reads, and export them."""
    with closing(opened_store(setup.folder)) as store:
        export_item_summaries(setup, item_generator(setup, store), store, requests.items(setup.settings))


def generate(setup: SummarySetup, requests: SummaryRequests) -> Preferences:
    """Return what the rows of `requests` read: answers of the store, else generated and stored; nothing is exported."""
    s = setup.settings
    if s.summary_mode == "none":
        return Preferences({}, requests, setup.items, setup.style, s)
    with closing(opened_store(setup.folder)) as store:
        for kind, path in {"item": schema.isum_file, "user": schema.usum_file}.items():
            check_unedited(store, path(setup.folder, setup.tag), setup.tag, kind)
        describing = item_generator(setup, store)
        items = summarize_items(describing.answer_all, setup.style, setup.items, requests.items(s), s.item_summary)
        del describing  # and its model, before the next one is loaded
        texts = preferences(user_generator(setup, store), setup.style, setup.items, items, requests, s)
    return Preferences(texts, requests, setup.items, setup.style, s)


def refresh(
    setup: SummarySetup, requests: SummaryRequests, users: Set[str] | None = None
) -> tuple[Preferences, list[str]]:
    """Generate and export the summaries that the rows of `requests` read, those of `users` alone if given.

    Of other users what the store knows is exported: nothing is generated that it has, so a refresh costs what has
    changed. All processes of a run ask for the same; whoever comes first to a prompt generates it.

    Returns:
        What the rows read, and the users among the others whose rows still lack a summary.
    """
    s, started = setup.settings, time.time()
    if s.summary_mode == "none":
        return Preferences({}, requests, setup.items, setup.style, s), []
    with closing(opened_store(setup.folder)) as store:
        check_unedited(store, schema.usum_file(setup.folder, setup.tag), setup.tag, "user")  # before anything is paid
        describing = item_generator(setup, store)
        items = export_item_summaries(setup, describing, store, requests.items(s))
        item_keys, load_s = describing.keys, describing.tally.load_s
        del describing  # and its model, before the next one is loaded
        generator = user_generator(setup, store)
        given = generator, setup.style, setup.items, items
        texts = preferences(*given, requests if users is None else requests.of(users), s)
        others = requests.reading(()) if users is None else requests.of(users, others=True)
        texts |= preferences(*given, others, s, known_only=True)
        spent = store.spent(item_keys | generator.keys, started)
        texts |= preferences(*given, replace(requests, positions=requests.unread), s, known_only=True)
        _report(generator)
        if distributed.is_main():
            made = (_summary(place, *of, generator.key_of[of], requests, s) for place, of in as_rows(texts, requests))
            export(store, setup, "user", made, ((place, texts[of]) for place, of in as_rows(texts, requests)))
    lacking = (name for name, states in others.states(s).items() if any((name, state) not in texts for state in states))
    found = Preferences(texts, requests, setup.items, setup.style, s, spent, load_s + generator.tally.load_s)
    return found, list(dict.fromkeys(map(user_of, lacking)))


def export_item_summaries(
    setup: SummarySetup, generator: CachedGenerator, store: Store, wanted: list[str]
) -> dict[str, str]:
    """Have `generator` write the summaries of `wanted` items that are missing; export all of them, and return them."""
    exported = setup.settings.item_summary != "none"
    if exported:
        check_unedited(store, schema.isum_file(setup.folder, setup.tag), setup.tag, "item")
    with generator.progress(len(wanted)):
        found = summarize_items(generator.answer_all, setup.style, setup.items, wanted, setup.settings.item_summary)
    _report(generator)
    if exported and distributed.is_main():
        images = setup.items.images
        made = (
            Summary(Place(item), (str(images[item].absolute()),) if item in images else (), "", key)
            for item in wanted
            if (key := generator.key_of.get(item))
        )
        export(store, setup, "item", made, ((Place(item), text) for item, text in found.items()))
    return found


def _summary(
    place: Place, name: str, state: State, key: str, requests: SummaryRequests, settings: SummarySettings
) -> Summary:
    """Return what the store keeps of a row of ``X.<tag>.usum``."""
    history = requests.histories[name]
    continues = settings.summary_mode == "recurrent" and not state.is_first
    earlier = history_digest(history[state.start : state.since]) if continues else ""
    return Summary(place, tuple(history[state.since : state.seen]), earlier, key)


def _report(generator: CachedGenerator) -> None:
    """Log what `generator` did; all processes leave its model here, if they share one that is split."""
    generator.report()
    if generator.in_step:
        distributed.barrier()
        distributed.before_meeting(None)
