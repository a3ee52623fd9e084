"""Answer many prompts: what the store knows is read, the rest is written in batches and kept at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from recbole_mllm.data.atomic import clean
from recbole_mllm.errors import UserError
from recbole_mllm.mllm.base import Answer, Decoding, Streamer, Writer
from recbole_mllm.progress import Progress
from recbole_mllm.prompts import Prompt
from recbole_mllm.summaries.store import Store, answer_key


@dataclass(slots=True)
class Tally:
    """What a stage did."""

    asked: int = 0
    known: int = 0
    written: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    at_limit: int = 0
    empty: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Scribe:
    """Answers prompts with one model through the store. The model is loaded only when something must be written."""

    kind: str
    load: Callable[[], Writer | Streamer]
    identity: str
    store: Store
    decoding: Decoding
    batch_size: int
    may_write: bool = True
    tally: Tally = field(default_factory=Tally)
    _writer: Writer | Streamer | None = None
    _progress: Progress | None = None

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return the answers, each one line; equal prompts are answered once.

        Raises:
            UserError: `may_write` is false and an answer is missing.
        """
        keys = [answer_key(self.identity, prompt, self.decoding) for prompt in prompts]
        texts = self.store.get(keys)
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in texts}
        self.tally.asked += len(keys)
        self.tally.known += len(keys) - len(missing)
        if self._progress is not None:
            self._progress.update(len(keys) - len(missing))
        if missing and not self.may_write:
            raise UserError(
                f"{len(missing)} {self.kind} summaries are missing or stale and summarize is off; "
                "run `python run_recbole_mllm.py summarize` with the same settings, or set summarize: auto"
            )
        if missing:
            for written in self._written(missing):
                texts.update(written)
        return [texts[key] for key in keys]

    def _written(self, missing: dict[str, Prompt]) -> Iterator[dict[str, str]]:
        """Yield what is written, each part kept in the store before it is yielded."""
        # Batches of like length waste little on padding; the key settles ties, so a re-run cuts the same batches
        ordered = sorted(missing.items(), key=lambda pair: (len(pair[1].marked), pair[0]))
        if self._writer is None:
            self._writer = self.load()
        started = time.perf_counter()
        for batch in self._answered(self._writer, ordered):
            yield self._keep(batch, time.perf_counter() - started)
            started = time.perf_counter()

    def _answered(
        self, writer: Writer | Streamer, ordered: Sequence[tuple[str, Prompt]]
    ) -> Iterator[list[tuple[str, Answer]]]:
        """Yield answers with their keys: a batch at a time, or as a server's arrive."""
        if isinstance(writer, Streamer):
            for arrived in writer.stream([prompt for _, prompt in ordered], self.decoding):
                yield [(ordered[place][0], answer) for place, answer in arrived]
            return
        for start in range(0, len(ordered), self.batch_size):
            batch = ordered[start : start + self.batch_size]
            answers = writer.write([prompt for _, prompt in batch], self.decoding.max_new_tokens)
            yield [(key, answer) for (key, _), answer in zip(batch, answers, strict=True)]

    def _keep(self, batch: Sequence[tuple[str, Answer]], seconds: float) -> dict[str, str]:
        answers = [replace(answer, text=clean(answer.text)) for _, answer in batch]
        keys = [key for key, _ in batch]
        self.store.add(self.kind, self.identity, keys, answers, seconds)
        self._count(answers, seconds)
        return {key: answer.text for key, answer in zip(keys, answers, strict=True)}

    def _count(self, answers: Sequence[Answer], seconds: float) -> None:
        self.tally.written += len(answers)
        self.tally.seconds += seconds
        self.tally.prompt_tokens += sum(a.prompt_tokens for a in answers)
        self.tally.new_tokens += sum(a.new_tokens for a in answers)
        self.tally.at_limit += sum(a.truncated or a.new_tokens >= self.decoding.max_new_tokens for a in answers)
        self.tally.empty += sum(not a.text for a in answers)
        if self._progress is not None:
            self._progress.update(len(answers))

    def progress(self, total: int) -> Progress:
        """Return what shows how far `total` prompts are; this scribe moves it, known answers included."""
        self._progress = Progress(total, f"{self.kind} summaries", "summary")
        return self._progress

    def report(self) -> None:
        """Log what was done, in one line, and what people should look at, if anything."""
        log, t = logging.getLogger(), self.tally
        if not t.asked:
            return
        rate = t.written / t.seconds if t.seconds else 0.0
        log.info(
            f"{self.kind} summaries: {t.asked} asked, {t.known} known, {t.written} written "
            f"in {t.seconds:.1f} s ({rate:.1f}/s, {t.new_tokens} tokens)"
        )
        if t.at_limit or t.empty:
            log.warning(
                f"{self.kind} summaries: {t.at_limit} reached {self.decoding.max_new_tokens} tokens and may be cut "
                f"({self.kind}_summary_tokens raises it), {t.empty} are empty"
            )
