"""From a prompt to token ids: chat template, plain-text guard, truncation, images expanded to placeholder tokens."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
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
IMAGE_BYTES = 2**28  # of preprocessed images: LLaVA-NeXT's take 7 MB each, of no use once their features are there
_LETTERS = 64  # a token spells at most; a text of megabytes takes a minute to be shortened in steps
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
    """Turns prompts into `Encoded` for one model; images are preprocessed once each.

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
    chat: ChatTemplate = field(init=False)

    def __post_init__(self) -> None:
        self._images = ByteCache(lambda: IMAGE_BYTES, image_bytes)
        self._plain = PlainText(self.tokenizer)
        behind = self.architecture.bos_behind_image
        self.chat = ChatTemplate(self.tokenizer, self.processor, self.image_token, bos_behind_image=behind)

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
        if prompt.images and self.architecture.attends_across:
            raise UserError(
                "models that attend to images in layers of their own (Llama-3.2-Vision) read none here; take another "
                "backbone (docs/backbones.md) or a server, or set use_image: false and item_summary: text or none"
            )
        images, room = tuple(self.image(path) for path in prompt.images), max(room, ROOM)
        bound = self.max_text_tokens * _LETTERS
        pieces = [shorter(text, bound) if place % 2 else text for place, text in enumerate(prompt.pieces())]
        ids = self._ids(pieces, images, answer, prompt.system)
        seen = sum(len(image.ids) - 1 for image in images)  # beside its mark, which is among the text's
        most = min(self.max_text_tokens, self.positions - seen - room)
        self.truncated += len(ids) > most
        while len(ids) > most:
            if (longest := longest_text(pieces)) is None:
                raise UserError(self._too_long(pieces, len(ids), most))
            text = pieces[longest]
            tokens = max(1, len(self._plain.ids(self._plain.guard(text))))
            left = min(len(text) - 1, int(len(text) * max(0, tokens - len(ids) + most) / tokens))
            # half the text at most in one step: another may have become the longest by then
            pieces[longest] = shorter(text, max(FEWEST, left, len(text) // 2))
            ids = self._ids(pieces, images, answer, prompt.system)
        return Encoded(self._expanded(ids, images), images)

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of a text by itself, not of a question; no special token but the tokeniser's own in front."""
        text = text[: self.max_text_tokens * _LETTERS]
        ids, _ = self._read(lambda guard: guard(text))
        return [*self._plain.start, *ids][: min(self.max_text_tokens, self.positions)]

    def _ids(self, pieces: Sequence[str], images: Sequence[ImageInput], answer: str, system: str) -> list[int]:
        """Return ids with one image token an image; what is filled in holds no special token."""
        marks = [f"{image.before}{self.image_token}{image.behind}" for image in images]

        def rendered(guard: Callable[[str], str]) -> str:
            guarded = [guard(piece) if i % 2 else piece.replace(IMAGE, _MARK) for i, piece in enumerate(pieces)]
            parts = self.chat.render("".join(guarded).split(_MARK), answer, system).split(self.image_token)
            if len(parts) != len(marks) + 1:  # refused where images are expanded
                return self.image_token.join(parts)
            return "".join(part + mark for part, mark in zip_longest(parts, marks, fillvalue=""))

        ids, text = self._read(rendered)
        # the ids the tokeniser puts in front by itself (<s>), where a processor's or a bare text lacks them
        begin = self.tokenizer.bos_token
        whole = (self.chat.template and self.processor is None) or (begin and text.startswith(begin))
        return ids if whole else self._plain.start + ids

    def _read(self, rendered: Callable[[Callable[[str], str]], str]) -> tuple[list[int], str]:
        """Return the ids of a text with guarded parts, and it; letter by letter where a special token breaks out."""
        ids = self._plain.ids(text := rendered(self._plain.guard))
        if self._plain.broken(ids, text):
            ids = self._plain.ids(rendered(partial(self._plain.guard, every=True)))
        return ids, text

    def _too_long(self, pieces: Sequence[str], tokens: int, most: int) -> str:
        """Say what helps where nothing is left to cut: a shorter history or room for the rest."""
        limit, help_ = f"max_text_tokens = {most} tokens", "raise max_text_tokens"
        if most < self.max_text_tokens:
            limit = f"the {max(0, most)} that images and an answer leave of the model's {self.positions} positions"
            help_ = f"lower *_summary_tokens, show smaller images, or take a model with more than {self.positions}"
        what = f"a prompt's fixed wording, {tokens} tokens, is"
        if lists_items(pieces):
            what = f"a prompt lists so long a history that the first letters of its {len(pieces) // 2} texts are"
            help_ = f"{SHORTER_HISTORY}, or {help_}"
        return f"{what} over {limit}; {help_}"

    def image(self, path: Path) -> ImageInput:
        """Return the image at `path` as the model takes it; the same bytes are preprocessed once.

        Raises:
            UserError: The processor refuses it (Qwen-VL's: one that is 200 times as long as it is wide).
        """
        key = image_digest(path)
        return self._images.get(key, lambda: self._processed(key, path))

    def _processed(self, key: str, path: Path) -> ImageInput:
        processor: Any = self.processor
        try:
            batch = processor(
                images=[open_image(path)], text=[self.image_token], return_tensors="pt", add_special_tokens=False
            )
        except REFUSALS as error:
            raise UserError(
                f"{path}: the model's image processor refuses it ({error}); fix or remove the image"
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
                f"the model's chat template shows {shown} images of {len(images)}; fix it, or set use_image: false"
            )
        rest, out = iter(images), list[int]()
        for token in ids:
            out += next(rest).ids if token == mark else (token,)
        return tuple(out)


def longest_text(pieces: Sequence[str]) -> int | None:
    """Return the place of the longest filled-in text in a prompt's `pieces`; None where each is as short as can be."""
    longest = max(range(1, len(pieces), 2), key=lambda i: len(pieces[i]), default=0)
    return longest if longest and len(pieces[longest]) > FEWEST else None


def shorter(text: str, length: int) -> str:
    """Return at most `length` characters of a filled-in text: its beginning.

    Of titles that stand for a preference, the one text of several lines, these are its first line and the newest.
    """
    if len(text) <= length:
        return text
    head, *lines = text.split("\n")
    left = length - len(head) - sum(len(line) + 1 for line in lines)
    gone = 0
    while left < 0 and gone < len(lines) - 1:
        left += len(lines[gone]) + 1
        gone += 1
    return "\n".join([head, *lines[gone:]])[:length].rstrip()


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
        # Runs of white space are tokens of their own (Gemma), and as harmless in a title as a special token of one
        # letter, which cannot be cut in two
        special = {w: i for w, i in (added | named).items() if len(w) > 1 and w.replace(_SPACE, "").strip()}
        self._ids = frozenset(special.values())
        self.spellings = sorted({*special, IMAGE}, key=lambda w: (-len(w), w))  # as one may hold another
        self._pattern = re.compile("|".join(map(re.escape, self.spellings)))
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
        # again, as what a cut leaves may spell another: <<a> is < and <a>
        while (cut := self._pattern.sub(lambda found: f"{found[0][0]}{CUT}{found[0][1:]}", text)) != text:
            text = cut
        return text

    def ids(self, text: str) -> list[int]:
        """Return the ids of `text`, its parts between cuts tokenised apart."""
        first, *rest = text.split(CUT)
        ids, n = self._encode(first), len(self._anchor)
        for part in filter(None, rest):
            behind = self._encode(_ANCHOR + part)
            ids += behind[n:] if behind[:n] == self._anchor else self._encode(part)
        return ids

    def broken(self, ids: Sequence[int], text: str) -> bool:
        """Whether `ids` hold more special tokens than `text` spells between cuts.

        A tokeniser may fold letters (full-width ones, say) before it looks for its tokens; no spelling shows that.
        """
        found = sum(token in self._ids for token in ids) > len(self._pattern.findall(text))
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
    return not all(letter.isalnum() or letter.isspace() or letter == _SPACE or combining(letter) for letter in word)
