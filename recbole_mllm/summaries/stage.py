"""What the summaries of a dataset are made from, and who writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from recbole_mllm.data.texts import Items
from recbole_mllm.errors import UserError
from recbole_mllm.mllm.base import Decoding, Writer
from recbole_mllm.prompts import Style
from recbole_mllm.settings import SummarySettings
from recbole_mllm.summaries.leases import Leases
from recbole_mllm.summaries.marks import Marker
from recbole_mllm.summaries.store import Store
from recbole_mllm.summaries.writing import Scribe


@dataclass(frozen=True, slots=True)
class Summarizers:
    """The two models that write; `load_*` are called only when something must be written.

    One that is split among the processes (`*_is_split`) is loaded by all of them together, whoever must write.
    """

    item_identity: str
    user_identity: str
    load_item: Callable[[], Writer]
    load_user: Callable[[], Writer]
    item_is_split: bool = False
    user_is_split: bool = False
    item_rules: str = ""  # what their generation_config asks of a text (see mllm.rules)
    user_rules: str = ""


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
    decoding = _decoding(s, s.item_summary_tokens, who.item_rules)
    may = s.summarize == "auto"
    return Scribe("item", who.load_item, who.item_identity, store, decoding, may, who.item_is_split)


def user_scribe(stage: Stage, store: Store) -> Scribe:
    """Return who answers for user summaries."""
    s, who = stage.settings, stage.who
    decoding = _decoding(s, s.user_summary_tokens, who.user_rules)
    may = s.summarize == "auto"
    return Scribe("user", who.load_user, who.user_identity, store, decoding, may, who.user_is_split)


MakeScribe = Callable[[Store], Scribe]


@contextmanager
def one_model(make: MakeScribe) -> Iterator[MakeScribe]:
    """Yield `make` such that all its scribes share one model: loaded when it is first needed, and gone afterwards."""
    loaded: list[Writer] = []

    def made(store: Store) -> Scribe:
        scribe = make(store)
        load = scribe.load

        def once() -> Writer:
            if not loaded:
                loaded.append(load())
            return loaded[0]

        scribe.load = once
        return scribe

    yield made
    loaded.clear()


def claiming(scribe: Scribe) -> Scribe:
    """Return `scribe`, which from now on leaves alone what other processes at its store are writing.

    It serves one process by itself. A model that is split has written everything before, or cannot.
    """
    scribe.leases = Leases(scribe.store)
    if scribe.in_step:
        scribe.write_alone(_refuse)
    return scribe


def _refuse() -> Writer:
    raise UserError("summaries that all processes had just written are gone from the store; start the command again")


def marker_of(stage: Stage, summaries: Mapping[str, str], scribe: Scribe) -> Marker:
    """Return what tells which users' rows hold, given the item summaries and who writes the users'."""
    return Marker(stage.style, stage.items, summaries, stage.settings, f"{scribe.identity}:{scribe.decoding}")


def _decoding(settings: SummarySettings, length: int, rules: str) -> Decoding:
    return Decoding(length, settings.summary_temperature, settings.summary_top_p, settings.summary_seed, rules)
