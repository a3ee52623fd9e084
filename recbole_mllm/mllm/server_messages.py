"""From a prompt to an OpenAI-style chat message, and from a completion to an answer."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.prompts import CLOSE, IMAGE, OPEN, Prompt
from recbole_mllm.data.images import open_image
from recbole_mllm.mllm.encoder import FEWEST, SHORTER_HISTORY, lists_items, longest_text, shorter
from recbole_mllm.mllm.interface import MOST_CHARACTERS, Answer

# A server tokenises the whole text, so a special token's spelling inside a title would become that token (and an image
# mark without an image an error). A space behind its first character keeps it plain text.
_SPECIAL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:image|video|audio|pad|unk|bos|eos|mask)>|"
    r"<(?:start|end)_of_\w{1,20}>|<\w{1,20}_soft_token>|</?think>"
)
_RERANKED = ("<Instruct>: ", "<Query>:", "\n<Document>:")  # in the wording of a style for rerankers
_AS_IS = {"JPEG": "image/jpeg", "PNG": "image/png"}
_ORIENTATION = 0x0112
_MOST_TOKENS = 2**31


def messages(prompt: Prompt, shortened: int = 0) -> list[dict[str, Any]]:
    """Return the system's turn, if the prompt has one, and the user's: plain text, or text and images in their order.

    `shortened` halves the longest filled-in text that many times (a server that finds the prompt too long).
    """
    system = [{"role": "system", "content": prompt.system}] if prompt.system else []
    return [*system, {"role": "user", "content": _content(_guarded(prompt, shortened), iter(prompt.images))}]


def query_and_document(prompt: Prompt, shortened: int = 0) -> tuple[str, Any, Any]:
    """Return a reranker's instruction, query and document, the last two as a text or as parts with an image.

    Raises:
        UserError: The prompt's style does not name the three.
    """
    found = _guarded(prompt, shortened, *_RERANKED).split(OPEN)
    if len(found) != len(_RERANKED) + 1 or found[0]:
        raise UserError(
            "server_scoring: rerank needs a prompt_style with <Instruct>, <Query> and <Document>, such as "
            "qwen3-vl-reranker; or set server_scoring: chat"
        )
    images = iter(prompt.images)
    return found[1], _content(found[2], images), _content(found[3], images)


def _guarded(prompt: Prompt, shortened: int, *fields: str) -> str:
    """Return the text with `CLOSE` for each image and `OPEN` for each of `fields`; none stands in a filled-in text."""
    pieces = cut(prompt, shortened)
    for place, piece in enumerate(pieces):
        if place % 2:
            pieces[place] = _SPECIAL.sub(lambda found: f"{found[0][0]} {found[0][1:]}", piece)
        else:
            for field in fields:
                piece = piece.replace(field, OPEN)
            pieces[place] = piece.replace(IMAGE, CLOSE)
    return "".join(pieces)


def _content(text: str, images: Iterator[Path]) -> Any:
    """Return a text, or parts where an image's place is marked in it; `images` are taken in their order."""
    head, *tails = text.split(CLOSE)
    parts: list[dict[str, Any]] = [{"type": "text", "text": head}]
    for tail in tails:
        parts += [{"type": "image_url", "image_url": {"url": data_url(next(images))}}, {"type": "text", "text": tail}]
    return [part for part in parts if part["type"] != "text" or part["text"]] if tails else text


def cut(prompt: Prompt, times: int) -> list[str]:
    """Return the prompt's pieces, the longest filled-in text halved that many `times`.

    Raises:
        UserError: What is left is the style's own wording.
    """
    pieces = prompt.pieces()
    for _ in range(times):
        if (longest := longest_text(pieces)) is None:
            what, advice = "fixed wording", ""
            if lists_items(pieces):
                what, advice = f"the first letters of the {len(pieces) // 2} texts it lists", f"{SHORTER_HISTORY}, or "
            raise UserError(
                f"the server finds a prompt too long, and what is left of it is {what}; {advice}serve the model with a "
                "longer context"
            )
        pieces[longest] = shorter(pieces[longest], max(FEWEST, len(pieces[longest]) // 2))
    return pieces


def shortened_prompt(prompt: Prompt, times: int) -> Prompt:
    """Return the prompt with its longest filled-in text halved that many `times`."""
    pieces = cut(prompt, times)
    return replace(prompt, marked="".join(f"{OPEN}{one}{CLOSE}" if n % 2 else one for n, one in enumerate(pieces)))


def data_url(path: Path) -> str:
    """Return the image as a data URL: its own bytes where every server reads them as we do, else an upright RGB PNG.

    Raises:
        UserError: It is no image that can be read.
    """
    try:
        with Image.open(path) as image:
            mime = _AS_IS.get(image.format or "")
            plain = (
                image.mode == "RGB" and image.getexif().get(_ORIENTATION, 1) == 1 and "transparency" not in image.info
            )
        upright = open_image(path)  # also refuses what is broken or too large
    except OSError as error:
        raise UserError(f"{path}: no image that can be read ({error}); fix or remove it") from error
    if mime and plain:
        data = path.read_bytes()
    else:
        mime, buffer = "image/png", io.BytesIO()
        upright.save(buffer, "PNG")
        data = buffer.getvalue()
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def tokens(count: Any) -> int:
    """Return a count of tokens that a server tells; 0 for what is none, and what the store could not hold."""
    return int(count) if isinstance(count, int | float) and 0 <= count < _MOST_TOKENS else 0


def answer_of(completion: Any, most_characters: int = MOST_CHARACTERS) -> Answer:
    """Return the text of a chat completion, less what the model thought before it, with its costs if the server tells.

    Raises:
        ValueError: There is no choice in it, or its text has more than `most_characters`.
    """
    choices = getattr(completion, "choices", None)
    if not choices or getattr(choices[0], "message", None) is None:
        said = getattr(completion, "error", None)  # some servers put it into an answer of status 200
        raise ValueError(
            f"the answer holds no choice{f' but {said}' * bool(said)}; is this URL an OpenAI-compatible /v1?"
        )
    text, usage = choices[0].message.content or "", getattr(completion, "usage", None)
    if len(text) > most_characters:
        raise ValueError(f"an answer of {len(text):,} characters, where a summary was asked for")
    return Answer(
        text.rpartition("</think>")[2].strip(),
        tokens(getattr(usage, "prompt_tokens", 0)),
        tokens(getattr(usage, "completion_tokens", 0)),
        choices[0].finish_reason == "length",
    )
