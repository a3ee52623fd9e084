"""What summarising would cost, before it is done: the same walk with a model that answers a few prompts and no more.

A model behind a server is asked nothing, as each of its answers may cost money: its prompts are counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from recbole_mllm.endpoints import is_server
from recbole_mllm.errors import UserError
from recbole_mllm.mllm.base import Answer, Ask, Batch, Work, Writer
from recbole_mllm.summaries.items import summarize_items
from recbole_mllm.summaries.known import KnownTexts
from recbole_mllm.summaries.prepare import Stage, item_scribe, user_scribe
from recbole_mllm.summaries.users import Plan, preferences
from recbole_mllm.summaries.writing import Scribe

_PROBED = 16  # prompts that are really answered
_AT_A_TIME = 4096


@dataclass(slots=True)
class Probe:
    """A `Writer` that answers the first few prompts with the real model, and all others with an answer like theirs.

    Without a model to `load` all are answered with a stand-in, of which only the number of prompts is told.
    """

    load: Callable[[], Writer] | None
    identity: str
    answers: list[Answer] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    seconds: float = 0.0
    prompts: int = 0
    more_characters: int = 0

    def write(self, work: Work) -> None:
        """Take everything; time the first few."""
        if self.load is None:
            self._count(work)
            return
        if asks := work.take(max(0, _PROBED - len(self.answers))):
            self._probe(asks, work)
        while asks := work.take(_AT_A_TIME):
            self.prompts += len(asks)
            self.more_characters += sum(len(ask.prompt.text) for ask in asks)
            work.give([(ask.place, self.answers[n % len(self.answers)]) for n, ask in enumerate(asks)])

    def _count(self, work: Work) -> None:
        while asks := work.take(_AT_A_TIME):
            work.give([(a.place, Answer(f"summary {self.prompts + n}", 0, 0)) for n, a in enumerate(asks)])
            self.prompts += len(asks)
            self.more_characters += sum(len(ask.prompt.text) for ask in asks)

    def _probe(self, asks: Sequence[Ask], work: Work) -> None:
        assert self.load is not None
        model = self.load()
        batch = Batch([ask.prompt for ask in asks], asks[0].decoding)
        started = time.perf_counter()
        model.write(batch)
        self.seconds += time.perf_counter() - started
        self.prompts += len(asks)
        for place, ask in enumerate(asks):
            if place in batch.answers:
                self.answers.append(batch.answers[place])
                self.characters.append(len(ask.prompt.text))
                work.give([(ask.place, batch.answers[place])])
            else:
                work.fail(ask.place, batch.failures.get(place, "no answer"))
        if not self.answers:  # nothing to judge the others by
            reason = batch.failures.get(0, "no answer")
            raise UserError(f"{self.identity} answered none of the first {len(asks)} prompts ({reason})")

    def line(self, scribe: Scribe) -> str:
        """Return the counts and what they would take, for people."""
        head = f"{scribe.kind} summaries: {scribe.tally.asked:,} prompts, {scribe.tally.known:,} known"
        if not self.prompts:
            return f"{head}, nothing to write"
        if self.load is None:
            return (
                f"{head}, {self.prompts:,} to write, by {self.identity}: {self.more_characters:,} characters to read "
                "beside images and earlier answers; its tokens, price and time are not known, as a dry run sends "
                "nothing to a server"
            )
        probed = len(self.answers)
        share = self.prompts / probed
        # tokens grow with the prompts' characters, images included in the probe's own ratio
        text = (sum(self.characters) + self.more_characters) / sum(self.characters)
        read = sum(a.prompt_tokens for a in self.answers) * text
        new = sum(a.new_tokens for a in self.answers) * share
        return (
            f"{head}, {self.prompts:,} to write: about {read:,.0f} tokens to read and {new:,.0f} to write, "
            f"about {_duration(self.seconds * share)} (probe: {probed} prompts in {self.seconds:.1f} s)"
        )


def estimate(stage: Stage, plan: Plan, which: str) -> list[str]:
    """Return, a line a stage, how many prompts ``items``, ``users`` or ``all`` would take, and how long; write nothing.

    What a killed run of several processes has left unmerged counts as written, and stays where it is. Users' later
    prompts hold answers that are not there yet; answers of the probe stand in for them.
    """
    s, lines = stage.settings, []
    with closing(KnownTexts(stage.folder)) as store:
        scribe = item_scribe(stage, store)  # type: ignore[arg-type]
        probe = _probe_for(scribe)
        texts = summarize_items(scribe, stage.style, stage.items, plan.items(s), s.item_summary)
        lines.append(probe.line(scribe))
        if which != "items" and s.summary_mode != "none":
            scribe = user_scribe(stage, store)  # type: ignore[arg-type]
            probe = _probe_for(scribe)
            preferences(scribe, stage.style, stage.items, texts, plan, s)
            lines.append(probe.line(scribe))
    return lines


def _probe_for(scribe: Scribe) -> Probe:
    """Return what answers for `scribe` from now on."""
    load = None if is_server(scribe.identity) else _refuse if scribe.in_step else scribe.load
    probe = Probe(load, scribe.identity)
    scribe.write_alone(lambda: probe)
    return probe


def _refuse() -> Writer:
    raise UserError(
        "--dry-run lets one process try the model, which does not work with one that is split among several; start it "
        "without FSDP and DeepSpeed, or see what `plan` counts"
    )


def _duration(seconds: float) -> str:
    for size, name in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} seconds"
