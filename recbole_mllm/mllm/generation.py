"""Write many answers at once: rows leave the batch when they are done, and waiting prompts take their places.

Every row has its own length, position and random stream, so an answer does not depend on its neighbours. Rows are
right-aligned in the key-value cache, their tokens without a gap, which sliding windows count on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList

from recbole_mllm.data.sampling import hash64
from recbole_mllm.mllm.base import Answer, Ask, Decoding, Work
from recbole_mllm.mllm.batching import free_memory, out_of_memory
from recbole_mllm.mllm.encode import Encoded, Encoder
from recbole_mllm.mllm.forward import Body
from recbole_mllm.mllm.plain import drawn
from recbole_mllm.mllm.rules import processors

READ_TOKENS = 4096  # read in one pass; more would fill memory with activations, and short prompts with padding
_REFILL = 4  # new rows are read once this share of the slots (1/4) is free: each refill copies the cache


@dataclass(slots=True)
class _Row:
    """One answer in the making."""

    ask: Ask
    encoded: Encoded
    shortened: bool
    position: int  # of the next token
    rng: np.random.Generator | None
    rules: LogitsProcessorList | None
    seen: Tensor  # [1, T], the prompt's tokens and the new ones; kept where `rules` look at them
    new: list[int] = field(default_factory=list)
    done: bool = False
    given: bool = False


class Generation:
    """Answers the prompts of one `Work`, at most `slots` at a time.

    `first` has been taken from the work already. On out-of-memory the rows in flight start anew with half the slots; a
    prompt too large on its own fails alone.
    """

    def __init__(
        self, body: Body, encoder: Encoder, stop: frozenset[int], slots: int, first: Sequence[Ask] = ()
    ) -> None:
        self.body, self.encoder, self.stop, self.slots = body, encoder, stop, slots
        self.rows: list[_Row] = []
        self.cache: DynamicCache | None = None
        self.mask = torch.zeros(0, 0, dtype=torch.long)
        self.again: list[Ask] = list(first)

    def run(self, work: Work) -> None:
        """Take prompts from `work` and give their answers until none waits and none is under way."""
        with self.body.without_gradients():
            self._run(work)

    def _run(self, work: Work) -> None:
        while True:
            newcomers = self._newcomers(work)
            if not newcomers and not self.rows:
                break
            try:
                if newcomers:
                    self._admit(newcomers, work)
                else:
                    self._step()
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            else:
                self._hand_over(work)
                continue
            # not in the handler, where the error's traceback still holds the tensors of the failed call
            self._retreat(newcomers, work)

    def _newcomers(self, work: Work) -> list[Ask]:
        free = self.slots - len(self.rows)
        if self.rows and free * _REFILL < self.slots:
            return []
        out = self.again[:free]
        del self.again[:free]
        return out + (work.take(free - len(out)) if free > len(out) else [])

    def _admit(self, newcomers: Sequence[Ask], work: Work) -> None:
        """Read the new prompts, those of like length together, and let them join the batch."""
        rows = [row for ask in newcomers if (row := self._row(ask, work)) is not None]
        for part in _alike(sorted(rows, key=lambda row: len(row.encoded.ids))):
            self._read(part)

    def _read(self, rows: Sequence[_Row]) -> None:
        """Read prompts and write each one's first token."""
        cache = DynamicCache()
        lengths = torch.tensor([len(row.encoded.ids) for row in rows])
        states = self.body.hidden([row.encoded for row in rows], 0, lengths.tolist(), cache)
        ends = states[torch.arange(len(rows)), (lengths - 1).to(states.device)]
        mask = _right_align(cache, lengths)
        self._append(rows, self.body.logits(ends))
        self.cache = cache if self.cache is None else _joined(self.cache, cache)
        self.mask = _stacked(self.mask, mask)
        self.rows += rows

    def _row(self, ask: Ask, work: Work) -> _Row | None:
        before = self.encoder.truncated
        try:
            encoded = self.encoder(ask.prompt, room=ask.decoding.max_new_tokens)
        except OSError as error:  # an image that was there when the work was planned
            work.fail(ask.place, f"an image cannot be read any more: {error}")
            return None
        position = int(self.body.positions(encoded)[..., -1].max()) + 1
        how, seen = ask.decoding, torch.tensor([encoded.ids])
        rules = None
        if how.rules:
            seen = seen.to(self.body.logits_device)
            rules = processors(self.body.head_model, how.rules, seen, self.stop, how.max_new_tokens)
        return _Row(ask, encoded, self.encoder.truncated > before, position, stream(encoded, how), rules, seen)

    def _step(self) -> None:
        """Write one token of every row."""
        assert self.cache is not None
        self.mask = torch.cat([self.mask, torch.ones(len(self.rows), 1, dtype=torch.long)], 1)
        states = self.body.step(
            [row.new[-1] for row in self.rows], [row.position for row in self.rows], self.mask, self.cache
        )
        for row in self.rows:
            row.position += 1
        self._append(self.rows, self.body.logits(states))

    def _append(self, rows: Sequence[_Row], logits: Tensor) -> None:
        for i, row in enumerate(rows):
            if row.rules and not row.done:
                logits[i : i + 1] = row.rules(row.seen, logits[i : i + 1])
        best = logits.argmax(-1).tolist()
        for i, row in enumerate(rows):
            if row.done:
                continue
            token = best[i] if row.rng is None else drawn(logits[i], row.ask.decoding, row.rng)
            row.new.append(token)
            if row.rules:
                row.seen = torch.cat([row.seen, row.seen.new_tensor([[token]])], 1)
            row.done = token in self.stop or len(row.new) >= row.ask.decoding.max_new_tokens

    def _hand_over(self, work: Work) -> None:
        """Give finished answers away at once; their rows leave when that is worth a copy of the cache."""
        done = [row for row in self.rows if row.done and not row.given]
        if done:
            work.give([(row.ask.place, self._answer(row)) for row in done])
            for row in done:
                row.given = True
        gone = sum(row.done for row in self.rows)
        if gone and (gone * _REFILL >= self.slots or gone == len(self.rows)):
            self._compact()

    def _answer(self, row: _Row) -> Answer:
        return replace(answer_of(self.encoder.tokenizer, self.stop, row.encoded, row.new), shortened=row.shortened)

    def _compact(self) -> None:
        kept = [i for i, row in enumerate(self.rows) if not row.done]
        self.rows = [self.rows[i] for i in kept]
        if not kept:
            self.cache, self.mask = None, torch.zeros(0, 0, dtype=torch.long)
            return
        self.mask = self.mask[kept]
        first = int(self.mask.any(0).int().argmax())  # columns that only rows now gone had filled
        self.mask = self.mask[:, first:]
        assert self.cache is not None
        for layer in _layers(self.cache):
            index = torch.tensor(kept, device=layer.keys.device)
            layer.keys = layer.keys.index_select(0, index)[:, :, first:]
            layer.values = layer.values.index_select(0, index)[:, :, first:]

    def _retreat(self, newcomers: Sequence[Ask], work: Work) -> None:
        """Start what was under way anew, in a smaller batch."""
        under_way = {row.ask.place: row.ask for row in self.rows if not row.done}
        under_way |= {ask.place: ask for ask in newcomers}
        self.rows, self.cache, self.mask = [], None, torch.zeros(0, 0, dtype=torch.long)
        free_memory()
        if len(under_way) == 1:
            ((place, ask),) = under_way.items()
            begins = beginning(ask)
            work.fail(place, f"it does not fit into memory even alone (lower max_text_tokens); it begins {begins!r}")
            return
        self.slots = max(1, len(under_way) // 2)
        self.again = [*under_way.values(), *self.again]
        logging.getLogger().warning(f"out of memory; writing goes on with {self.slots} prompts at a time")


def answer_of(tokenizer: Any, stop: frozenset[int], prompt: Encoded, new: Sequence[int]) -> Answer:
    """Return the text of the `new` tokens behind `prompt`; one that ends them is no part of it."""
    ended = new[-1] in stop
    text = tokenizer.decode(list(new[:-1] if ended else new), skip_special_tokens=True)
    return Answer(text.strip(), len(prompt.ids), len(new), not ended)


def beginning(ask: Ask) -> str:
    """Return the first words of a prompt, to name it by."""
    return " ".join(ask.prompt.text.split())[:80]


def _alike(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """Cut `rows`, sorted by length, into batches of at most `READ_TOKENS` tokens, padding included."""
    batch: list[_Row] = []
    for row in rows:
        if batch and (len(batch) + 1) * len(row.encoded.ids) > READ_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def stream(encoded: Encoded, decoding: Decoding) -> np.random.Generator | None:
    """Return the row's own random stream: the same prompt samples the same, in any batch and after any interruption."""
    if not decoding.temperature:
        return None
    content = [*encoded.ids, *(image.key for image in encoded.images)]
    return np.random.default_rng(hash64("write", decoding.seed, *content))


def _layers(cache: DynamicCache) -> list[Any]:
    return [layer for layer in cache.layers if layer.is_initialized]


def _right_align(cache: DynamicCache, lengths: Tensor) -> Tensor:
    """Move each row's keys and values to the right end of `cache`, in place; return the mask ``[B, T]`` of them."""
    width = int(lengths.max())
    columns = torch.arange(width)[None] - (width - lengths)[:, None]
    index = columns % width
    for layer in _layers(cache):
        where = index.to(layer.keys.device)[:, None, :, None]
        layer.keys = layer.keys.gather(2, where.expand(layer.keys.shape))
        layer.values = layer.values.gather(2, where.expand(layer.values.shape))
    return (columns >= 0).long()


def _joined(old: DynamicCache, new: DynamicCache) -> DynamicCache:
    """Return the rows of both caches, right-aligned."""
    for mine, other in zip(_layers(old), _layers(new), strict=True):
        mine.keys = torch.cat(_widened(mine.keys, other.keys), 0)
        mine.values = torch.cat(_widened(mine.values, other.values), 0)
    return old


def _widened(a: Tensor, b: Tensor) -> list[Tensor]:
    width = max(a.size(2), b.size(2))
    return [torch.nn.functional.pad(x, (0, 0, width - x.size(2), 0)) for x in (a, b)]


def _stacked(old: Tensor, new: Tensor) -> Tensor:
    if not len(old):
        return new
    width = max(old.size(1), new.size(1))
    return torch.cat([torch.nn.functional.pad(x, (width - x.size(1), 0)) for x in (old, new)], 0)
