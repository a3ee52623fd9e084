"""Write many answers at once: rows leave the batch when they are done, and waiting prompts take their places.

Every row has its own length, position and random stream, so an answer does not depend on its neighbours. Rows are
right-aligned in the key-value cache, their tokens without a gap, which sliding windows count on.

A family without a row in ``families`` may keep its memory of a text in ways that rows cannot leave and join (state
spaces, recurrences); so it is checked once, as it is for scoring, and else writes one answer at a time by its own
``generate``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList

from recbole_mllm.common.model_names import gguf_of, revision_of, source_of
from recbole_mllm.common.prompts import Prompt
from recbole_mllm.data.sampling import hash64
from recbole_mllm.mllm.backbone import Backbone
from recbole_mllm.mllm.encoder import Encoded, Encoder
from recbole_mllm.mllm.interface import Answer, Ask, Batch, Decoding, Work
from recbole_mllm.mllm.loading import UNREADABLE, changed
from recbole_mllm.mllm.memory import free_memory, out_of_memory
from recbole_mllm.mllm.scoring import UNSUITED, error_line, scoring_mode

READ_TOKENS = 4096  # read in one pass; more would fill memory with activations, and short prompts with padding
_REFILL = 4  # new rows are read once this share of the slots (1/4) is free: each refill copies the cache
_CHECK = Decoding(4)


def answer(body: Backbone, encoder: Encoder, stop: frozenset[int], slots: int, work: Work) -> None:
    """Answer what `work` holds, up to `slots` prompts at a time; the tokens of `stop` end an answer."""
    first = work.take(1)
    if first and _in_flight(body, encoder, stop, first[0].prompt):
        Generation(body, encoder, stop, slots, first).run(work)
    elif first:
        generate_plainly(body, encoder, stop, work, first)


def _in_flight(body: Backbone, encoder: Encoder, stop: frozenset[int], prompt: Prompt) -> bool:
    """Whether two short answers written side by side, to `prompt` and to a longer one, are those of ``generate``."""
    if body.architecture.known:
        return True
    kind = bool(prompt.images)
    if kind not in body.in_flight:
        pair = [prompt, Prompt(f"{prompt.marked} And why?", prompt.images)]
        own, fast = Batch(pair, _CHECK), Batch(pair, _CHECK)
        generate_plainly(body, encoder, stop, own)
        reason = "other words"
        try:
            Generation(body, encoder, stop, len(pair)).run(fast)
        except UNSUITED as error:
            reason = error_line(error)
        body.in_flight[kind] = fast.answers == own.answers and _reads_right(body, encoder, pair)
        if not body.in_flight[kind]:
            logging.getLogger().warning(
                f"{body.config.model_type}: answers written side by side are not those of its own generate ({reason}); "
                "they are written one by one"
            )
    return body.in_flight[kind]


def _reads_right(body: Backbone, encoder: Encoder, prompts: Sequence[Prompt]) -> bool:
    """Whether prompts are read as the model's plain forward pass does, which a few equal words do not show."""
    encoded = [encoder(prompt) for prompt in prompts]
    with body.without_gradients():
        mode = scoring_mode(body, encoded, sorted(set(encoded[0].ids)))
    if not prompts[0].images:
        body.scoring_mode = None  # nothing is known of how images are read; scoring finds out
    return mode != "plain"


@dataclass(slots=True)
class _Row:
    """One answer in the making."""

    ask: Ask
    encoded: Encoded
    shortened: bool
    rng: np.random.Generator | None
    position: int = 0  # of the next token
    rules: LogitsProcessorList | None = None
    seen: Any = None  # [1, T], the prompt's tokens and the new ones, which `rules` look at
    new: list[int] = field(default_factory=list)
    done: bool = False
    given: bool = False

    def answer(self, tokenizer: Any, stop: Collection[int]) -> Answer:
        """Return the text of the new tokens; one of `stop` that ends them is no part of it."""
        ended = self.new[-1] in stop
        text = tokenizer.decode(self.new[:-1] if ended else self.new, skip_special_tokens=True)
        return Answer(text.strip(), len(self.encoded.ids), len(self.new), not ended, self.shortened)


def _rows(encoder: Encoder, asks: Sequence[Ask], work: Work) -> list[_Row]:
    """Encode prompts; one whose image is gone since the work was planned fails alone.

    Each samples from a random stream of its own: the same in any batch and after any interruption.
    """
    rows = []
    for ask in asks:
        before, decoding = encoder.truncated, ask.decoding
        try:
            encoded = encoder(ask.prompt, room=decoding.max_new_tokens)
        except OSError as error:
            work.fail(ask.place, f"an image cannot be read any more: {error}")
            continue
        content = [*encoded.ids, *(image.key for image in encoded.images)]
        rng = np.random.default_rng(hash64("write", decoding.seed, *content)) if decoding.temperature else None
        rows.append(_Row(ask, encoded, encoder.truncated > before, rng))
    return rows


class Generation:
    """Answers the prompts of one `Work`, at most `slots` at a time.

    `first` has been taken from the work already. On out-of-memory the rows under way restart with half the slots; a
    prompt too large on its own fails alone.
    """

    def __init__(
        self, body: Backbone, encoder: Encoder, stop: frozenset[int], slots: int, first: Sequence[Ask] = ()
    ) -> None:
        self.backbone, self.encoder, self.stop, self.slots = body, encoder, stop, slots
        self.again: list[Ask] = list(first)
        self._clear()

    def _clear(self) -> None:
        self.rows: list[_Row] = []
        self.cache: DynamicCache | None = None
        self.mask = torch.zeros(0, 0, dtype=torch.long)

    def run(self, work: Work) -> None:
        """Take prompts from `work` and give their answers until none waits and none is under way."""
        with self.backbone.without_gradients():
            while (newcomers := self._newcomers(work)) or self.rows:
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
                self._restart(newcomers, work)

    def _newcomers(self, work: Work) -> list[Ask]:
        free = self.slots - len(self.rows)
        if self.rows and free * _REFILL < self.slots:
            return []
        out = self.again[:free]
        del self.again[:free]
        return out + (work.take(free - len(out)) if free > len(out) else [])

    def _admit(self, newcomers: Sequence[Ask], work: Work) -> None:
        rows = _rows(self.encoder, newcomers, work)
        for row in rows:
            row.position = int(self.backbone.positions(row.encoded)[..., -1].max()) + 1
            if rules := row.ask.decoding.rules:
                row.seen = torch.tensor([row.encoded.ids], device=self.backbone.logits_device)
                row.rules = _processors(
                    self.backbone.head_model, rules, row.seen, self.stop, row.ask.decoding.max_new_tokens
                )
        for part in _alike(sorted(rows, key=lambda row: len(row.encoded.ids))):
            self._read(part)

    def _read(self, rows: Sequence[_Row]) -> None:
        cache = DynamicCache()
        lengths = torch.tensor([len(row.encoded.ids) for row in rows])
        states = self.backbone.hidden([row.encoded for row in rows], 0, lengths.tolist(), cache)
        ends = states[torch.arange(len(rows)), (lengths - 1).to(states.device)]
        mask = _right_align(cache, lengths)
        self._append(rows, self.backbone.logits(ends))
        if self.cache is None:
            self.cache, self.mask = cache, mask
        else:
            for mine, other in zip(_layers(self.cache), _layers(cache), strict=True):
                mine.keys = _stacked(mine.keys, other.keys, 2)
                mine.values = _stacked(mine.values, other.values, 2)
            self.mask = _stacked(self.mask, mask, 1)
        self.rows += rows

    def _step(self) -> None:
        assert self.cache is not None
        self.mask = torch.cat([self.mask, torch.ones(len(self.rows), 1, dtype=torch.long)], 1)
        states = self.backbone.step(
            [row.new[-1] for row in self.rows], [row.position for row in self.rows], self.mask, self.cache
        )
        for row in self.rows:
            row.position += 1
        self._append(self.rows, self.backbone.logits(states))

    def _append(self, rows: Sequence[_Row], logits: Tensor) -> None:
        for i, row in enumerate(rows):
            if row.rules and not row.done:
                logits[i : i + 1] = row.rules(row.seen, logits[i : i + 1])
        best = logits.argmax(-1).tolist()
        for i, row in enumerate(rows):
            if row.done:
                continue
            token = best[i] if row.rng is None else _drawn(logits[i], row.ask.decoding, row.rng)
            row.new.append(token)
            if row.rules:
                row.seen = torch.cat([row.seen, row.seen.new_tensor([[token]])], 1)
            row.done = token in self.stop or len(row.new) >= row.ask.decoding.max_new_tokens

    def _hand_over(self, work: Work) -> None:
        """Give finished answers away at once; their rows leave when that is worth a copy of the cache."""
        if done := [row for row in self.rows if row.done and not row.given]:
            work.give([(row.ask.place, row.answer(self.encoder.tokenizer, self.stop)) for row in done])
            for row in done:
                row.given = True
        gone = sum(row.done for row in self.rows)
        if gone and (gone * _REFILL >= self.slots or gone == len(self.rows)):
            self._compact()

    def _compact(self) -> None:
        places = [i for i, row in enumerate(self.rows) if not row.done]
        if not places:
            self._clear()
            return
        self.rows = [self.rows[i] for i in places]
        self.mask = self.mask[places]
        first = int(self.mask.any(0).int().argmax())  # columns that only rows now gone had filled
        self.mask = self.mask[:, first:]
        assert self.cache is not None
        for layer in _layers(self.cache):
            index = torch.tensor(places, device=layer.keys.device)
            layer.keys = layer.keys.index_select(0, index)[:, :, first:]
            layer.values = layer.values.index_select(0, index)[:, :, first:]

    def _restart(self, newcomers: Sequence[Ask], work: Work) -> None:
        under_way = {row.ask.place: row.ask for row in self.rows if not row.done}
        under_way |= {ask.place: ask for ask in newcomers}
        self._clear()
        free_memory()
        if len(under_way) == 1:
            work.fail(*_too_large(*under_way.values()))
            return
        self.slots = max(1, len(under_way) // 2)
        self.again = [*under_way.values(), *self.again]
        logging.getLogger().warning(f"out of memory; generation continues with {self.slots} prompts at a time")


def generate_plainly(
    body: Backbone, encoder: Encoder, stop: frozenset[int], work: Work, first: Sequence[Ask] = ()
) -> None:
    """Answer `first` and what else `work` holds one by one, by the model's own ``generate``."""
    while asks := first or work.take(1):
        first = ()
        for row in _rows(encoder, asks, work):
            try:
                with body.without_gradients():
                    row.new = _generated(body, stop, row)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            if row.new:
                work.give([(row.ask.place, row.answer(encoder.tokenizer, stop))])
            else:  # not in the handler, as above
                free_memory()
                work.fail(*_too_large(row.ask))


def _generated(body: Backbone, stop: Collection[int], row: _Row) -> list[int]:
    decoding, model = row.ask.decoding, body.head_model
    how = GenerationConfig(
        **(json.loads(decoding.rules) if decoding.rules else {}),
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(stop) or None,
        pad_token_id=min(stop, default=0),
    )
    draws = LogitsProcessorList([_Drawn(decoding, row.rng)] if row.rng is not None else [])
    with changed(model, "generation_config", GenerationConfig()):  # which fills in what `how` leaves open
        out = model.generate(**body.plain_inputs(row.encoded), generation_config=how, logits_processor=draws)
    tokens: list[int] = out[0, len(row.encoded.ids) :].tolist()
    return tokens


class _Drawn(LogitsProcessor):  # type: ignore[misc]
    """Leaves only the token that the row's own random numbers draw, so that greedy decoding takes it."""

    def __init__(self, decoding: Decoding, rng: np.random.Generator) -> None:
        self.decoding, self.rng = decoding, rng

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        only = torch.full_like(scores, float("-inf"))
        only[0, _drawn(scores[0], self.decoding, self.rng)] = 0.0
        return only


def _drawn(logits: Tensor, decoding: Decoding, rng: np.random.Generator) -> int:
    """Return a token drawn from the fewest most likely ones that together reach ``top_p`` (nucleus sampling)."""
    share, token = torch.softmax(logits.double() / decoding.temperature, -1).sort(descending=True, stable=True)
    before = share.cumsum(-1) - share
    share = share[before < decoding.top_p]
    place = torch.searchsorted((share / share.sum()).cumsum(-1), rng.random())
    return int(token[min(int(place), len(share) - 1)])


def _too_large(ask: Ask) -> tuple[int, str]:
    begins = " ".join(ask.prompt.text.split())[:80]
    return ask.place, f"it does not fit into memory even alone (lower max_text_tokens); it begins {begins!r}"


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


def _stacked(old: Tensor, new: Tensor, axis: int) -> Tensor:
    """Return the rows of both, right-aligned along `axis`."""
    width, behind = max(old.size(axis), new.size(axis)), (0, 0) * (old.dim() - axis - 1)
    return torch.cat([torch.nn.functional.pad(x, (*behind, width - x.size(axis), 0)) for x in (old, new)], 0)


# --- what a model's ``generation_config`` says of its texts, beside where they end ---

_PENALTY = "repetition_penalty"
# Fields that change greedy text one token at a time, each with the values that do nothing
_FOLLOWED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys((_PENALTY, "encoder_repetition_penalty"), (1,)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), (0,)),
    **dict.fromkeys(("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens"), ([], {})),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"), ()),
    "remove_invalid_values": (False,),
}
# Fields for another way of decoding altogether, which is not followed
_IGNORED = ("num_beams", "num_beam_groups", "guidance_scale", "penalty_alpha", "token_healing", "constraints",
            "force_words_ids", "stop_strings", "dola_layers", "max_time", "watermarking_config")  # fmt: skip


def own_rules(name: str, *, trust_remote_code: bool = False) -> str:
    """Return the rules in the ``generation_config`` of model `name`, as JSON; "" for none. No weights are read."""
    source, revision = source_of(name), revision_of(name)
    if gguf_of(source) is not None:
        return ""
    try:
        found = GenerationConfig.from_pretrained(source, revision=revision)
    except UNREADABLE:
        try:  # older models have it in their config.json
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, revision=revision)
            found = GenerationConfig.from_model_config(config)
        except UNREADABLE:  # said when it is loaded
            return ""
    return _as_json(vars(found))


def with_penalty(rules: str, penalty: float | None, *, served: bool = False) -> str:
    """Return `rules` with the user's own repetition penalty, if any; a server must be sent a 1 as well."""
    if penalty is None:
        return rules
    if served:
        return json.dumps({_PENALTY: penalty})
    return _as_json((json.loads(rules) if rules else {}) | {_PENALTY: penalty})


def ignored_rules(config: Any) -> str:
    """Return what a ``generation_config`` says that is not followed, for people; "" for nothing."""
    found = {key: getattr(config, key, None) for key in _IGNORED}
    return ", ".join(f"{key}: {value}" for key, value in found.items() if value not in (None, 0, 1, [], ""))


def _processors(model: Any, rules: str, prompt: Tensor, stop: Collection[int], most: int) -> LogitsProcessorList:
    """Return what ``generate`` would do to the logits behind `prompt` ``[1, T]`` in an answer of `most` tokens."""
    config = GenerationConfig(**json.loads(rules), do_sample=False, max_length=prompt.size(1) + most)
    config._eos_token_tensor = torch.tensor(sorted(stop), device=prompt.device) if stop else None
    return model._get_logits_processor(
        config,
        input_ids_seq_length=prompt.size(1),
        encoder_input_ids=prompt,
        logits_processor=LogitsProcessorList(),
        device=prompt.device,
        model_kwargs={},
    )


def _as_json(values: Mapping[str, Any]) -> str:
    found = {key: values.get(key) for key, neutral in _FOLLOWED.items() if values.get(key) not in (None, *neutral)}
    return json.dumps(found, sort_keys=True) if found else ""
