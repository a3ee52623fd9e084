"""Item and user summaries, counted: the walk of a real run, answered with stand-ins instead of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from recbole_mllm.data.peruser import user_of
from recbole_mllm.data.sampling import hash64
from recbole_mllm.mllm.base import Answer, Decoding, Work, Writer
from recbole_mllm.planning.counts import Count
from recbole_mllm.planning.prepared import Prepared
from recbole_mllm.planning.readers import Reader
from recbole_mllm.planning.standins import StandIns, Texts
from recbole_mllm.summaries.chains import State, steps
from recbole_mllm.summaries.items import summarize_items
from recbole_mllm.summaries.known import KnownTexts
from recbole_mllm.summaries.prepare import item_scribe, user_scribe
from recbole_mllm.summaries.store import Store
from recbole_mllm.summaries.users import preferences
from recbole_mllm.summaries.writing import Scribe

_AT_A_TIME = 4096


@dataclass(slots=True)
class Counter:
    """A `Writer` that counts what it is asked, and answers with stand-ins.

    `written` keeps the texts with their tokens, for what they will take on disk.
    """

    reader: Reader
    made: StandIns
    decoding: Decoding
    identity: str = "plan"
    count: Count = field(default_factory=Count)
    written: list[Answer] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)

    def write(self, work: Work) -> None:
        """Take everything and give something for each."""
        while asks := work.take(_AT_A_TIME):
            arrived = []
            for ask in asks:
                text, new = self.made.of(ask.prompt.marked, *(path.name for path in ask.prompt.images))
                answer = Answer(text, 0, new)
                if ask.decoding == self.decoding:  # another is asked for once more, as its stand-in repeats its prompt
                    cost = self.reader.written(ask.prompt, new, ask.decoding.max_new_tokens)
                    self.count.add(cost)
                    answer = Answer(text, int(cost.tokens), new)
                    self.written.append(answer)
                arrived.append((ask.place, answer))
            work.give(arrived)


@dataclass(frozen=True, slots=True)
class Written:
    """A counted stage, the texts later stages read, and the rows of its export as (name, text)."""

    count: Count
    texts: Texts
    answers: list[Answer]
    rows: float
    row_bytes: float
    longest_chain: int = 0
    sampled: bool = False


def count_items(p: Prepared, known: KnownTexts, reader: Reader, made: StandIns, limit: int) -> Written:
    """Count the item summaries that some user summary reads; above `limit` items, over a sample of them."""
    s = p.settings.summary
    wanted = p.plan.items(s) if s.summary_mode != "none" else []
    chosen = sample(wanted, limit)
    scribe, counter = _counting(item_scribe(p.stage, cast(Store, known)), reader, made)
    texts = summarize_items(scribe, p.stage.style, p.stage.items, chosen, s.item_summary)
    share = len(wanted) / max(1, len(chosen))
    count = _with_known(counter, scribe).times(share)
    size = sum(len(f"{item}\t{text}\n".encode()) for item, text in texts.items()) * share
    empty = StandIns([("", 0)], [], 0, 0)
    return Written(
        count,
        Texts(texts, empty if s.item_summary == "none" else made),
        counter.written,
        len(wanted) if s.item_summary != "none" else 0,
        size / max(1, len(wanted)),
        sampled=len(chosen) < len(wanted),
    )


def count_users(
    p: Prepared, known: KnownTexts, reader: Reader, made: StandIns, items: Mapping[str, str], limit: int
) -> Written:
    """Count the states that some row reads and those they build on; above `limit` of them, over a sample of users."""
    s = p.settings.summary
    if s.summary_mode == "none":
        return Written(Count(), Texts({}, made), [], 0, 0)
    chains = {name: steps(states, s) for name, states in p.plan.states(s).items()}
    sizes = {name: sum(map(len, levels)) for name, levels in chains.items()}
    total, chosen, sampled = sum(sizes.values()), list[str](), 0
    for name in shuffled(list(sizes)) if total > limit else sizes:
        if sampled > limit:
            break
        chosen.append(name)
        sampled += sizes[name]
    part = p.plan.reading(chosen)
    scribe, counter = _counting(user_scribe(p.stage, cast(Store, known)), reader, made)
    texts = preferences(scribe, p.stage.style, p.stage.items, items, part, s)
    size = sum(len(_row(user_of(name), state, text)) for (name, state), text in texts.items())
    return Written(
        _with_known(counter, scribe).times(total / max(1, sampled)),
        Texts(dict(texts), made),
        counter.written,
        total,
        size / max(1, len(texts)),
        max(map(len, chains.values()), default=0) if s.summary_mode == "recurrent" else 1,
        sampled < total,
    )


def _counting(scribe: Scribe, reader: Reader, made: StandIns) -> tuple[Scribe, Counter]:
    counter = Counter(reader, made, scribe.decoding)
    scribe.write_alone(lambda: cast(Writer, counter))
    scribe.may_write = True
    return scribe, counter


def _with_known(counter: Counter, scribe: Scribe) -> Count:
    counter.count.known = scribe.tally.known
    return counter.count


def sample(names: list[str], limit: int) -> list[str]:
    """Return `limit` of `names`, the same ones each time; all in their order where there are no more."""
    if len(names) <= limit:
        return names
    return shuffled(names)[:limit]


def shuffled(names: list[str]) -> list[str]:
    """Return `names` in an order that depends on them alone."""
    return sorted(names, key=lambda name: hash64("plan", name))


def _row(user: str, state: State, text: str) -> bytes:
    digest = "0" * 16
    return f"{user}\t{state.seen}\t{digest}\t{text}\n".encode()
