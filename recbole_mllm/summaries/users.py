"""Recurrent user summaries: a fold over blocks of each user's history, all users' chains side by side."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import cast

from recbole_mllm.data.texts import Items, UserSummary
from recbole_mllm.prompts import Prompt, Style, item_line, preference_prompt
from recbole_mllm.settings import SummarySettings
from recbole_mllm.summaries.chains import State, before, history_digest, state_at, steps
from recbole_mllm.summaries.writing import Question, Scribe


@dataclass(frozen=True, slots=True)
class Plan:
    """Whose summaries are needed: each user's ordered raw item ids, and the positions their rows stand at."""

    histories: Mapping[str, Sequence[str]]
    positions: Mapping[str, Set[int]]

    def states(self, settings: SummarySettings) -> dict[str, set[State]]:
        """Return the states some row reads, by user."""
        return {
            user: {state for p in places if (state := state_at(p, settings)) is not None}
            for user, places in self.positions.items()
        }

    def items(self, settings: SummarySettings) -> list[str]:
        """Return the raw ids of all items some state has read, in first-seen order."""
        seen: dict[str, None] = {}
        for user, states in self.states(settings).items():
            for state in states:
                seen.update(dict.fromkeys(self.histories[user][state.start : state.seen]))
        return list(seen)


def preferences(
    scribe: Scribe, style: Style, items: Items, summaries: Mapping[str, str], plan: Plan, settings: SummarySettings
) -> dict[tuple[str, State], str]:
    """Return the text of every state that some row of `plan` reads, and of those they build on.

    No state's prompt holds an interaction at or after its `seen`. Each chain advances as soon as its last step is
    written, whatever the others' do.
    """
    chains = _Chains(style, items, summaries, plan, settings)
    with scribe.progress(chains.total):
        scribe.serve(chains)
    return chains.texts


class _Chains:
    """All users' chains: a state's prompt can be asked once the state before it has its text."""

    def __init__(
        self, style: Style, items: Items, summaries: Mapping[str, str], plan: Plan, settings: SummarySettings
    ) -> None:
        self.style, self.items, self.summaries, self.plan, self.settings = style, items, summaries, plan, settings
        self.texts: dict[tuple[str, State], str] = {}
        self.waiting: deque[tuple[str, State]] = deque()
        self.after: dict[tuple[str, State], list[State]] = {}
        self.total = 0
        for user, states in plan.states(settings).items():
            for state in (state for level in steps(states, settings) for state in level):
                self.total += 1
                earlier = self._before(state)
                if earlier is None:
                    self.waiting.append((user, state))
                else:
                    self.after.setdefault((user, earlier), []).append(state)

    def _before(self, state: State) -> State | None:
        return before(state, self.settings) if self.settings.summary_mode == "recurrent" else None

    def ready(self, count: int) -> list[Question]:
        """Return the next states' prompts."""
        return [self._question(*self.waiting.popleft()) for _ in range(min(count, len(self.waiting)))]

    def _question(self, user: str, state: State) -> Question:
        earlier = self._before(state)
        previous = self.texts[user, earlier] if earlier is not None else None
        prompt = _prompt(self.style, self.items, self.summaries, self.plan.histories[user], state, previous)
        return Question((user, state), prompt, previous or "")

    def told(self, name: Hashable, text: str) -> None:
        """Keep a state's text, and let those that continue it be asked."""
        user, state = cast("tuple[str, State]", name)
        self.texts[user, state] = text
        self.waiting.extend((user, later) for later in self.after.pop((user, state), []))


def _prompt(
    style: Style, items: Items, summaries: Mapping[str, str], history: Sequence[str], state: State, previous: str | None
) -> Prompt:
    lines = [item_line(style, items.title(i), summaries.get(i, "")) for i in history[state.since : state.seen]]
    return preference_prompt(style, lines, previous)


def as_rows(texts: Mapping[tuple[str, State], str], plan: Plan) -> list[UserSummary]:
    """Return `texts` as rows of ``X.<tag>.usum``, by user and moment."""
    return [
        UserSummary(user, state.seen, history_digest(plan.histories[user][state.start : state.seen]), text)
        for (user, state), text in sorted(texts.items(), key=lambda pair: pair[0])
    ]
