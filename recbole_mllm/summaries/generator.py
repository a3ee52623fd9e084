"""Answers prompts through the store: what it knows is read, the rest is generated and stored as it arrives.

Prompts come from a `RequestSource`, which may have more once it has received an answer: so no user waits for another's
chain.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from recbole_mllm.common import distributed
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.progress import Progress, warn_once
from recbole_mllm.common.prompts import Prompt, Style
from recbole_mllm.common.settings import SummarySettings
from recbole_mllm.data import schema
from recbole_mllm.data.atomic import clean
from recbole_mllm.data.item_table import Items
from recbole_mllm.mllm.interface import Answer, Ask, Decoding, Writer
from recbole_mllm.summaries.quality import Findings, cut_at_sentence, repeats_prompt, table
from recbole_mllm.summaries.store import Leases, ReadOnlyStore, Store, answer_key, shortened_key

Name = TypeVar("Name", bound=Hashable)
_AT_A_TIME = 4096  # prompts rendered and looked up at once
_STORE_COUNT, _STORE_S = 32, 1.0  # answers, or seconds, after which what arrived is committed
_CLAIMED = 32  # prompts claimed at once, so that other processes at the same store leave them alone
_HELD_S = 0.5  # seconds between two looks at what other processes have claimed
_RETRY = Decoding(0, 0.6, 0.9)  # how an answer that repeats its prompt is tried once more


class Request(NamedTuple):
    """A prompt with the name its source knows it by, and the preference it continues, if any."""

    name: Hashable
    prompt: Prompt
    previous: str = ""


class RequestSource(Protocol):
    """Has requests, some of them only when others have been answered."""

    def ready(self, count: int) -> list[Request]:
        """Return up to `count` requests that can be answered now, each once."""
        ...

    def receive(self, name: Hashable, text: str) -> None:
        """Take the answer to the request of this `name`."""
        ...


class FixedRequests:
    """Requests that are all known from the start."""

    def __init__(self, prompts: Iterable[tuple[Hashable, Prompt]]) -> None:
        self.waiting = [Request(name, prompt) for name, prompt in prompts]
        self.texts: dict[Hashable, str] = {}

    def ready(self, count: int) -> list[Request]:
        """Return the next ones."""
        out = self.waiting[:count]
        del self.waiting[:count]
        return out

    def receive(self, name: Hashable, text: str) -> None:
        """Keep the text."""
        self.texts[name] = text


@dataclass(slots=True)
class Tally:
    """What a generator did."""

    asked: int = 0
    known: int = 0
    written: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    load_s: float = 0.0
    texts: int = 0


@dataclass(slots=True)
class _Job:
    """A prompt on its way to the model, and the requests that wait for its answer."""

    key: str
    request: Request
    names: list[Hashable]
    retried: bool = False


@dataclass(slots=True)
class CachedGenerator:
    """Answers requests with one model through a store. The model is loaded only when something must be generated.

    Attributes:
        kind: ``item`` or ``user``.
        load: Loads the model.
        identity: Names everything about the model that changes an answer.
        store: What is known, and where answers go.
        decoding: How answers are decoded.
        former: What `identity` was before the model's commit was known: its answers are taken over.
        may_write: Whether the model may be loaded at all.
        in_step: The model is split among the processes of a run: they all must call `generate`, each as often as the
            others, and all load it if one must.
        limit: Tokens beyond which the texts of the model's prompts are shortened: such answers are of this limit alone,
            and have a key of their own (`store.shortened_key`).
        leases: With them, what another process is generating is waited for, behind everything else. So processes that
            ask for the same share the work.
        keys: The store's keys of all answers so far.
        key_of: The key of the last answer to each name.
    """

    kind: str
    load: Callable[[], Writer]
    identity: str
    store: Store
    decoding: Decoding
    former: str | None = None
    may_write: bool = True
    in_step: bool = False
    limit: int | None = None
    leases: Leases | None = None
    tally: Tally = field(default_factory=Tally)
    findings: Findings = field(default_factory=Findings)
    keys: set[str] = field(default_factory=set)
    key_of: dict[Hashable, str] = field(default_factory=dict)
    _source: RequestSource = field(default_factory=lambda: FixedRequests([]))
    _jobs: dict[str, _Job] = field(default_factory=dict)  # all that have no answer yet, by key: in one of the next four
    _waiting: list[_Job] = field(default_factory=list)
    _claimed: list[_Job] = field(default_factory=list)
    _held: list[_Job] = field(default_factory=list)  # by other processes
    _under_way: dict[int, _Job] = field(default_factory=dict)  # at the model
    _unstored: list[tuple[str, str, Answer]] = field(default_factory=list)  # a prompt's key, the answer's, and it
    _failed: list[str] = field(default_factory=list)
    _place: int = 0
    _held_at: float = 0.0
    _started: float = 0.0
    _stored_at: float = 0.0
    _progress: Progress | None = None

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return the answers, each one line; equal prompts are answered once."""
        found = self.answer_all(dict(enumerate(prompts)))
        return [found[place] for place in range(len(prompts))]

    def answer_all(self, prompts: Mapping[Name, Prompt]) -> dict[Name, str]:
        """Return the answers by the names of their prompts."""
        source = FixedRequests(prompts.items())
        self.generate(source)
        return {name: source.texts[name] for name in prompts}

    def generate(self, source: RequestSource, *, known_only: bool = False) -> None:
        """Answer all requests of `source`; with `known_only` those the store knows, without what continues others.

        Raises:
            UserError: `may_write` is false and an answer is missing; or, with all others answered and stored, some
                could not be: an image is gone, or a prompt is too large for this machine.
        """
        self._source = source
        self._look_up(1 if self.may_write and not known_only else sys.maxsize)
        if known_only:
            self._waiting.clear()
            self._jobs.clear()
            return
        must = bool(self._waiting)
        if must and not self.may_write:
            raise UserError(
                f"{len(self._waiting)} {self.kind} summaries are missing or stale and summarize is off; "
                "run `python run_recbole_mllm.py summarize` with the same settings, or set summarize: auto"
            )
        if must and not distributed.is_one_machine():
            raise UserError(
                f"{len(self._waiting)} {self.kind} summaries are missing, and processes on several machines cannot "
                "write into one store; run `summarize` with the same settings on one machine first"
            )
        if any(distributed.gather_objects(must)) if self.in_step else must:
            started = time.perf_counter()
            writer = self.load()
            self.tally.load_s += time.perf_counter() - started
            self._write(writer)
        if self._failed:
            raise UserError(
                f"{len(self._failed)} {self.kind} summaries cannot be written, the first for this: {self._failed[0]}; "
                "all others are saved; the same command resumes"
            )

    def write_alone(self, load: Callable[[], Writer]) -> None:
        """Take the model of `load`, in this process by itself: no other one generates in step with it."""
        self.load, self.in_step = load, False

    def _write(self, writer: Writer) -> None:
        self._stored_at = self._started = time.perf_counter()
        try:
            writer.write(self)
            if self._held:
                logging.getLogger().info(f"{len(self._held)} {self.kind} summaries: waiting for another process")
            while self._must_wait():
                self._claim(1)
                if self._claimed:
                    writer.write(self)
        finally:
            self._store()
            if self.leases is not None:
                self.leases.release_all()
            self.tally.seconds += time.perf_counter() - self._started

    def _must_wait(self) -> bool:
        """Wait a while for what other processes are generating; return whether there is anything to wait for."""
        self._store()  # or those who hold it may wait for ours
        if self.in_step:  # they come here too, when they have written what they could
            self._held_at = 0.0
            return any(distributed.gather_objects(bool(self._held)))
        if self._held:
            time.sleep(_HELD_S)
        return bool(self._held)

    # What the model sees (`mllm.interface.Work`)

    def take(self, count: int) -> list[Ask]:
        """Return up to `count` prompts that the store cannot answer."""
        self._claim(count)
        out, own = [], self.decoding
        for job in self._claimed[:count]:
            self._place += 1
            self._under_way[self._place] = job
            retry = replace(_RETRY, max_new_tokens=own.max_new_tokens, seed=own.seed + 1, rules=own.rules)
            out.append(Ask(self._place, job.request.prompt, retry if job.retried else own))
        del self._claimed[:count]
        return out

    def give(self, arrived: Sequence[tuple[int, Answer]]) -> None:
        """Take answers: stored soon, handed on at once; one that repeats its prompt is retried once."""
        for place, answer in arrived:
            job = self._under_way.pop(place)
            answer = replace(answer, text=clean(cut_at_sentence(answer)))
            self.tally.prompt_tokens += answer.prompt_tokens
            self.tally.new_tokens += answer.new_tokens
            if repeats_prompt(answer.text, job.request.prompt, job.request.previous):
                if not job.retried:
                    job.retried = True
                    self._claimed.insert(0, job)
                    continue
                self.findings.note("repeats its prompt", answer.text)
            self.tally.written += 1
            self.findings.look_at_new(answer)
            key = shortened_key(job.key, self.limit) if answer.shortened and self.limit else job.key
            self._unstored.append((job.key, key, answer))
            del self._jobs[job.key]
            self._hand_on(job.names, key, answer.text)
        if self._unstored and (len(self._unstored) >= _STORE_COUNT or time.perf_counter() - self._stored_at > _STORE_S):
            self._store()
        elif self.leases is not None:
            self.leases.renew()

    def fail(self, place: int, reason: str) -> None:
        """Note that a prompt cannot be answered; the others are."""
        key = self._under_way.pop(place).key
        del self._jobs[key]
        self._failed.append(reason)
        if self.leases is not None:
            self.leases.release([key])

    # From a request to the model, and back

    def _claim(self, count: int) -> None:
        """Have up to `count` prompts ready that are ours to generate; look now and then at those others generate."""
        while len(self._claimed) < count:
            self._look_up(count)
            # of few prompts, each process of a run has its part under way
            share = -(-len(self._jobs) // distributed.world_size()) - len(self._under_way) - len(self._claimed)
            if batch := self._waiting[: max(0, min(share, max(count, _CLAIMED)))]:
                del self._waiting[: len(batch)]
            elif self._held and time.perf_counter() - self._held_at >= _HELD_S:
                batch, self._held = self._held, []
                self._held_at = time.perf_counter()
            else:
                return
            mine, known = {job.key for job in batch}, dict[str, tuple[str, str]]()
            if self.leases is not None:
                mine, whole = self.leases.claim([job.key for job in batch])
                shortened = self._known(mine) if self.limit else {}  # by another process, since this one looked
                self.leases.release(shortened)
                known = {key: (key, text) for key, text in whole.items()} | shortened
            for job in batch:
                if job.key in known:
                    del self._jobs[job.key]
                    self.tally.known += len(job.names)
                    self._hand_on(job.names, *known[job.key])
                else:
                    (self._claimed if job.key in mine else self._held).append(job)

    def _look_up(self, count: int) -> None:
        """Take requests until `count` wait for the model; what the store knows is handed on at once."""
        while len(self._waiting) < count and (fresh := self._source.ready(_AT_A_TIME)):
            keyed = [(key, request) for request in fresh if (key := self._key(request)) is not None]
            known = self._known([key for key, _ in keyed])
            known |= {key: (own, answer.text) for key, own, answer in self._unstored}
            known |= self._taken_over([(key, request) for key, request in keyed if key not in known])
            batch: list[_Job] = []
            self.tally.asked += len(fresh)
            for key, request in keyed:
                if key in known:
                    self.tally.known += 1
                    self._hand_on([request.name], *known[key])
                elif key in self._jobs:
                    self._jobs[key].names.append(request.name)
                else:
                    self._jobs[key] = job = _Job(key, request, [request.name])
                    batch.append(job)
            # Prompts of like length waste little on padding; the key settles ties, so a re-run takes the same order
            self._waiting += sorted(batch, key=lambda job: (len(job.request.prompt.marked), job.key))

    def _known(self, keys: Collection[str]) -> dict[str, tuple[str, str]]:
        """Return the key and the text of the answers in the store, by the prompts' `keys`; shortened ones first."""
        own = {key: key for key in keys}
        if limit := self.limit:
            own |= {shortened_key(key, limit): key for key in keys}
        found = self.store.get(own)
        return {key: (one, found[one]) for one, key in own.items() if one in found}

    def _taken_over(self, keyed: Sequence[tuple[str, Request]]) -> dict[str, tuple[str, str]]:
        """Return what is known under the `former` identity, by today's keys, which those answers have from now on."""
        if self.former is None or not keyed:
            return {}
        now = {answer_key(self.former, request.prompt, self.decoding): key for key, request in keyed}
        whole = {key: key for key in now.values()}  # the prompt's key by the answer's
        if limit := self.limit:
            whole |= {shortened_key(key, limit): key for key in now.values()}
            now |= {shortened_key(old, limit): shortened_key(key, limit) for old, key in now.items()}
        found = self.store.get(now)
        if found:
            warn_once(f"{self.kind} summaries stored as {self.former} are used as those of {self.identity}")
            self.store.rename({key: now[key] for key in found}, self.identity)
        texts = {now[old]: text for old, text in found.items()}
        return {key: (own, texts[own]) for own, key in whole.items() if own in texts}

    def _key(self, request: Request) -> str | None:
        try:
            key = answer_key(self.identity, request.prompt, self.decoding)
        except OSError as error:
            self._failed.append(f"an image cannot be read any more: {error}")
            return None
        return key

    def _hand_on(self, names: Sequence[Hashable], key: str, text: str) -> None:
        self.findings.look(text)
        self.tally.texts += 1
        self.keys.add(key)
        for name in names:
            self.key_of[name] = key
            self._source.receive(name, text)
        if self._progress is not None:
            seconds = time.perf_counter() - self._started
            rate = f", {self.tally.new_tokens / seconds:.0f} tokens/s" if self._started and seconds > 0 else ""
            self._progress.update(len(names), f"{self.tally.known} known{rate}")

    def _store(self) -> None:
        """Commit what arrived since the last time."""
        now = time.perf_counter()
        if self._unstored:
            asked, keys, answers = zip(*self._unstored, strict=True)
            self.store.add(self.kind, self.identity, keys, answers, now - self._stored_at)
            if self.leases is not None:
                self.leases.release(asked)
            self._unstored = []
        self._stored_at = now

    # What people see

    def progress(self, total: int) -> Progress:
        """Return what shows how many of `total` requests are answered, by the store or the model."""
        self._progress = Progress(total, f"{self.kind} summaries", "summary")
        return self._progress

    def report(self) -> None:
        """Log what was done, and a table of what people should look at, if anything."""
        log, t = logging.getLogger(), self.tally
        if not t.asked:
            return
        rate = f"{t.written / t.seconds:.1f}/s, {t.new_tokens / t.seconds:.0f} tokens/s" if t.seconds else "-"
        log.info(
            f"{self.kind} summaries: {t.asked} requested, {t.known} known, {t.written} written in "
            f"{t.seconds:.1f} s ({rate})"
        )
        if lines := table(self.findings, self.kind, t.texts):
            log.warning("\n".join([f"{self.kind} summaries to look at:", *lines]))


@dataclass(frozen=True, slots=True)
class Summarizer:
    """A model that generates summaries; `load` is called only when something must be generated.

    One that is split among the processes (`is_split`) is loaded by all of them together, whoever needs it.
    """

    identity: str
    load: Callable[[], Writer]
    is_split: bool = False
    rules: str = ""  # what its generation_config asks of a text (`mllm.generation.own_rules`)
    former: str | None = None  # what its identity was before its commit was known
    limit: int | None = None  # `max_text_tokens`, which a server does not follow


@dataclass(frozen=True, slots=True)
class SummarySetup:
    """Everything the summaries of one dataset are made from; `summarizers` by kind, ``item`` and ``user``."""

    folder: Path
    tag: str
    style: Style
    items: Items
    settings: SummarySettings
    summarizers: Mapping[str, Summarizer]
    item_field: str = schema.ITEM


def _generator(kind: str, setup: SummarySetup, store: Store) -> CachedGenerator:
    """Return what generates summaries of a `kind`; its model is loaded once, and goes with it."""
    of, may_write = setup.summarizers[kind], setup.settings.summarize == "auto"
    decoding = decodings(setup.settings, setup.summarizers)[kind]
    leases = None if isinstance(store, ReadOnlyStore) else Leases(store)  # nothing is claimed where nothing is written
    return CachedGenerator(
        kind, cache(of.load), of.identity, store, decoding, of.former, may_write, of.is_split, of.limit, leases
    )


item_generator, user_generator = partial(_generator, "item"), partial(_generator, "user")


def decodings(settings: SummarySettings, summarizers: Mapping[str, Summarizer]) -> dict[str, Decoding]:
    """Return how the answers of each kind are decoded."""
    sampling = settings.summary_temperature, settings.summary_top_p, settings.summary_seed
    tokens = {"item": settings.item_summary_tokens, "user": settings.user_summary_tokens}
    return {kind: Decoding(tokens[kind], *sampling, one.rules) for kind, one in summarizers.items()}
