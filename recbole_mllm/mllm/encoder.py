"""From a prompt to token ids: chat template, plain-text guard, truncation, images expanded to placeholder tokens."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any
from unicodedata import combining

from torch import Tensor

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.prompts import IMAGE, Prompt
from recbole_mllm.data.images import image_digest, open_image
from recbole_mllm.mllm.chat_template import ChatTemplate
from recbole_mllm.mllm.families import Architecture
from recbole_mllm.mllm.loading import REFUSALS
from recbole_mllm.mllm.memory import ByteCache

# A private-use character that no title can hold (``data.atomic.clean``); a text is cut where it stands
CUT = "\ue000"
_MARK = f"{CUT}{IMAGE}{CUT}"  # an image of the style's own, in a text whose filled-in parts are guarded
# A part from the middle of a text is tokenised behind this, as a SentencePiece tokeniser would put a space before the
# first word of a text; its own ids are taken off again (as transformers' ``encode_marked_chat`` does)
_ANCHOR = "\n"
_SPACE = "\u2581"
# Of preprocessed images: LLaVA-NeXT's take 7 MB each, and are of no use once their features are there
IMAGE_BYTES = 2**28
# Characters a token spells, at most, of any text met in the wild: what lies beyond the limit by this is cut at once, as
# a text of megabytes takes a minute to be shortened in steps
_LETTERS = 64
ROOM = 48  # positions free for what is generated behind a prompt, where it is not said how much that may be
FEWEST = 8  # characters a filled-in text keeps
_ONE_QUESTION = 2  # the most texts filled into a question that lists no items: preference and title, image and text
SHORTER_HISTORY = "set a smaller max_history (where summary_mode is recurrent, block_size)"
_NOT_IMAGE_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels"}


@dataclass(frozen=True, slots=True)
class ImageInput:
    """One image as the model takes it: the ids its mark expands to, and the tensors its vision tower reads.

    `before` and `behind` are plain text its processor puts around it (Gemma3: empty lines); it is tokenised with the
    text it meets, as the processor itself would.
    """

    key: str
    ids: tuple[int, ...]
    tensors: Mapping[str, Tensor]
    before: str = ""
    behind: str = ""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt's token ids with its images expanded in place; the last `answer` of them are the assistant's."""

    ids: tuple[int, ...]
    images: tuple[ImageInput, ...] = ()
    answer: int = 0


@dataclass(slots=True)
class Encoder:
    """ChatTemplate prompts into `Encoded` for one model; images are preprocessed once each.

    A prompt has at most `max_text_tokens` tokens of text, and with its images' tokens and the answer's at most
    `positions`, which the model has. `truncated` counts the prompts whose texts were shortened.
    """

    tokenizer: Any
    processor: Any | None
    max_text_tokens: int
    architecture: Architecture = field(default_factory=Architecture)
    positions: int = 10**9
    truncated: int = 0
    _images: ByteCache[ImageInput] = field(init=False)
    _plain: PlainText = field(init=False)
    turns: ChatTemplate = field(init=False)

    def __post_init__(self) -> None:
        self._images = ByteCache(lambda: IMAGE_BYTES, image_bytes)
        self._plain = PlainText(self.tokenizer)
        behind = self.architecture.bos_behind_image
        self.turns = ChatTemplate(self.tokenizer, self.processor, self.image_token, bos_behind_image=behind)

    @property
    def image_token(self) -> str:
        """The text that stands for an image in a rendered prompt."""
        return str(getattr(self.processor, "image_token", IMAGE))

    @property
    def spellings(self) -> list[str]:
        """What must not be read as it stands in a title or summary, the longest first."""
        return self._plain.spellings

    def __call__(self, prompt: Prompt, answer: str = "", room: int = ROOM) -> Encoded:
        """Return the ids of `prompt` with the generation prompt, or with `answer` in the assistant's turn behind it.

        Its longest texts are shortened until it fits, with `room` positions left for what is generated behind it.

        Raises:
            UserError: It does not fit with the shortest of texts; what helps is said.
        """
        if prompt.images and self.processor is None:
            raise UserError("this model reads no images; set use_image: false and item_summary: text or none")
        images = tuple(self.image(path) for path in prompt.images)
        bound = self.max_text_tokens * _LETTERS
        pieces = [text[:bound] if place % 2 else text for place, text in enumerate(prompt.pieces())]
        ids = self._ids(pieces, images, answer)
        seen = sum(len(image.ids) - 1 for image in images)  # beside its mark, which is among the text's
        most = min(self.max_text_tokens, self.positions - seen - max(room, ROOM))
        self.truncated += len(ids) > most
        while len(ids) > most:
            if not self._shorten(pieces, len(ids) - most):
                raise UserError(self._too_long(pieces, images, most, max(room, ROOM)))
            ids = self._ids(pieces, images, answer)
        return Encoded(self._expanded(ids, images), images)

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of a text by itself, not of a question; no special token but the tokeniser's own in front."""
        text = text[: self.max_text_tokens * _LETTERS]
        guarded = self._plain.guard(text)
        ids = self._plain.ids(guarded)
        if self._plain.broken(ids, guarded):
            ids = self._plain.ids(self._plain.guard(text, every=True))
        return [*self._plain.start, *ids][: min(self.max_text_tokens, self.positions)]

    def _ids(self, pieces: Sequence[str], images: Sequence[ImageInput], answer: str) -> list[int]:
        """Return ids with one image token an image; what is filled in holds no special token."""
        guarded = [self._plain.guard(p) if i % 2 else p.replace(IMAGE, _MARK) for i, p in enumerate(pieces)]
        rendered = self._dressed(self.render(guarded, answer), images)
        ids = self._plain.ids(rendered)
        if self._plain.broken(ids, rendered):
            guarded = [self._plain.guard(p, every=True) if i % 2 else p for i, p in enumerate(guarded)]
            ids = self._plain.ids(self._dressed(self.render(guarded, answer), images))
        # the ids the tokeniser puts in front by itself (<s>), where a processor's or a bare text lacks them
        begin = self.tokenizer.bos_token
        whole = (self.turns.template and self.processor is None) or (begin and rendered.startswith(begin))
        return ids if whole else self._plain.start + ids

    def _dressed(self, rendered: str, images: Sequence[ImageInput]) -> str:
        """Return `rendered` with each image's own surrounding text at its mark."""
        if not any(image.before or image.behind for image in images):
            return rendered
        marks = [f"{image.before}{self.image_token}{image.behind}" for image in images]
        return "".join(part + mark for part, mark in zip_longest(rendered.split(self.image_token), marks, fillvalue=""))

    def render(self, guarded: Sequence[str], answer: str) -> str:
        """Return the conversation as the chat template writes it; without a template, the bare text."""
        return self.turns.render("".join(guarded).split(_MARK), answer)

    def _shorten(self, pieces: list[str], excess: int) -> bool:
        """Take about `excess` tokens from the end of the longest filled-in text; return whether there is one."""
        if (longest := longest_text(pieces)) is None:
            return False
        text = pieces[longest]
        tokens = max(1, len(self._plain.ids(self._plain.guard(text))))
        left = min(len(text) - 1, int(len(text) * max(0, tokens - excess) / tokens))
        # half the text at most in one step: another may have become the longest by then
        pieces[longest] = text[: max(FEWEST, left, len(text) // 2)].rstrip()
        return True

    def _too_long(self, pieces: Sequence[str], images: Sequence[ImageInput], most: int, room: int) -> str:
        """Say what helps where nothing is left to cut: a shorter history, if that does, or room for the rest."""
        ids, shown = len(self._ids(pieces, images, "")), sum(len(image.ids) for image in images)
        free = self.positions - shown + len(images)  # for text, where nothing were written behind it
        ways = ["lower item_summary_tokens or user_summary_tokens"] if free - room < ids <= free - ROOM else []
        ways += ["make the images smaller"] if free - room < ids <= self.positions - room else []
        ways += [f"take a model with more than {self.positions} positions"] if ids > free - room else []
        ways += ["raise max_text_tokens"] if not ways else []
        limit = f"max_text_tokens = {most} tokens"
        if most < self.max_text_tokens:
            taken = f"{len(images)} {'image takes' if len(images) == 1 else 'images take'} {shown}, " * bool(images)
            left = f"{max(0, most)} ({taken}an answer up to {room})"
            limit = f"what is left of the model's {self.positions} positions, {left}"
        first_and_last = [*pieces[:3], *pieces[-2:]]
        if lists_items(pieces) and len(self._ids(first_and_last, (), "")) <= most:
            return (
                f"a prompt lists so long a history that the first letters of its {len(pieces) // 2} texts are over "
                f"{limit}; {', or '.join([SHORTER_HISTORY, *ways])}"
            )
        return f"a prompt's fixed wording, {ids} tokens, is over {limit}; {', or '.join(ways)}"

    def image(self, path: Path) -> ImageInput:
        """Return the image at `path` as the model takes it; the same bytes are preprocessed once.

        Raises:
            UserError: The processor refuses it (Qwen-VL's: one that is 200 times as long as it is wide).
        """
        key = image_digest(path)
        return self._images.get(key, lambda: self._processed(key, path))

    def _processed(self, key: str, path: Path) -> ImageInput:
        assert self.processor is not None
        options = {"return_tensors": "pt", "add_special_tokens": False}
        try:
            batch = self.processor(images=[open_image(path)], text=[self.image_token], **options)
        except REFUSALS as error:
            raise UserError(
                f"{path}: the model's image processor refuses it ({error}); mend or remove the image"
            ) from error
        found = batch["input_ids"][0].tolist()
        if self.architecture.bos_behind_image:  # that is the prompt's, not the image's
            mark = self.tokenizer.convert_tokens_to_ids(self.image_token)
            found = [token for token in found if token == mark]
        ids, before, behind = self._plain.stripped(found)
        tensors = {name: value for name, value in batch.items() if name not in _NOT_IMAGE_INPUTS}
        return ImageInput(key, ids, tensors, before, behind)

    def _expanded(self, ids: Sequence[int], images: Sequence[ImageInput]) -> tuple[int, ...]:
        """Return `ids` with the n-th image token replaced by what the n-th image expands to."""
        if not images:
            return tuple(ids)
        mark = self.tokenizer.convert_tokens_to_ids(self.image_token)
        if (shown := ids.count(mark)) != len(images):
            raise UserError(
                f"the model's chat template shows {shown} images of {len(images)}; mend it, or set use_image: false"
            )
        rest, out = iter(images), list[int]()
        for token in ids:
            out += next(rest).ids if token == mark else (token,)
        return tuple(out)


def longest_text(pieces: Sequence[str]) -> int | None:
    """Return the place of the longest filled-in text in a prompt's `pieces`; None where each is as short as can be."""
    longest = max(range(1, len(pieces), 2), key=lambda i: len(pieces[i]), default=0)
    return longest if longest and len(pieces[longest]) > FEWEST else None


def lists_items(pieces: Sequence[str]) -> bool:
    """Whether a prompt's `pieces` are a list of a history's items, which a shorter history would shorten."""
    return len(pieces) // 2 > _ONE_QUESTION


def image_bytes(image: ImageInput) -> int:
    """Return how much memory an image takes as the vision tower reads it."""
    return sum(tensor.nbytes for tensor in image.tensors.values())


@dataclass(frozen=True, slots=True)
class AnswerTokens:
    """The tokens of Yes and No as they follow a prompt; the first of each, which must differ, is what is scored."""

    yes: tuple[int, ...]
    no: tuple[int, ...]


def answer_tokens(encoder: Encoder, yes: str, no: str) -> AnswerTokens:
    """Read the answers' tokens off a tokenised prompt with answer, where they stand in context.

    Raises:
        UserError: The two answers share their first token, or tokenising them changes the prompt's own tokens.
    """
    question = Prompt("A question? Answer Yes or No.")
    before = encoder(question).ids
    tails = []
    for answer in (yes, no):
        whole = encoder(question, answer).ids
        if whole[: len(before)] != before or len(whole) == len(before):
            raise UserError(
                f"the tokeniser joins the answer {answer!r} with the prompt before it; choose other answer words"
            )
        tails.append(whole[len(before) :])
    if tails[0][0] == tails[1][0]:
        token = encoder.tokenizer.convert_ids_to_tokens(tails[0][0])
        raise UserError(
            f"the answers {yes!r} and {no!r} begin with the same token {token!r}; choose other answer words"
        )
    return AnswerTokens(*tails)


class PlainText:
    """Tokenises rendered prompts so that a special token's spelling inside a title or summary stays plain text.

    A filled-in text is cut inside every such spelling (those of special tokens, and of added ones that look like tags),
    and the parts are tokenised apart. Text that needs no cut is tokenised in one piece, as the model's own processor
    does it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        named = {str(w): int(tokenizer.convert_tokens_to_ids(w)) for w in tokenizer.all_special_tokens}
        flagged = {int(i): bool(token.special) for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
        added = {str(w): int(i) for w, i in tokenizer.get_added_vocab().items() if flagged.get(i, True) or _is_tag(w)}
        # Runs of white space are tokens of their own (Gemma), and as harmless in a title as any letter
        special = {word: i for word, i in (added | named).items() if word.replace(_SPACE, "").strip()}
        self._ids = frozenset(special.values())
        # special ones of one letter, which cannot be cut in two: they are tokenised apart, as no special token
        self._letters = {word for word in special if len(word) == 1}
        # longest first, as one may hold another
        self.spellings = sorted({word for word in {*special, IMAGE} if len(word) > 1}, key=lambda w: (-len(w), w))
        self._pattern = re.compile("|".join(map(re.escape, self.spellings)))
        letters = "|".join(map(re.escape, sorted(self._letters))) or "(?!)"
        self._letter = re.compile(f"{CUT}(?:{letters}){CUT}|({letters})")
        self._warned = False
        self._anchor = self._encode(_ANCHOR)
        # the ids the tokeniser puts before a text by itself
        bare, whole = self._encode("a"), list(tokenizer("a")["input_ids"])
        self.start = next((whole[:n] for n in range(len(whole)) if whole[n : n + len(bare)] == bare), [])

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

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
        if found and not self._warned:
            self._warned = True
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
