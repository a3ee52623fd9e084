"""What to look for in written texts: an end cut off, a refusal, a prompt said again."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from recbole_mllm.common.prompts import Prompt
from recbole_mllm.mllm.interface import Answer

_END = re.compile(r"[.!?](?=\s|$)|[。！？]")
_REFUSAL = re.compile(
    r"(i['’]?m |i am )?(very |so )?sorry\b|i (can(no|['’])t|can not|am unable|['’]m unable|do not have|don['’]t have)\b"
    r"|i['’]m (unable|not able)\b|as an? (ai|language model)\b|unfortunately,? i\b",
    re.IGNORECASE,
)
_RUN = 8  # words in a row that are no accident
_LEAST_WORDS = 12
_EXAMPLES = 3


def cut_at_sentence(answer: Answer) -> str:
    """Return the text; where it reached its limit, without the sentence that was left unfinished, if much remains."""
    if not answer.truncated:
        return answer.text
    ends = [match.end() for match in _END.finditer(answer.text)]
    return answer.text[: ends[-1]] if ends and ends[-1] * 2 >= len(answer.text) else answer.text


def repeats_prompt(text: str, prompt: Prompt, previous: str = "") -> bool:
    """Return whether most of `text` is the prompt said again, its `previous` preference aside, which may well stay."""
    words = text.lower().split()
    if len(words) < _LEAST_WORDS:
        return False
    said = prompt.text.replace(previous, " ") if previous else prompt.text
    known = set(_runs(said.lower().split()))
    own = list(_runs(words))
    return sum(run in known for run in own) * 2 >= len(own)


def _runs(words: list[str]) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + _RUN]) for i in range(len(words) - _RUN + 1)]


@dataclass(slots=True)
class Findings:
    """How often something was found, with a few examples of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def note(self, what: str, example: str) -> None:
        """Count `what`; the first few examples are stored."""
        self.counts[what] += 1
        stored = self.examples.setdefault(what, [])
        if len(stored) < _EXAMPLES and example not in stored:
            stored.append(example)

    def look(self, text: str) -> None:
        """Note what can be seen in a text alone, known from the store or newly written."""
        if not text:
            self.note("empty", "")
        elif text.startswith("<think>"):  # and cut before the thought's end
            self.note("has a thought", text)
        elif _REFUSAL.match(text):
            self.note("refusal", text)

    def look_at_new(self, answer: Answer) -> None:
        """Note what only the writer knows."""
        if answer.truncated:
            self.note("cut at the limit", answer.text)
        if answer.shortened:
            self.note("prompt shortened", answer.text)


# What to change where something is found, by key; {kind} is item or user
REMEDIES = {
    "cut at the limit": "{kind}_summary_tokens raises the limit",
    "prompt shortened": "max_text_tokens raises the limit",
    "refusal": "another {kind}_summarizer or prompt_style",
    "empty": "another {kind}_summarizer or prompt_style",
    "has a thought": "tell the server not to let its model think (docs/servers.md)",
    "repeats its prompt": "another {kind}_summarizer, or summary_temperature",
}


def table(findings: Findings, kind: str, total: int) -> list[str]:
    """Return the findings as lines for the log: count, share, what changes it, examples."""
    lines = []
    for what, remedy in REMEDIES.items():
        if number := findings.counts[what]:
            share = f"{number} of {total} ({number / max(1, total):.1%})"
            lines.append(f"  {what:<19} {share:<22} {remedy.format(kind=kind)}")
            lines += [f"    e.g. {_short(text)!r}" for text in findings.examples[what] if text]
    return lines


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:70]} … {text[-25:]}"
