"""Recurrent user summaries: a fold over blocks of a user's history, one step for all users at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from recbole_mllm.data.texts import Items, UserSummary
from recbole_mllm.prompts import Prompt, Style, item_line, preference_prompt
from recbole_mllm.settings import SummarySettings
from recbole_mllm.summaries.chains import State, before, history_digest, state_at, steps
from recbole_mllm.summaries.writing import Scribe


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

    No state's prompt holds an interaction at or after its `seen`; users advance together, a step a batch.
    """
    wanted = {user: steps(states, settings) for user, states in plan.states(settings).items()}
    texts: dict[tuple[str, State], str] = {}
    with scribe.progress(sum(len(level) for levels in wanted.values() for level in levels)):
        for depth in range(max((len(levels) for levels in wanted.values()), default=0)):
            due = [(u, state) for u, levels in wanted.items() if depth < len(levels) for state in levels[depth]]
            prompts = [
                _prompt(style, items, summaries, plan.histories[user], state, _previous(texts, user, state, settings))
                for user, state in due
            ]
            texts |= dict(zip(due, scribe.answer(prompts), strict=True))
    return texts


def _previous(texts: Mapping[tuple[str, State], str], user: str, state: State, settings: SummarySettings) -> str | None:
    earlier = before(state, settings) if settings.summary_mode == "recurrent" else None
    return texts[user, earlier] if earlier is not None else None


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
