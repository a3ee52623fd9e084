"""Recurrent user summaries: a fold over blocks of each user's history, all users' chains side by side."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Hashable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import cast

from recbole_mllm.data.peruser import user_of
from recbole_mllm.data.texts import Items, UserSummary
from recbole_mllm.prompts import Prompt, Style, item_line, preference_prompt
from recbole_mllm.settings import SummarySettings
from recbole_mllm.summaries.asking import Question
from recbole_mllm.summaries.chains import State, before, history_digest, state_at, steps
from recbole_mllm.summaries.writing import Scribe


@dataclass(frozen=True, slots=True)
class Plan:
    """Whose summaries are needed: the ordered raw item ids of each history, and the positions that rows stand at in it.

    Histories go by name (`HistoryNames`), as a user may have several; a user's stand together in `positions`.
    """

    histories: Mapping[str, Sequence[str]]
    positions: Mapping[str, Set[int]]

    def states(self, settings: SummarySettings) -> dict[str, set[State]]:
        """Return the states some row reads, by history."""
        return {
            name: {state for p in places if (state := state_at(p, settings)) is not None}
            for name, places in self.positions.items()
        }

    def by_user(self) -> Iterator[tuple[str, list[str]]]:
        """Yield each user with the names of the histories that rows read."""
        for user, names in groupby(self.positions, user_of):
            yield user, list(names)

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

    def of(self, users: Container[str]) -> Plan:
        """Return the part of the plan that is about `users`."""
        return self.reading(name for name in self.positions if user_of(name) in users)

    def reading(self, names: Iterable[str]) -> Plan:
        """Return the part of the plan that is about the histories of these `names`."""
        return Plan(self.histories, {name: self.positions[name] for name in names})


# The rows an export holds of each user: texts by how many interactions they have read, and the digest of those
Earlier = Mapping[str, Mapping[tuple[int, str], str]]


def preferences(
    scribe: Scribe,
    style: Style,
    items: Items,
    summaries: Mapping[str, str],
    plan: Plan,
    settings: SummarySettings,
    earlier: Earlier | None = None,
) -> dict[tuple[str, State], str]:
    """Return the text of every state that some row of `plan` reads, and of those they build on.

    No state's prompt holds an interaction at or after its `seen`. Each chain advances as soon as its last step is
    written, whatever the others' do. What `earlier` holds is not asked for, and chains go on from there.
    """
    chains = _Chains(style, items, summaries, plan, settings, earlier or {})
    scribe.read(len(chains.texts))
    with scribe.progress(chains.total):
        scribe.serve(chains)
    return chains.texts


def openings(
    style: Style, items: Items, summaries: Mapping[str, str], plan: Plan, settings: SummarySettings, earlier: Earlier
) -> Iterator[Prompt]:
    """Yield the prompts of `preferences` that wait for no other: users who began alike ask the same."""
    for name in plan.positions:
        chains = _Chains(style, items, summaries, plan.reading([name]), settings, earlier)
        for question in chains.ready(chains.total):
            yield question.prompt


class _Chains:
    """All users' chains: a state's prompt can be asked once the state before it has its text."""

    def __init__(
        self,
        style: Style,
        items: Items,
        summaries: Mapping[str, str],
        plan: Plan,
        settings: SummarySettings,
        earlier: Earlier,
    ) -> None:
        self.style, self.items, self.summaries, self.plan, self.settings = style, items, summaries, plan, settings
        self.lines: dict[str, str] = {}
        self.texts: dict[tuple[str, State], str] = {}
        self.waiting: deque[tuple[str, State]] = deque()
        self.after: dict[tuple[str, State], list[State]] = {}
        self.total = 0
        for name, states in plan.states(settings).items():
            rows = earlier.get(user_of(name), {})
            history = plan.histories[name] if rows else []
            for state in (state for level in steps(states, settings) for state in level):
                if rows and (text := rows.get(read_by(state, history))) is not None:
                    self.texts[name, state] = text
                else:
                    self._add(name, state)

    def _add(self, name: str, state: State) -> None:
        """Note that a state must be asked for: now, or once the one before it is there."""
        self.total += 1
        earlier = self._before(state)
        if earlier is None or (name, earlier) in self.texts:
            self.waiting.append((name, state))
        else:
            self.after.setdefault((name, earlier), []).append(state)

    def _before(self, state: State) -> State | None:
        return before(state, self.settings) if self.settings.summary_mode == "recurrent" else None

    def ready(self, count: int) -> list[Question]:
        """Return the next states' prompts."""
        return [self._question(*self.waiting.popleft()) for _ in range(min(count, len(self.waiting)))]

    def _question(self, name: str, state: State) -> Question:
        earlier = self._before(state)
        previous = self.texts[name, earlier] if earlier is not None else None
        block = self.plan.histories[name][state.since : state.seen]
        prompt = preference_prompt(self.style, [self._line(item) for item in block], previous)
        return Question((name, state), prompt, previous or "")

    def _line(self, item: str) -> str:
        if item not in self.lines:
            self.lines[item] = item_line(self.style, self.items.title(item), self.summaries.get(item, ""))
        return self.lines[item]

    def told(self, asked: Hashable, text: str) -> None:
        """Keep a state's text, and let those that continue it be asked."""
        name, state = cast("tuple[str, State]", asked)
        self.texts[name, state] = text
        self.waiting.extend((name, later) for later in self.after.pop((name, state), []))


def read_by(state: State, history: Sequence[str]) -> tuple[int, str]:
    """Return what names a state in ``X.<tag>.usum``: how much it has read, and the digest of that."""
    return state.seen, history_digest(history[state.start : state.seen])


def as_rows(texts: Mapping[tuple[str, State], str], plan: Plan) -> Iterator[UserSummary]:
    """Yield `texts` as rows of ``X.<tag>.usum``, by user and moment; what several histories begin with stands once."""
    ordered = sorted((user_of(name), state, name) for name, state in texts)
    for user, keys in groupby(ordered, key=itemgetter(0)):
        histories: dict[str, Sequence[str]] = {}
        written: set[tuple[int, str]] = set()
        for _, state, name in keys:
            if name not in histories:
                histories[name] = plan.histories[name]
            read = read_by(state, histories[name])
            if read not in written:
                written.add(read)
                yield UserSummary(user, *read, texts[name, state])
