"""Pretraining samples: a dialogue in tokens, where its image stands, and what the model should say at which place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from recbole_mllm.common.prompts import (
    Prompt,
    Style,
    fused_summary_prompt,
    image_summary_prompt,
    item_line,
    preference_prompt,
    recommend_prompt,
    text_summary_prompt,
    titles_as_preference,
)
from recbole_mllm.demo.attributes import FIELDS, VISIBLE, Item, Traits, draw_item, draw_traits
from tiny_mllm import sentences
from tiny_mllm.language import IMAGE_ID, one_token, rendered, value_tokens
from tiny_mllm.settings import IMAGE_TOKENS

PICTURE = Path("candidate.png")  # stands for the image in a prompt; nothing opens it
_PATCHES_A_FIELD = IMAGE_TOKENS // len(VISIBLE)


@dataclass(frozen=True, slots=True)
class Target:
    """At `position` the next token should be `token`; `kind` says what is being learnt there."""

    position: int
    token: int
    weight: float
    kind: str


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids, the places of the image's tokens (empty without one), and the targets."""

    ids: list[int]
    targets: list[Target]
    slots: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Maker:
    """Makes samples of every task; all words come from `style` through the product's own prompt functions."""

    tokenizer: Any
    style: Style
    rng: Random
    tokens: dict[tuple[str, str], int] = field(init=False)
    yes: int = field(init=False)
    no: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = value_tokens(self.tokenizer)
        self.yes = one_token(self.tokenizer, f" {self.style.answer_yes}")
        self.no = one_token(self.tokenizer, f" {self.style.answer_no}")

    # ---- texts that are written

    def summary(self) -> Sample:
        """A step of the recurrent preference summary, by the rule `sentences.summarize`."""
        prompt, preference = summary_step(self.style, self.rng)
        return self._answered(prompt, sentences.preference_text(preference))

    def caption(self, item: Item | None = None) -> Sample:
        """The image's summary; its slots hold the four words until a real image takes their place."""
        item = item or draw_item(self.rng, reserved=False)
        return self._answered(image_summary_prompt(self.style, PICTURE), sentences.caption(item), 0.2, 0.15, item)

    def text_summary(self) -> Sample:
        """The title's summary."""
        item = draw_item(self.rng, reserved=False)
        return self._answered(text_summary_prompt(self.style, item.title), sentences.text_summary(item), 0.3, 1.0)

    def fused_summary(self) -> Sample:
        """The summary of image and title together."""
        item = draw_item(self.rng, reserved=False)
        told = sentences.text_summary(item) if self.rng.random() < 0.6 else item.title
        return self._answered(
            fused_summary_prompt(self.style, sentences.caption(item), told), sentences.fused_summary(item), 0.3
        )

    def _answered(
        self, prompt: Prompt, answer: str, weight: float = 1.0, others: float = 0.15, item: Item | None = None
    ) -> Sample:
        question, reply = self._encoded(prompt, answer)
        ids, values = question + reply, set(self.tokens.values())
        targets = [
            Target(len(question) - 1 + i, token, weight, "value")
            if token in values
            else Target(len(question) - 1 + i, token, weight * others, "word")
            for i, token in enumerate(reply)
        ]
        return Sample(ids, targets, self._fill_slots(ids, item) if item else [])

    # ---- matches

    def match(self, item: Item | None = None) -> Sample:
        """Whether a user takes a candidate; `item` is the pretraining image it shows, if there is one."""
        rng = self.rng
        item = item or draw_item(rng, reserved=False)
        taste = _taste_near(item, rng)
        chance = rng.random()
        known = {} if chance < 0.05 else _some(taste, rng) if chance < 0.11 else taste
        return self._judged(item, taste, known, sentences.preference_text(known) if known else self.style.cold)

    def title_match(self) -> Sample:
        """A match whose preference is the titles of past items, as without summaries."""
        rng = self.rng
        item = draw_item(rng, reserved=False)
        taste = _taste_near(item, rng)
        past = [draw_item(rng, reserved=False, taste=taste, pull=0.7) for _ in range(rng.randint(3, 10))]
        preference = titles_as_preference(self.style, [bought.title for bought in past])
        return self._judged(item, taste, {}, preference)

    def _judged(self, item: Item, taste: Traits, known: Traits, preference: str) -> Sample:
        """Yes with the probability that the whole hidden taste gives, and agreement at each value that comes second."""
        rng = self.rng
        item_first, has_image = rng.random() < 0.6, rng.random() >= 0.08
        image = PICTURE if has_image else None
        prompt = recommend_prompt(self.style, preference, item.title, image, item_first=item_first)
        ids, _ = self._encoded(prompt, self.style.answer_yes)
        slots = self._fill_slots(ids, item) if has_image else []
        agree = {name: item.traits[name] == taste[name] for name in known if has_image or name == "theme"}
        targets = []
        for name, same in agree.items():
            places = _last(ids, self.tokens[name, taste[name]])
            if not item_first:
                places = _row(slots, name) if name in VISIBLE else _last(ids, self.tokens[name, item.theme])
            kind = "agree image" if name in VISIBLE else "agree theme"
            targets += [Target(p, self.yes if same else self.no, 0.4 / len(places), kind) for p in places]
        yes = _probability(sum(item.traits[name] == taste[name] for name in FIELDS))
        end = len(ids) - 1
        targets += [Target(end, self.yes, yes, "decision"), Target(end, self.no, 1 - yes, "decision")]
        return Sample(ids, targets, slots)

    # ---- tokens

    def _encoded(self, prompt: Prompt, answer: str) -> tuple[list[int], list[int]]:
        question, reply = rendered(self.tokenizer, prompt, answer)
        question = question.replace("<image>", "<image>" * IMAGE_TOKENS)
        encode = self.tokenizer.encode
        return encode(question, add_special_tokens=False), encode(reply, add_special_tokens=False)

    def _fill_slots(self, ids: list[int], item: Item) -> list[int]:
        """Put the item's words where its image stands, four patches a field, and return the places."""
        slots = [place for place, token in enumerate(ids) if token == IMAGE_ID]
        for name in VISIBLE:
            for place in _row(slots, name):
                ids[place] = self.tokens[name, item.traits[name]]
        return slots


def summary_step(style: Style, rng: Random) -> tuple[Prompt, dict[str, str]]:
    """Return one question for a preference and the traits that answer it."""
    taste, pull = draw_traits(rng), rng.uniform(0.3, 0.9)
    size = rng.choices((1, 2, 3, 4, 5), (10, 10, 30, 40, 10))[0]
    told = _how_told(rng)
    block = [_line(draw_item(rng, reserved=False, taste=taste, pull=pull), told, style, rng) for _ in range(size)]
    lines, traits = [line for line, _ in block], [known for _, known in block]
    if rng.random() < 0.4:
        return preference_prompt(style, lines, None), sentences.summarize(traits)
    before = taste if rng.random() < 0.6 else draw_traits(rng)
    past = [draw_item(rng, reserved=False, taste=before, pull=pull).traits for _ in range(3)]
    previous = sentences.summarize(past)
    if told in ("bare", "text") and rng.random() < 0.7 or rng.random() < 0.03:
        previous = {"theme": previous["theme"]}
    return preference_prompt(style, lines, sentences.preference_text(previous)), sentences.summarize(traits, previous)


def _how_told(rng: Random) -> str:
    return rng.choices(("caption", "bare", "text"), (89, 6, 5))[0]


def _line(item: Item, told: str, style: Style, rng: Random) -> tuple[str, Mapping[str, str]]:
    if told == "caption":
        told = rng.choices(("caption", "bare", "fused"), (80, 12, 8))[0]
    summary = {
        "caption": sentences.caption(item),
        "bare": "",
        "text": sentences.text_summary(item),
        "fused": sentences.fused_summary(item),
    }[told]
    return item_line(style, item.title, summary), sentences.known_traits(item, summary)


def _taste_near(item: Item, rng: Random) -> dict[str, str]:
    """Draw a taste that agrees with `item` in about half of the fields, so that Yes and No are both common."""
    return {name: item.traits[name] if rng.random() < 0.45 else drawn for name, drawn in draw_traits(rng).items()}


def _some(taste: Traits, rng: Random) -> dict[str, str]:
    names = rng.sample(FIELDS, rng.randint(1, len(FIELDS) - 1))
    return {name: taste[name] for name in FIELDS if name in names}


def _probability(agreeing: int) -> float:
    return 1 / (1 + math.exp(-2 * (agreeing - len(FIELDS) / 2)))


def _row(slots: list[int], name: str) -> list[int]:
    start = VISIBLE.index(name) * _PATCHES_A_FIELD
    return slots[start : start + _PATCHES_A_FIELD]


def _last(ids: list[int], token: int) -> list[int]:
    return [len(ids) - 1 - ids[::-1].index(token)]
