"""A ``decision_template.jinja`` that renders this project's question, for servers that answer typed decisions.

A server's decision pipeline hands the template one variable, the request's `state`. Ours takes two kinds of it:

- a text: the question as it stands, each image at the placeholder `assets` names. This is what this project sends;
- ``{"title": …, "preference": …, "image": PLACEHOLDER}``: filled into the style's own wording, for anyone else.

Behind that stands the model's own chat template, word for word, with the question as the user's only turn.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Sequence
from typing import Any

from recbole_mllm.mllm.encode import AnswerTokens
from recbole_mllm.prompts import IMAGE, Style

_HEAD = """\
{{#- Written by recbole-mllm: the question of prompt style {style!r}, {order}. `state` is the question itself, or a
mapping with `title`, `preference` and, where the item has one, `image`. -#}}
{{%- if state is mapping and state.image -%}}{{%- set content = {with_image} -%}}
{{%- elif state is mapping -%}}{{%- set content = {without_image} -%}}
{{%- elif state is string -%}}{{%- set content = [{{"type": "text", "text": state}}] -%}}
{{%- else -%}}{{%- set content = state -%}}
{{%- endif -%}}
"""
# Where the pipeline's own guard fails on a processor: special tokens' spellings are cut; it drops `<|split|>` again
_GUARD = """\
{{%- set guarded = namespace(parts=[]) -%}}
{{%- for part in content -%}}
  {{%- if part.type == "text" -%}}
    {{%- set cut = namespace(text=part.text) -%}}
    {{%- for word in {words} -%}}
      {{%- set cut.text = cut.text.replace(word, word[0] ~ "<|split|>" ~ word[1:]) -%}}
    {{%- endfor -%}}
    {{%- set part = {{"type": "text", "text": cut.text}} -%}}
  {{%- endif -%}}
  {{%- set guarded.parts = guarded.parts + [part] -%}}
{{%- endfor -%}}
{{%- set content = guarded.parts -%}}
"""
# As prompts are rendered here; the pipeline does not say so to every processor
_NO_THINKING = "{%- set enable_thinking = false -%}\n"
_PARTS = '{% set messages = [{"role": "user", "content": content}] %}\n'
_TEXT = '{% set messages = [{"role": "user", "content": content[0].text}] %}\n'


def decision_template(
    chat_template: str,
    style: Style,
    *,
    item_first: bool,
    sees: bool,
    start: str = "",
    guard: Sequence[str] = (),
    lead: str = "",
) -> str:
    """Return the template's text.

    Args:
        chat_template: The model's own.
        style: The wording of a `state` that is a mapping.
        item_first: Which of the style's two orders.
        sees: Whether the chat template takes parts of text and images (a processor's), or a bare text (a tokeniser's).
        guard: Spellings the template itself is to keep plain text, the longest first.
        start: What stands before all of it, where the tokeniser puts a token in front that the chat template lacks.
        lead: What stands behind its generation prompt, before every answer.
    """
    order = "item-first" if item_first else "user-first"
    name = f"recommend_{order.replace('-', '_')}"
    head = _HEAD.format(
        style=style.name,
        order=order,
        with_image=_content(getattr(style, name)),
        without_image=_content(getattr(style, f"{name}_without_image")),
    )
    quiet = _NO_THINKING if "enable_thinking" in chat_template else ""
    own = _GUARD.format(words=json.dumps(list(guard), ensure_ascii=False)) if guard else ""
    # the newline that ends a template is none of its text, but would be one of text in front of something else
    ending = f"{{{{ {json.dumps(lead, ensure_ascii=False)} }}}}" if lead else ""
    template = chat_template.removesuffix("\n") if lead else chat_template
    return head + own + quiet + (_PARTS if sees else _TEXT) + start + template + ending


def _content(wording: str) -> str:
    """Return a Jinja list of the wording's texts and images, each text in one piece with what is filled into it."""
    texts = wording.split(IMAGE)
    parts: list[str] = []
    for number, text in enumerate(texts):
        parts += ['{"type": "image"}'] if number else []
        parts += [f'{{"type": "text", "text": {" ~ ".join(_pieces(text))}}}'] if text else []
    return f"[{', '.join(parts)}]"


def _pieces(text: str) -> Iterator[str]:
    for literal, name, _, _ in string.Formatter().parse(text):
        if literal:
            yield json.dumps(literal, ensure_ascii=False)
        if name is not None:
            yield f"state.{name}"


def labels(tokenizer: Any, answers: AnswerTokens, words: tuple[str, str]) -> list[str] | None:
    """Return spellings of Yes and No that the tokeniser turns into the very tokens that are scored, or None.

    Often that is a space and the word: the token behind a prompt that ends in no space.
    """
    found = []
    for (first, *_), word in zip((answers.yes, answers.no), words, strict=True):
        spellings = (word, f" {word}", tokenizer.decode([first]), tokenizer.convert_ids_to_tokens(first))
        found += [s for s in spellings if tokenizer(s, add_special_tokens=False)["input_ids"] == [first]][:1]
    return found if len(found) == len(words) else None
