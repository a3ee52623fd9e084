"""A conversation of one question and its answer, as the model's chat template writes it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from recbole_mllm.errors import UserError

_PROBE, _WORD = "A question?", "Yes"
_DAY = datetime(2024, 7, 26)  # the day that Llama 3's template names where it cannot know today's
_NOW = re.compile(r"""\bstrftime_now\(\s*(["'])(.*?)\1\s*\)""")


class Turns:
    """Writes conversations for one model; without a chat template, bare text.

    Args:
        tokenizer: The model's.
        processor: Its processor, whose template is taken; None for a text-only model.
        image_token: What stands for an image in a rendered text.
        bos_behind_image: Whether a bare text has <bos> behind its last image (PaliGemma).
    """

    def __init__(self, tokenizer: Any, processor: Any | None, image_token: str, *, bos_behind_image: bool) -> None:
        self.tokenizer, self.image_token, self.bos_behind_image = tokenizer, image_token, bos_behind_image
        self.owner = tokenizer if processor is None else processor
        self.sees = processor is not None

    @property
    def templated(self) -> bool:
        """Whether there is a chat template."""
        return bool(self.template)

    @cached_property
    def template(self) -> Any:
        """The chat template, if any; one that names today's date (Llama 3.2) names one day for ever.

        A prompt is then the same tomorrow, and so is what is scored.
        """
        own = getattr(self.owner, "chat_template", None)
        return _NOW.sub(lambda found: json.dumps(_DAY.strftime(found[2])), own) if isinstance(own, str) else own

    def render(self, texts: Sequence[str], answer: str = "") -> str:
        """Return a question made of `texts` with an image between each two, ready for its answer, or with it."""
        if not self.templated:
            return self._bare(texts, answer)
        turn = [{"role": "user", "content": self._content(texts, self._in_parts)}]
        rendered = self._chat(turn, add_generation_prompt=True) + self.lead
        return rendered + self._reply(turn, rendered, answer) if answer else rendered

    @cached_property
    def lead(self) -> str:
        """The words a template puts before every answer and leaves out of its generation prompt.

        An empty thought (Qwen3), a channel's name (gpt-oss), or the assistant's own header: none is part of the answer.
        """
        if not self.templated:
            return ""
        turn = [{"role": "user", "content": self._content([_PROBE], self._in_parts)}]
        asked = self._chat(turn, add_generation_prompt=True)
        told = self._chat([*turn, self._said(_WORD)])
        found = told[len(asked) :].partition(_WORD)[0] if told.startswith(asked) else ""
        return found.rstrip(" ") if found.strip() else ""  # a space belongs to the word behind it

    @cached_property
    def _in_parts(self) -> bool:
        """Whether the template takes a list of texts and images, as most processors' do and most tokenisers' do not.

        Raises:
            UserError: It writes neither.
        """
        shown = list(self._tried())
        for wanted in (True, False) if self.sees else (False,):  # one that shows an image, if there is any
            for in_parts, text in shown:
                if _PROBE in text and "'type'" not in text and (not wanted or self.image_token in text):
                    return in_parts
        raise UserError("the model's chat template does not write the text of a question; mend or remove it")

    def _tried(self) -> Iterator[tuple[bool, str]]:
        """Yield what the template makes of a question in both forms, the usual one first."""
        texts, failed = ["", _PROBE] if self.sees else [_PROBE], list[UserError]()
        for in_parts in (self.sees, not self.sees):
            try:
                yield in_parts, self._chat([{"role": "user", "content": self._content(texts, in_parts)}])
            except UserError as error:
                failed.append(error)
        if len(failed) > 1:
            raise failed[0]

    def _content(self, texts: Sequence[str], in_parts: bool) -> Any:
        if not in_parts:
            return self.image_token.join(texts)
        content = [{"type": "text", "text": texts[0]}] if texts[0] else []
        for text in texts[1:]:
            content += [{"type": "image"}, *([{"type": "text", "text": text}] if text else [])]
        return content

    def _said(self, answer: str) -> dict[str, Any]:
        return {"role": "assistant", "content": self._content([answer], self._in_parts)}

    def _chat(self, turns: list[dict[str, Any]], **options: Any) -> str:
        """Return `turns` as the template writes them; a model that can think first is told not to.

        Raises:
            UserError: The template is broken, or refuses them.
        """
        told: dict[str, Any] = {"enable_thinking": False} if "enable_thinking" in str(self.template) else {}
        if self.template != self.owner.chat_template:
            told["chat_template"] = self.template
        try:
            return str(self.owner.apply_chat_template(turns, tokenize=False, **told, **options))
        except (TemplateError, TypeError) as error:
            raise UserError(f"the model's chat template fails: {error}; mend or remove it") from error

    def _reply(self, turn: list[dict[str, Any]], rendered: str, answer: str) -> str:
        """Return what the template writes for the assistant's `answer`, with its end tag."""
        whole = self._chat([*turn, self._said(answer)])
        return whole[len(rendered) :] if whole.startswith(rendered) else answer + str(self.tokenizer.eos_token or "")

    def _bare(self, texts: Sequence[str], answer: str) -> str:
        end = self.tokenizer.eos_token or ""
        text = self.image_token.join(texts)
        if self.bos_behind_image:  # PaliGemmaProcessor.prepare_inputs_layout; the answer: its `suffix`
            head, mark, tail = text.rpartition(self.image_token)
            return f"{head}{mark}{self.tokenizer.bos_token}{tail}\n" + (f"{answer}{end}" if answer else "")
        return text + (f" {answer}{end}" if answer else "")
