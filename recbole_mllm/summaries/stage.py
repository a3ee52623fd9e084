"""What the summaries of a dataset are made from, and who writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from recbole_mllm.data.texts import Items
from recbole_mllm.mllm.base import Decoding, Writer
from recbole_mllm.prompts import Style
from recbole_mllm.settings import SummarySettings
from recbole_mllm.summaries.leases import Leases
from recbole_mllm.summaries.marks import Marker
from recbole_mllm.summaries.store import Store
from recbole_mllm.summaries.writing import Scribe


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


def claiming(scribe: Scribe) -> Scribe:
    """Return `scribe`, which from now on leaves alone what other processes at its store are writing."""
    scribe.leases = Leases(scribe.store)
    return scribe


def marker_of(stage: Stage, summaries: Mapping[str, str], scribe: Scribe) -> Marker:
    """Return what tells which users' rows hold, given the item summaries and who writes the users'."""
    return Marker(stage.style, stage.items, summaries, stage.settings, f"{scribe.identity}:{scribe.decoding}")


def _decoding(settings: SummarySettings, length: int) -> Decoding:
    return Decoding(length, settings.summary_temperature, settings.summary_top_p, settings.summary_seed)
