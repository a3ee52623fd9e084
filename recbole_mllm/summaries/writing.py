"""Answer prompts through the store: what it knows is read, the rest is written and kept as it arrives.

Prompts come from an `Asker`, which may ask more once it has been told an answer: so no user waits for another's chain.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

from recbole_mllm import ranks
from recbole_mllm.data.atomic import clean
from recbole_mllm.errors import UserError
from recbole_mllm.mllm.base import Answer, Ask, Decoding, Writer
from recbole_mllm.progress import Progress
from recbole_mllm.prompts import Prompt
from recbole_mllm.summaries.asking import Asker, Listed, Question
from recbole_mllm.summaries.leases import Leases
from recbole_mllm.summaries.quality import Findings, cut_at_sentence, repeats_prompt, table
from recbole_mllm.summaries.store import Store, answer_key

_AT_A_TIME = 4096  # prompts made and looked up at once
_KEEP_COUNT, _KEEP_S = 32, 1.0  # answers, or seconds, after which what arrived is committed
_CLAIMED = 32  # prompts claimed at once, so that other processes at the same store leave them alone
_HELD_S = 0.5  # seconds between two looks at what other processes have claimed
_AGAIN = Decoding(0, 0.6, 0.9)  # how an answer that repeats its prompt is tried once more


@dataclass(slots=True)
class Tally:
    """What a stage did."""

    asked: int = 0
    known: int = 0
    written: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    load_s: float = 0.0
    words: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Open:
    """A prompt on its way to the model, and who waits for its answer."""

    key: str
    question: Question
    names: list[Hashable]
    again: bool = False


@dataclass(slots=True)
class Scribe:
    """Answers questions with one model through the store. The model is loaded only when something must be written.

    With a model that is split among the processes of a run they all serve `in_step`: each as often as the others, and
    all load it if one must write. With `leases`, what another process is writing is waited for, behind everything
    else. `whose` follows the name of what is written wherever it is told, as each of several processes tells of its
    own share.
    """

    kind: str
    load: Callable[[], Writer]
    identity: str
    store: Store
    decoding: Decoding
    may_write: bool = True
    in_step: bool = False
    leases: Leases | None = None
    whose: str = ""
    tally: Tally = field(default_factory=Tally)
    findings: Findings = field(default_factory=Findings)
    _asker: Asker | None = None
    _open: dict[str, _Open] = field(default_factory=dict)
    _waiting: list[_Open] = field(default_factory=list)
    _claimed: list[_Open] = field(default_factory=list)
    _held: list[_Open] = field(default_factory=list)
    _held_at: float = 0.0
    _under_way: dict[int, _Open] = field(default_factory=dict)
    _unkept: list[tuple[str, Answer]] = field(default_factory=list)
    _failed: list[str] = field(default_factory=list)
    _place: int = 0
    _started: float = 0.0
    _kept_at: float = 0.0
    _progress: Progress | None = None

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return the answers, each one line; equal prompts are answered once."""
        asker = Listed(enumerate(prompts))
        self.serve(asker)
        return [asker.texts[place] for place in range(len(prompts))]

    def serve(self, asker: Asker) -> None:
        """Answer all that `asker` asks.

        Raises:
            UserError: `may_write` is false and an answer is missing; or, with all others answered and kept, some could
                not be: an image is gone, or a prompt is too large for this machine.
        """
        self._asker = asker
        self._look_up(1 if self.may_write else sys.maxsize)
        must = bool(self._waiting)
        if must and not self.may_write:
            raise UserError(
                f"{len(self._waiting)} {self.kind} summaries are missing or stale and summarize is off; "
                "run `python run_recbole_mllm.py summarize` with the same settings, or set summarize: auto"
            )
        if any(ranks.gather_objects(must)) if self.in_step else must:
            started = time.perf_counter()
            writer = self.load()
            self.tally.load_s += time.perf_counter() - started
            if must:
                self._write(writer)
        if self._failed:
            raise UserError(
                f"{len(self._failed)} {self.kind} summaries cannot be written, the first for this: {self._failed[0]}; "
                "all others are kept, and the same command goes on from there"
            )

    def _write(self, writer: Writer) -> None:
        self._kept_at = self._started = time.perf_counter()
        try:
            writer.write(self)
            if self._held:
                logging.getLogger().info(f"{len(self._held)} {self.kind} summaries: waiting for another process")
            while self._held:
                self._keep()  # or those who hold them may wait for ours
                time.sleep(_HELD_S)
                self._claim(1)
                if self._claimed:
                    writer.write(self)
        finally:
            self._keep()
            if self.leases is not None:
                self.leases.release_all()
            self.tally.seconds += time.perf_counter() - self._started

    def write_alone(self, load: Callable[[], Writer]) -> None:
        """Take the model of `load`, in this process by itself: no other one serves in step with it."""
        self.load, self.in_step = load, False

    def read(self, count: int) -> None:
        """Count answers that were read from the last export."""
        self.tally.asked += count
        self.tally.known += count

    def take(self, count: int) -> list[Ask]:
        """Return up to `count` prompts that the store cannot answer."""
        self._claim(count)
        out = []
        for job in self._claimed[:count]:
            self._place += 1
            self._under_way[self._place] = job
            own = self.decoding
            again = replace(_AGAIN, max_new_tokens=own.max_new_tokens, seed=own.seed + 1, rules=own.rules)
            out.append(Ask(self._place, job.question.prompt, again if job.again else self.decoding))
        del self._claimed[:count]
        return out

    def _claim(self, count: int) -> None:
        """Have up to `count` prompts ready that are ours to write; look now and then at those that others write."""
        while len(self._claimed) < count:
            self._look_up(count)
            if batch := self._waiting[: max(count, _CLAIMED)]:
                del self._waiting[: len(batch)]
                self._sort_out(batch)
            elif self._held and time.perf_counter() - self._held_at >= _HELD_S:
                batch, self._held = self._held, []
                self._held_at = time.perf_counter()
                self._sort_out(batch)
            else:
                return

    def _sort_out(self, jobs: Sequence[_Open]) -> None:
        if self.leases is None:
            self._claimed += jobs
            return
        mine, known = self.leases.claim([job.key for job in jobs])
        for job in jobs:
            if job.key in known:
                del self._open[job.key]
                self.tally.known += len(job.names)
                self._tell(job.names, known[job.key], job.question.prompt)
            else:
                (self._claimed if job.key in mine else self._held).append(job)

    def _look_up(self, count: int) -> None:
        """Ask for questions until `count` wait for the model; what the store knows is told at once."""
        assert self._asker is not None
        while len(self._waiting) < count and (fresh := self._asker.ready(_AT_A_TIME)):
            keys = [self._key(question) for question in fresh]
            known = self.store.get([key for key in keys if key is not None]) | self._arrived(keys)
            batch: list[_Open] = []
            self.tally.asked += len(fresh)
            for key, question in zip(keys, fresh, strict=True):
                if key is None:
                    continue
                if key in known:
                    self.tally.known += 1
                    self._tell([question.name], known[key], question.prompt)
                elif key in self._open:
                    self._open[key].names.append(question.name)
                else:
                    self._open[key] = job = _Open(key, question, [question.name])
                    batch.append(job)
            # Prompts of like length waste little on padding; the key settles ties, so a re-run takes the same order
            self._waiting += sorted(batch, key=lambda job: (len(job.question.prompt.marked), job.key))

    def _key(self, question: Question) -> str | None:
        try:
            return answer_key(self.identity, question.prompt, self.decoding)
        except OSError as error:
            self._failed.append(f"an image cannot be read any more: {error}")
            return None

    def _arrived(self, keys: Sequence[str | None]) -> dict[str, str]:
        wanted = set(keys)
        return {key: answer.text for key, answer in self._unkept if key in wanted}

    def give(self, arrived: Sequence[tuple[int, Answer]]) -> None:
        """Take answers: kept soon, told at once; one that repeats its prompt is asked for once more."""
        for place, answer in arrived:
            job = self._under_way.pop(place)
            answer = replace(answer, text=clean(cut_at_sentence(answer)))
            self._count(answer)
            if repeats_prompt(answer.text, job.question.prompt, job.question.previous):
                if not job.again:
                    job.again = True
                    self._claimed.insert(0, job)
                    continue
                self.findings.note("repeats its prompt", answer.text)
            self.tally.written += 1
            self.findings.look_at_new(answer)
            self._unkept.append((job.key, answer))
            del self._open[job.key]
            self._tell(job.names, answer.text, job.question.prompt)
        if self._unkept and (len(self._unkept) >= _KEEP_COUNT or time.perf_counter() - self._kept_at > _KEEP_S):
            self._keep()
        elif self.leases is not None:
            self.leases.renew()

    def fail(self, place: int, reason: str) -> None:
        """Note that a prompt cannot be answered, and go on."""
        job = self._under_way.pop(place)
        del self._open[job.key]
        self._failed.append(reason)

    def _tell(self, names: Sequence[Hashable], text: str, prompt: Prompt) -> None:
        assert self._asker is not None
        self.findings.look(text, prompt)
        self.tally.words.append(len(text.split()))
        for name in names:
            self._asker.told(name, text)
        if self._progress is not None:
            self._progress.update(len(names), self._note())

    def _note(self) -> str:
        seconds = time.perf_counter() - self._started
        rate = f", {self.tally.new_tokens / seconds:.0f} tokens/s" if self._started and seconds > 0 else ""
        return f"{self.tally.known} known{rate}"

    def _keep(self) -> None:
        """Commit what arrived since the last time."""
        now = time.perf_counter()
        if self._unkept:
            keys, answers = [key for key, _ in self._unkept], [answer for _, answer in self._unkept]
            self.store.add(self.kind, self.identity, keys, answers, now - self._kept_at)
            if self.leases is not None:
                self.leases.release(keys)
            self._unkept = []
        self._kept_at = now

    def _count(self, answer: Answer) -> None:
        self.tally.prompt_tokens += answer.prompt_tokens
        self.tally.new_tokens += answer.new_tokens

    def progress(self, total: int) -> Progress:
        """Return what shows how far `total` prompts are; this scribe moves it, known answers included."""
        self._progress = Progress(total, f"{self.kind} summaries{self.whose}", "summary")
        return self._progress

    def report(self) -> None:
        """Log what was done, and a table of what people should look at, if anything."""
        log, t = logging.getLogger(), self.tally
        if not t.asked:
            return
        rate = f"{t.written / t.seconds:.1f}/s, {t.new_tokens / t.seconds:.0f} tokens/s" if t.seconds else "-"
        log.info(
            f"{self.kind} summaries{self.whose}: {t.asked} asked, {t.known} known, {t.written} written in "
            f"{t.seconds:.1f} s ({rate}); words: {_spread(t.words)}"
        )
        if lines := table(self.findings, self.kind, len(t.words)):
            log.warning("\n".join([f"{self.kind} summaries{self.whose} to look at:", *lines]))


def _spread(numbers: Sequence[int]) -> str:
    ordered = sorted(numbers)
    if not ordered:
        return "none"
    return f"{ordered[0]} to {ordered[-1]}, half of them up to {ordered[len(ordered) // 2]}"
