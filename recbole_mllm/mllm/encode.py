"""From a prompt to token ids: chat template, plain-text guard, truncation, images expanded to placeholder tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recbole_mllm.data.images import image_digest, open_image
from recbole_mllm.errors import UserError
from recbole_mllm.mllm.architectures import Architecture
from recbole_mllm.mllm.plaintext import CUT, PlainText
from recbole_mllm.mllm.processors import REFUSALS
from recbole_mllm.mllm.shortening import FEWEST, SHORTER_HISTORY, first_and_last, lists_items, longest_text
from recbole_mllm.mllm.turns import Turns
from recbole_mllm.prompts import IMAGE, Prompt

_MARK = f"{CUT}{IMAGE}{CUT}"  # an image of the style's own, in a text whose filled-in parts are guarded
# Of preprocessed images: LLaVA-NeXT's take 7 MB each, and are of no use once their features are made
IMAGE_BYTES = 2**28
# Characters a token spells, at most, of any text met in the wild: what lies beyond the limit by this is cut at once, as
# a text of megabytes takes a minute to be shortened in steps
_LETTERS = 64
ROOM = 48  # positions kept for what is written behind a prompt, where it is not said how much that may be
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
    `positions`, which the model has.
    """

    tokenizer: Any
    processor: Any | None
    max_text_tokens: int
    architecture: Architecture = field(default_factory=Architecture)
    positions: int = 10**9
    truncated: int = 0
    _images: OrderedDict[str, ImageInput] = field(default_factory=OrderedDict)
    _bytes: int = 0
    _plain: PlainText = field(init=False)
    turns: Turns = field(init=False)

    def __post_init__(self) -> None:
        self._plain = PlainText(self.tokenizer)
        behind = self.architecture.bos_behind_image
        self.turns = Turns(self.tokenizer, self.processor, self.image_token, bos_behind_image=behind)

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

        Its longest texts are shortened until it fits, with `room` positions left for what is written behind it.

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
        if len(ids) > most:
            self.truncated += 1
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
        return self._start(rendered) + ids

    def _start(self, rendered: str) -> list[int]:
        """Return the ids the tokeniser puts in front by itself (<s>), where a processor's or a bare text lacks them."""
        begin = self.tokenizer.bos_token
        if (self.turns.templated and self.processor is None) or (begin and rendered.startswith(begin)):
            return []
        return self._plain.start

    def _dressed(self, rendered: str, images: Sequence[ImageInput]) -> str:
        """Return `rendered` with each image's own surrounding text at its mark."""
        if not any(image.before or image.behind for image in images):
            return rendered
        parts = rendered.split(self.image_token)
        marks = [f"{image.before}{self.image_token}{image.behind}" for image in images]
        return "".join(part + mark for part, mark in zip_longest(parts, marks, fillvalue=""))

    def render(self, guarded: Sequence[str], answer: str) -> str:
        """Return the conversation as the chat template writes it; without a template, the bare text."""
        return self.turns.render("".join(guarded).split(_MARK), answer)

    def _shorten(self, pieces: list[str], excess: int) -> bool:
        """Take about `excess` tokens from the end of the longest filled-in text; return whether there is one."""
        if (longest := longest_text(pieces)) is None:
            return False
        text = pieces[longest]
        tokens = max(1, len(self._plain.ids(self._plain.guard(text))))
        kept = min(len(text) - 1, int(len(text) * max(0, tokens - excess) / tokens))
        # half the text at most in one step: another may have become the longest by then
        pieces[longest] = text[: max(FEWEST, kept, len(text) // 2)].rstrip()
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
        if lists_items(pieces) and len(self._ids(first_and_last(pieces), (), "")) <= most:
            return (
                f"a prompt lists so long a history that the first letters of its {len(pieces) // 2} texts are over "
                f"{limit}; {', or '.join([SHORTER_HISTORY, *ways])}"
            )
        return f"a prompt's fixed wording, {ids} tokens, is over {limit}; {', or '.join(ways)}"

    def image(self, path: Path) -> ImageInput:
        """Return the image at `path` as the model takes it; the same bytes are preprocessed once."""
        key = image_digest(path)
        if key in self._images:
            self._images.move_to_end(key)
        else:
            assert self.processor is not None
            batch = self._processed(path)
            tensors = {name: value for name, value in batch.items() if name not in _NOT_IMAGE_INPUTS}
            found = batch["input_ids"][0].tolist()
            if self.architecture.bos_behind_image:  # that is the prompt's, not the image's
                mark = self.tokenizer.convert_tokens_to_ids(self.image_token)
                found = [token for token in found if token == mark]
            ids, before, behind = self._plain.stripped(found)
            self._images[key] = ImageInput(key, ids, tensors, before, behind)
            self._bytes += image_bytes(self._images[key])
            while self._bytes > IMAGE_BYTES and len(self._images) > 1:
                self._bytes -= image_bytes(self._images.popitem(last=False)[1])
        return self._images[key]

    def _processed(self, path: Path) -> Any:
        """Return what the processor makes of an image alone.

        Raises:
            UserError: It refuses the image (Qwen-VL's: one that is 200 times as long as it is wide).
        """
        picture, options = open_image(path), {"return_tensors": "pt", "add_special_tokens": False}
        try:
            return self.processor(images=[picture], text=[self.image_token], **options)  # type: ignore[misc]
        except REFUSALS as error:
            raise UserError(
                f"{path}: the model's image processor refuses it ({error}); mend or remove the image"
            ) from error

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
    probe = Prompt("A question? Answer Yes or No.")
    asked = encoder(probe).ids
    tails = []
    for answer in (yes, no):
        whole = encoder(probe, answer).ids
        if whole[: len(asked)] != asked or len(whole) == len(asked):
            raise UserError(
                f"the tokeniser joins the answer {answer!r} with the prompt before it; choose other answer words"
            )
        tails.append(whole[len(asked) :])
    first = [tail[0] for tail in tails]
    if first[0] == first[1]:
        token = encoder.tokenizer.convert_ids_to_tokens(first[0])
        raise UserError(
            f"the answers {yes!r} and {no!r} begin with the same token {token!r}; choose other answer words"
        )
    return AnswerTokens(tails[0], tails[1])


def pad(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Return ``[B, T]`` ids (int64) and their ``[B, T]`` attention mask (int64), padded on the right."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), value, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = 1
    return ids, mask


def image_bytes(image: ImageInput) -> int:
    """Return how much memory an image takes as the vision tower reads it."""
    return sum(tensor.nbytes for tensor in image.tensors.values())
