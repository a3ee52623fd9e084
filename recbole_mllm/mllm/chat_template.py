"""A conversation of one question and its answer, as the model's chat template writes it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from recbole_mllm.common.errors import UserError

_QUESTION, _ANSWER = "A question?", "Yes"
_DAY = datetime(2024, 7, 26)  # the day that Llama 3's template names where it cannot know today's
_NOW = re.compile(r"""\bstrftime_now\(\s*(["'])(.*?)\1\s*\)""")


class ChatTemplate:
    """Writes conversations for one model, in its processor's chat template; without a template, bare text.

    `image_token` stands for an image in a rendered text; `bos_behind_image`: a bare text has <bos> there (PaliGemma).
    """

    def __init__(self, tokenizer: Any, processor: Any | None, image_token: str, *, bos_behind_image: bool) -> None:
        self.tokenizer, self.image_token, self.bos_behind_image = tokenizer, image_token, bos_behind_image
        self.owner = tokenizer if processor is None else processor
        self.sees = processor is not None

    @cached_property
    def template(self) -> Any:
        """The chat template, if any; one that names today's date (Llama 3.2) always names the same day.

        A prompt is then the same tomorrow, and so is its score.
        """
        own = getattr(self.owner, "chat_template", None)
        return _NOW.sub(lambda found: json.dumps(_DAY.strftime(found[2])), own) if isinstance(own, str) else own

    def render(self, texts: Sequence[str], answer: str = "", system: str = "") -> str:
        """Return a question of `texts` with an image between each two, with the generation prompt or the answer.

        Raises:
            UserError: The template shows no `system` message, or there is no template.
        """
        turns = [self.turn("system", [system])] if system and self.template else []
        turns += [self.turn("user", texts)] if self.template else []
        rendered = self._chat(turns, add_generation_prompt=True) + self.lead if turns else self._bare(texts, "")
        if system not in rendered:
            raise UserError(
                "the model's chat template has no place for the prompt style's recommend_system; take another "
                "prompt_style or model"
            )
        if not answer:
            return rendered
        if not turns:
            return self._bare(texts, answer)
        whole = self._chat([*turns, self.turn("assistant", [answer])])  # with the answer's end tag
        return whole if whole.startswith(rendered) else rendered + answer + str(self.tokenizer.eos_token or "")

    @cached_property
    def lead(self) -> str:
        """The words a template puts before every answer and leaves out of its generation prompt.

        An empty thought (Qwen3), a channel's name (gpt-oss), or the assistant's own header: none is part of the answer.
        """
        if not self.template:
            return ""
        turn = self.turn("user", [_QUESTION])
        prompt = self._chat([turn], add_generation_prompt=True)
        whole = self._chat([turn, self.turn("assistant", [_ANSWER])])
        found = whole[len(prompt) :].partition(_ANSWER)[0] if whole.startswith(prompt) else ""
        return found.rstrip(" ") if found.strip() else ""  # a space belongs to the word behind it

    @cached_property
    def _in_parts(self) -> bool:
        """Whether the template takes a list of texts and images, as most processors' do and most tokenisers' do not.

        Raises:
            UserError: It writes neither.
        """
        texts, shown = ["", _QUESTION] if self.sees else [_QUESTION], dict[bool, str]()
        problem = UserError("the model's chat template does not write the text of a question; fix or remove it")
        for in_parts in (not self.sees, self.sees):  # the usual form last, whose error is the one to tell
            try:
                text = self._chat([{"role": "user", "content": self._content(texts, in_parts)}])
            except UserError as error:
                problem = problem if shown else error
            else:
                shown |= {in_parts: text} if _QUESTION in text and "'type'" not in text else {}
        if not shown:
            raise problem
        # the one that shows the image, if there is any; else the usual one
        return max(
            shown, key=lambda in_parts: (self.sees and self.image_token in shown[in_parts], in_parts == self.sees)
        )

    def turn(self, role: str, texts: Sequence[str]) -> dict[str, Any]:
        """Return a message of `role` in the form that the template takes, with an image between each two `texts`."""
        return {"role": role, "content": self._content(texts, self._in_parts)}

    def _content(self, texts: Sequence[str], in_parts: bool) -> Any:
        if not in_parts:
            return self.image_token.join(texts)
        content = [{"type": "text", "text": texts[0]}] if texts[0] else []
        for text in texts[1:]:
            content += [{"type": "image"}, *([{"type": "text", "text": text}] if text else [])]
        return content

    def _chat(self, turns: list[dict[str, Any]], **options: Any) -> str:
        """Return `turns` as the template writes them; thinking is switched off where the template can.

        Raises:
            UserError: The template is broken, or refuses them.
        """
        options |= {"enable_thinking": False} if "enable_thinking" in str(self.template) else {}
        options |= {"chat_template": self.template} if self.template != self.owner.chat_template else {}
        try:
            return str(self.owner.apply_chat_template(turns, tokenize=False, **options))
        except (TemplateError, TypeError) as error:
            raise UserError(f"the model's chat template fails: {error}; fix or remove it") from error

    def _bare(self, texts: Sequence[str], answer: str) -> str:
        end = self.tokenizer.eos_token or ""
        text = self.image_token.join(texts)
        if self.bos_behind_image:  # PaliGemmaProcessor.prepare_inputs_layout; the answer: its `suffix`
            head, mark, tail = text.rpartition(self.image_token)
            return f"{head}{mark}{self.tokenizer.bos_token}{tail}\n" + (f"{answer}{end}" if answer else "")
        return text + (f" {answer}{end}" if answer else "")
