"""Recurrent user summaries: a fold over blocks of each user's history, all users' chains side by side."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Hashable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from typing import cast

from recbole_mllm.common.prompts import Style, item_line, preference_prompt
from recbole_mllm.common.settings import SummarySettings
from recbole_mllm.data.histories import user_of
from recbole_mllm.data.item_table import Items
from recbole_mllm.summaries.chains import State, before, history_digest, state_at, steps
from recbole_mllm.summaries.generator import CachedGenerator, Request
from recbole_mllm.summaries.summary_files import Place


@dataclass(frozen=True, slots=True)
class SummaryRequests:
    """Whose summaries are needed: the ordered raw item ids of each history, and the positions that rows stand at in it.

    Histories go by name (`HistoryNames`), as a user may have several; a user's stand together in `positions`. Under a
    control `rows` says in whose place a row (history, position) reads; None: in its own. Rows at `unread` positions ask
    for nothing: what is known of theirs is exported with the others'.
    """

    histories: Mapping[str, Sequence[str]]
    positions: Mapping[str, Set[int]]
    rows: Mapping[tuple[str, int], tuple[str, int]] | None = None
    unread: Mapping[str, Set[int]] = field(default_factory=dict)

    def states(self, settings: SummarySettings) -> dict[str, set[State]]:
        """Return the states some row reads, by history."""
        return {
            name: {state for p in places if (state := state_at(p, settings)) is not None}
            for name, places in self.positions.items()
        }

    def items(self, settings: SummarySettings) -> list[str]:
        """Return the raw ids of all items some state has read, users in order, each history's items oldest first."""
        seen: dict[str, None] = {}
        for name, places in self.positions.items():
            history = self.histories[name]
            # the states of one chain read what its last does; where max_history moves the start, each is looked at
            for place in sorted(places) if settings.max_history is not None else [max(places)] if places else []:
                if (state := state_at(place, settings)) is not None:
                    seen.update(dict.fromkeys(history[state.start : state.seen]))
        return list(seen)

    def of(self, users: Container[str], *, others: bool = False) -> SummaryRequests:
        """Return the part that is about `users`, or about all `others`."""
        return self.reading(name for name in self.positions if (user_of(name) in users) is not others)

    def reading(self, names: Iterable[str]) -> SummaryRequests:
        """Return the part that is about the histories of these `names`."""
        return replace(self, positions={name: self.positions[name] for name in names})


def preferences(
    generator: CachedGenerator,
    style: Style,
    items: Items,
    summaries: Mapping[str, str],
    requests: SummaryRequests,
    settings: SummarySettings,
    *,
    known_only: bool = False,
) -> dict[tuple[str, State], str]:
    """Return the text of every state that some row of `requests` reads, and of those they build on, by history.

    No state's prompt holds an interaction at or after its `seen`. Each chain advances as soon as its last step has its
    text, whatever the others' do. With `known_only` nothing is generated: chains end where the store does.
    """
    chains = _Chains(style, items, summaries, requests, settings)
    with generator.progress(chains.total):
        generator.generate(chains, known_only=known_only)
    return chains.texts


class _Chains:
    """All users' chains: a state's prompt is ready once the state before it has its text."""

    def __init__(
        self,
        style: Style,
        items: Items,
        summaries: Mapping[str, str],
        requests: SummaryRequests,
        settings: SummarySettings,
    ) -> None:
        self.style, self.items, self.summaries = style, items, summaries
        self.histories, self.settings = requests.histories, settings
        self.lines: dict[str, str] = {}
        self.texts: dict[tuple[str, State], str] = {}
        self.waiting: deque[tuple[str, State]] = deque()
        self.after: dict[tuple[str, State], list[State]] = {}
        self.total = 0
        for name, states in requests.states(settings).items():
            for state in (state for level in steps(states, settings) for state in level):
                self.total += 1
                if (earlier := self._before(state)) is None:
                    self.waiting.append((name, state))
                else:
                    self.after.setdefault((name, earlier), []).append(state)

    def _before(self, state: State) -> State | None:
        return before(state, self.settings) if self.settings.summary_mode == "recurrent" else None

    def ready(self, count: int) -> list[Request]:
        """Return the next states' prompts."""
        return [self._request(*self.waiting.popleft()) for _ in range(min(count, len(self.waiting)))]

    def _request(self, name: str, state: State) -> Request:
        earlier = self._before(state)
        previous = self.texts[name, earlier] if earlier is not None else None
        block = self.histories[name][state.since : state.seen]
        prompt = preference_prompt(self.style, [self._line(item) for item in block], previous)
        return Request((name, state), prompt, previous or "")

    def _line(self, item: str) -> str:
        if item not in self.lines:
            self.lines[item] = item_line(self.style, self.items.title(item), self.summaries.get(item, ""))
        return self.lines[item]

    def receive(self, name: Hashable, text: str) -> None:
        """Keep a state's text, and let those that continue it be ready."""
        history, state = cast("tuple[str, State]", name)
        self.texts[history, state] = text
        self.waiting.extend((history, later) for later in self.after.pop((history, state), []))


def as_rows(
    texts: Mapping[tuple[str, State], str], requests: SummaryRequests
) -> Iterator[tuple[Place, tuple[str, State]]]:
    """Yield whose row of ``X.<tag>.usum`` each of `texts` is, by user and moment, and under which name it stands there.

    What several histories begin with stands once.
    """
    ordered = sorted((user_of(name), state, name) for name, state in texts)
    for user, keys in groupby(ordered, key=itemgetter(0)):
        histories: dict[str, Sequence[str]] = {}
        written: set[tuple[int, str]] = set()
        for _, state, name in keys:
            if name not in histories:
                histories[name] = requests.histories[name]
            read = state.seen, history_digest(histories[name][state.start : state.seen])
            if read not in written:
                written.add(read)
                yield Place(user, *read), (name, state)
