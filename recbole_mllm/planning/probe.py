"""Measure this machine: the real models load, write some summaries, train a few batches and score a few items.

What is written and trained is thrown away: no store, no checkpoint, no export is touched.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from recbole_mllm.mllm.base import Answer, Ask, Batch, Decoding, Work, Writer
from recbole_mllm.mllm.batching import free_memory
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.planning.counts import Count
from recbole_mllm.planning.hours import Measured
from recbole_mllm.planning.models import Models
from recbole_mllm.planning.prepared import Prepared
from recbole_mllm.planning.readers import Reader
from recbole_mllm.planning.standins import Sample, StandIns, Texts
from recbole_mllm.planning.writers import sample
from recbole_mllm.prompts import Prompt
from recbole_mllm.summaries.items import summarize_items
from recbole_mllm.summaries.known import NothingKnown
from recbole_mllm.summaries.prepare import item_scribe, user_scribe
from recbole_mllm.summaries.store import Store
from recbole_mllm.summaries.users import preferences

_FIRST = 4  # prompts that say how many more there is time for; they also warm the model up
_SECONDS = 60.0  # a stage's probe should not take much longer
_FULL = 3  # times the batch of answers under way: enough for rows to leave and join it


@dataclass(slots=True)
class Probed:
    """What the probe found: texts by kind, times by stage, and what loading took."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    measured: dict[str, Measured] = field(default_factory=dict)
    load_s: float = 0.0
    image_s: float = 0.0


@dataclass(slots=True)
class Timed:
    """A `Writer` that lets the real model answer for a while, times it, and answers the rest with what it has said."""

    model: HFModel
    reader: Reader
    decoding: Decoding
    most: int
    identity: str = "probe"
    seconds: float = 0.0
    count: Count = field(default_factory=Count)
    samples: list[Sample] = field(default_factory=list)
    asked: int = 0

    def write(self, work: Work) -> None:
        """Answer the first prompts, some more as time allows, and pretend with the others."""
        if self.asked < self.most and (first := work.take(_FIRST)):
            before = time.perf_counter()
            self._real(first, work)
            each = (time.perf_counter() - before) / len(first)
            self.most = min(self.most, self.asked + max(_FIRST, int(_SECONDS / each)))
            self._more(work)
        made = StandIns(self.samples or [("", 1)], [], 0, 0)
        while asks := work.take(4096):
            given = [(ask.place, Answer(text, 0, new)) for ask in asks for text, new in [made.of(ask.prompt.marked)]]
            work.give(given)

    def _real(self, asks: Sequence[Ask], work: Work) -> None:
        batch = Batch([ask.prompt for ask in asks], asks[0].decoding)
        self.model.write(batch)
        self.asked += len(asks)
        for place, ask in enumerate(asks):
            if place in batch.answers:
                self.samples.append((batch.answers[place].text, batch.answers[place].new_tokens))
                work.give([(ask.place, batch.answers[place])])
            else:
                work.fail(ask.place, batch.failures.get(place, "no answer"))

    def _more(self, work: Work) -> None:
        """Answer what is timed, as a real run does: rows leave and join the batch."""
        part = _Part(work, self.most - self.asked)
        started = time.perf_counter()
        self.model.write(part)
        self.seconds += time.perf_counter() - started
        self.asked += part.taken
        for prompt, answer in part.answered:
            self.count.add(self.reader.written(prompt, answer.new_tokens, self.decoding.max_new_tokens))
            self.samples.append((answer.text, answer.new_tokens))

    def measured(self) -> Measured | None:
        """Return what was timed; None where there was nothing left to time."""
        if not self.count.flops:
            return None
        return Measured(self.seconds, self.count.flops, int(self.count.prompts), self.count.tokens)


class _Part:
    """The next prompts of a work, at most `most` of them."""

    def __init__(self, work: Work, most: int) -> None:
        self.work, self.most, self.taken = work, most, 0
        self.open: dict[int, Prompt] = {}
        self.answered: list[tuple[Prompt, Answer]] = []

    def take(self, count: int) -> list[Ask]:
        """Return up to `count` prompts, as long as there are any to be timed."""
        asks = self.work.take(min(count, self.most - self.taken))
        self.taken += len(asks)
        self.open |= {ask.place: ask.prompt for ask in asks}
        return asks

    def give(self, arrived: Sequence[tuple[int, Answer]]) -> None:
        """Note the answers, and hand them on."""
        self.answered += [(self.open.pop(place), answer) for place, answer in arrived]
        self.work.give(arrived)

    def fail(self, place: int, reason: str) -> None:
        """Hand the failure on."""
        self.open.pop(place)
        self.work.fail(place, reason)


def probe_summaries(p: Prepared, models: Models, probed: Probed, *, stages: Sequence[str]) -> None:
    """Let the summarisers that run here write some of the summaries of `stages` (``items``, ``users``)."""
    s, most = p.settings.summary, models.slots * _FULL
    texts: dict[str, str] = {}
    if "items" in stages and models.blueprint("items") is not None:
        scribe = item_scribe(p.stage, cast(Store, NothingKnown()))
        timed = _timed(p, models, "items", probed, most)
        scribe.write_alone(lambda: cast(Writer, timed))
        scribe.may_write = True
        chosen = sample(p.plan.items(s), most + _FIRST)
        texts = summarize_items(scribe, p.stage.style, p.stage.items, chosen, s.item_summary)
        _keep(probed, "items", "item", timed)
    if "users" in stages and models.blueprint("users") is not None:
        scribe = user_scribe(p.stage, cast(Store, NothingKnown()))
        timed = _timed(p, models, "users", probed, most)
        scribe.write_alone(lambda: cast(Writer, timed))
        scribe.may_write = True
        chosen = sample(list(p.plan.positions), models.slots + _FIRST)
        part = p.plan.reading(chosen)
        shown = Texts(texts, StandIns(probed.samples.get("item") or [("", 1)], [], 0, 0))
        preferences(scribe, p.stage.style, p.stage.items, shown, part, s)
        _keep(probed, "users", "user", timed)


def _timed(p: Prepared, models: Models, stage: str, probed: Probed, most: int) -> Timed:
    """Load the stage's model; only its own settings matter, so an equal one is loaded again for a clean memory."""
    started = time.perf_counter()
    model = HFModel(models.name(stage), p.settings.mllm, p.device, models.slots)
    probed.load_s += time.perf_counter() - started
    s = p.settings.summary
    length = s.item_summary_tokens if stage == "items" else s.user_summary_tokens
    return Timed(model, models.reader(stage), Decoding(length), most)


def _keep(probed: Probed, stage: str, kind: str, timed: Timed) -> None:
    probed.samples[kind] = timed.samples
    if (found := timed.measured()) is not None:
        probed.measured[stage] = found
    del timed.model
    free_memory()
