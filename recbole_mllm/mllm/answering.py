"""Answer prompts in flight where that is right for a model, and by its own ``generate``, one by one, where it is not.

A family without a row in ``architectures`` may keep its memory of a text in ways that rows cannot leave and join (state
spaces, recurrences), or read prompts as nobody here has thought of; so it is checked once, as it is for scoring.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from recbole_mllm.mllm.base import Answer, Ask, Batch, Decoding, Work
from recbole_mllm.mllm.batching import free_memory, out_of_memory
from recbole_mllm.mllm.check import UNSUITED, told
from recbole_mllm.mllm.encode import Encoder
from recbole_mllm.mllm.forward import Body
from recbole_mllm.mllm.generation import Generation, answer_of, beginning, stream
from recbole_mllm.mllm.plain import plain_answer
from recbole_mllm.mllm.scoring import way_of
from recbole_mllm.prompts import Prompt

_PROBE = Decoding(4)


def answer(body: Body, encoder: Encoder, stop: frozenset[int], slots: int, work: Work) -> None:
    """Answer what `work` holds, up to `slots` prompts at a time."""
    first = work.take(1)
    if not first:
        return
    if _in_flight(body, encoder, stop, first[0].prompt):
        Generation(body, encoder, stop, slots, first).run(work)
    else:
        PlainGeneration(body, encoder, stop, first).run(work)


class PlainGeneration:
    """Answers one prompt after the other by the model's own ``generate``; a prompt too large fails alone."""

    def __init__(self, body: Body, encoder: Encoder, stop: frozenset[int], first: Sequence[Ask] = ()) -> None:
        self.body, self.encoder, self.stop, self.first = body, encoder, stop, list(first)

    def run(self, work: Work) -> None:
        """Take prompts from `work` and give their answers until none waits."""
        while asks := self.first or work.take(1):
            self.first = []
            for ask in asks:
                with self.body.without_gradients():
                    found = self._answer(ask)
                if isinstance(found, Answer):
                    work.give([(ask.place, found)])
                else:
                    work.fail(ask.place, found)

    def _answer(self, ask: Ask) -> Answer | str:
        """Return the answer, or why there is none."""
        before = self.encoder.truncated
        try:
            encoded = self.encoder(ask.prompt, room=ask.decoding.max_new_tokens)
            rng = stream(encoded, ask.decoding)
            new = plain_answer(self.body, encoded, ask.decoding, self.stop, rng)
        except OSError as error:  # an image that was there when the work was planned
            return f"an image cannot be read any more: {error}"
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        else:
            made = answer_of(self.encoder.tokenizer, self.stop, encoded, new)
            return replace(made, shortened=self.encoder.truncated > before)
        free_memory()
        return f"it does not fit into memory (lower max_text_tokens); it begins {beginning(ask)!r}"


def _in_flight(body: Body, encoder: Encoder, stop: frozenset[int], prompt: Prompt) -> bool:
    """Whether two short answers written in flight, to `prompt` and to a longer one, are those of ``generate``."""
    if body.architecture.known:
        return True
    kind = bool(prompt.images)
    if kind not in body.in_flight:
        pair = [Prompt(prompt.marked, prompt.images), Prompt(f"{prompt.marked} And why?", prompt.images)]
        own, fast = Batch(pair, _PROBE), Batch(pair, _PROBE)
        PlainGeneration(body, encoder, stop).run(own)
        reason = "other words"
        try:
            Generation(body, encoder, stop, len(pair)).run(fast)
        except UNSUITED as error:
            reason = told(error)
        body.in_flight[kind] = fast.answers == own.answers and _reads_right(body, encoder, pair)
        if not body.in_flight[kind]:
            logging.getLogger().warning(
                f"{body.config.model_type}: answers written side by side are not those of its own generate ({reason}); "
                "they are written one by one"
            )
    return body.in_flight[kind]


def _reads_right(body: Body, encoder: Encoder, prompts: Sequence[Prompt]) -> bool:
    """Whether prompts are read as the model's plain forward pass does, which a few equal words do not show."""
    encoded = [encoder(prompt) for prompt in prompts]
    with body.without_gradients():
        way = way_of(body, encoded, sorted(set(encoded[0].ids)))
    if not prompts[0].images:
        body.way = None  # nothing is known of how images are read; scoring finds out
    return way != "plain"
