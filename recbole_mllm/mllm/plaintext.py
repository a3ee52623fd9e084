"""Tokenise a rendered prompt so that a special token's spelling inside a title or summary stays plain text.

A filled-in text is cut inside every such spelling, and the parts are tokenised apart. Text that needs no cut is
tokenised in one piece, exactly as the model's own processor does it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any
from unicodedata import combining

from recbole_mllm.prompts import IMAGE

# A private-use character that no title can hold (``data.atomic.clean``); a text is cut where it stands
CUT = "\ue000"
# A part from the middle of a text is tokenised behind this, as a SentencePiece tokeniser would put a space before the
# first word of a text; its own ids are taken off again (as transformers' ``encode_marked_chat`` does)
_ANCHOR = "\n"
_SPACE = "\u2581"


class PlainText:
    """One tokeniser with the spellings of its special tokens, and of added ones that look like tags."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        named = {str(w): int(tokenizer.convert_tokens_to_ids(w)) for w in tokenizer.all_special_tokens}
        flagged = {int(i): bool(token.special) for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
        added = {str(w): int(i) for w, i in tokenizer.get_added_vocab().items() if flagged.get(i, True) or _is_tag(w)}
        # Runs of white space are tokens of their own (Gemma), and as harmless in a title as any letter
        self._special = {word: i for word, i in (added | named).items() if not _is_white(word)}
        self._ids = frozenset(self._special.values())
        # special ones of one letter, which cannot be cut in two: they are tokenised apart, as no special token
        self._letters = {word for word in self._special if len(word) == 1}
        # longest first, as one may hold another
        self.spellings = sorted({word for word in {*self._special, IMAGE} if len(word) > 1}, key=lambda w: (-len(w), w))
        self._pattern = re.compile("|".join(map(re.escape, self.spellings)))
        letters = "|".join(map(re.escape, sorted(self._letters))) or "(?!)"
        self._letter = re.compile(f"{CUT}(?:{letters}){CUT}|({letters})")
        self._told = False
        self._anchor = self._encode(_ANCHOR)
        self.start = self._start()

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _start(self) -> list[int]:
        """Return the ids the tokeniser puts before a text by itself."""
        bare, whole = self._encode("a"), list(self.tokenizer("a")["input_ids"])
        return next((whole[:n] for n in range(len(whole)) if whole[n : n + len(bare)] == bare), [])

    def guard(self, text: str, *, every: bool = False) -> str:
        """Return `text` with a `CUT` inside each special token's spelling, or behind `every` character."""
        if every:
            return CUT.join(text.replace(CUT, ""))
        text = self._letter.sub(lambda found: f"{CUT}{found[1]}{CUT}" if found[1] else found[0], text)
        # again, as what a cut leaves may spell another: <<a> is < and <a>
        while (cut := self._pattern.sub(lambda found: f"{found[0][0]}{CUT}{found[0][1:]}", text)) != text:
            text = cut
        return text

    def ids(self, text: str) -> list[int]:
        """Return the ids of `text`, its parts between cuts tokenised apart."""
        first, *rest = text.split(CUT)
        ids = self._encode(first)
        for part in filter(None, rest):
            if part in self._letters:
                ids += self.tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]
                continue
            behind = self._encode(_ANCHOR + part)
            n = len(self._anchor)
            ids += behind[n:] if behind[:n] == self._anchor else self._encode(part)
        return ids

    def broken(self, ids: Sequence[int], text: str) -> bool:
        """Whether `ids` hold more special tokens than `text` spells between cuts.

        A tokeniser may fold letters (full-width ones, say) before it looks for its tokens; no spelling shows that.
        """
        spelt = len(self._pattern.findall(text)) + sum(bool(found[1]) for found in self._letter.finditer(text))
        found = sum(token in self._ids for token in ids) > spelt
        if found and not self._told:
            self._told = True
            logging.getLogger().warning(
                "a title or summary spells one of the model's own tokens, once its tokeniser has folded letters; such "
                "prompts' texts are tokenised letter by letter, which may move their scores"
            )
        return found

    def stripped(self, ids: Sequence[int]) -> tuple[tuple[int, ...], str, str]:
        """Return `ids` without the plain text around their special tokens, and that text: before and behind."""
        places = [t for t, token in enumerate(ids) if token in self._ids]
        if not places:
            return tuple(ids), "", ""
        first, stop = places[0], places[-1] + 1
        return tuple(ids[first:stop]), self.tokenizer.decode(ids[:first]), self.tokenizer.decode(ids[stop:])


def _is_tag(word: str) -> bool:
    """Whether an added token that is not special may still structure a chat, as ``<think>`` does.

    A letter or a word of letters and digits (an umlaut, a brand) is text that its tokeniser reads as one piece.
    """
    return len(word) > 1 and not all(
        letter.isalnum() or letter.isspace() or letter == _SPACE or combining(letter) for letter in word
    )


def _is_white(word: str) -> bool:
    return not word.replace(_SPACE, "").strip()
