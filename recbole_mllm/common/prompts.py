"""What is said to a model: styles are data, filling them in is pure, training and scoring call the same function."""

from __future__ import annotations

import os
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from recbole_mllm.common.errors import UserError, did_you_mean
from recbole_mllm.common.resources import named, resource
from recbole_mllm.common.yaml_files import read_mapping

IMAGE = "<image>"
# Private-use characters that no title can hold (``data.atomic.clean`` removes them). They mark where text that is not
# the style's own begins and ends, so that the MLLM's side can shorten it, and keep a special token in it plain text.
OPEN, CLOSE = "\ue001", "\ue002"
_PIECES = re.compile(f"{OPEN}(.*?){CLOSE}", re.DOTALL)
_QUESTION = {"preference", "title"}
_FIELDS: dict[str, set[str]] = {  # of each wording; of those not named here, none
    "text_summary": {"title"},
    "text_summary_length": {"words"},
    "fused_summary": {"image", "text"},
    "item_line": {"title", "summary"},
    "item_line_bare": {"title"},
    "first_block": {"items"},
    "next_block": {"preference", "items"},
    "titles": {"titles"},
    "recommend_item_first": _QUESTION,
    "recommend_item_first_without_image": _QUESTION,
    "recommend_user_first": _QUESTION,
    "recommend_user_first_without_image": _QUESTION,
}
_OPTIONAL = ("text_summary_length", "recommend_system")
_SHOW_AN_IMAGE = ("image_summary", "recommend_item_first", "recommend_user_first")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question to an MLLM: text with one ``<image>`` mark for each image.

    `marked` is the text with titles, summaries and preferences between `OPEN` and `CLOSE`; ``<image>`` there is none.
    `system` is what a system message says before it; "" is none.
    """

    marked: str
    images: tuple[Path, ...] = ()
    system: str = ""

    def __post_init__(self) -> None:
        marks = _PIECES.sub("", self.marked).count(IMAGE)
        if marks != len(self.images):
            raise ValueError(f"{marks} {IMAGE} marks for {len(self.images)} images: {self.marked!r}")

    @property
    def text(self) -> str:
        """The text as a person reads it."""
        return unmark(self.marked)

    def pieces(self) -> list[str]:
        """Return the text cut into the style's own words (even places) and the filled-in texts (odd places)."""
        return _PIECES.split(self.marked)


@dataclass(frozen=True, slots=True)
class Style:
    """The wording of every question, read from ``properties/prompt/<style>.yaml``."""

    name: str
    image_summary: str
    text_summary: str
    fused_summary: str
    item_line: str
    item_line_bare: str
    first_block: str
    next_block: str
    titles: str
    cold: str
    recommend_item_first: str
    recommend_item_first_without_image: str
    recommend_user_first: str
    recommend_user_first_without_image: str
    answer_yes: str
    answer_no: str
    text_summary_length: str = ""
    recommend_system: str = ""

    @classmethod
    def from_mapping(cls, name: str, wording: Mapping[str, Any], path: Path | None = None) -> Self:
        """Check that every wording is there, is text, and names only the fields it is filled with, as plain {field}.

        Raises:
            UserError: A wording is missing, unknown, not text, or names another field, or one with a format; the file
                at `path`, if any, is named.
        """
        where = str(path) if path else f"prompt style {name!r}"
        known = {f.name for f in fields(cls)} - {"name"}
        wording = dict.fromkeys(_OPTIONAL, "") | dict(wording)
        for key in wording.keys() - known:
            raise UserError(f"{where}: there is no wording {key!r}; {did_you_mean(key, known, 'see docs/prompts.md')}")
        if missing := sorted(known - wording.keys()):
            raise UserError(f"{where}: missing wording {', '.join(missing)}; see docs/prompts.md")
        for key, text in wording.items():
            if (text or key not in _OPTIONAL) and (wrong := _wrong(key, text)):
                raise UserError(f"{where}: {key} {wrong}")
        return cls(name=name, **{key: text.strip("\n") for key, text in wording.items()})


def read_style(name: str) -> Style:
    """Return the style called `name`: one in properties/prompt, or a YAML file's path.

    Raises:
        UserError: There is none, or it is not complete.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else resource("prompt", name)
    if path is None or not path.is_file():
        what = "no file" if path is not None and os.path.lexists(path) else "unknown"
        raise UserError(f"prompt_style {name!r} is {what}; give a YAML file or one of {', '.join(named('prompt'))}")
    return Style.from_mapping(path.stem, read_mapping(path), path)


def _wrong(key: str, text: Any) -> str:
    """Return what is wrong with a wording; "" for nothing."""
    fields_of, marks, names = _FIELDS.get(key, set()), int(key in _SHOW_AN_IMAGE), set[str]()
    wanted = ", ".join(f"{{{name}}}" for name in sorted(fields_of)) or "no field"
    try:
        for _, name, form, conversion in string.Formatter().parse(text):
            if name is not None and (form or conversion or not name.isidentifier()):
                field = f"{{{name}{'!' + conversion if conversion else ''}{':' + form if form else ''}}}"
                return f"holds {field}; write plain {{field}} alone, with {wanted} in it"
            names |= {name} if name is not None else set()
    except ValueError as error:
        return f"holds unpaired braces ({error}; a brace that is meant is written twice)"
    except TypeError:
        names = {""}
    if names != fields_of:
        return f"must be a text with {wanted} in it; see docs/prompts.md"
    if text.count(IMAGE) != marks:
        return f"must hold {marks} {IMAGE}; see docs/prompts.md"
    return "holds a private-use character (U+E001 or U+E002); remove it" if OPEN in text or CLOSE in text else ""


def unmark(text: str) -> str:
    """Return `text` without the marks around filled-in texts."""
    return text.replace(OPEN, "").replace(CLOSE, "")


def _fill(template: str, **texts: str) -> str:
    return template.format(**{name: f"{OPEN}{unmark(text)}{CLOSE}" for name, text in texts.items()})


def image_summary_prompt(style: Style, image: Path) -> Prompt:
    """Ask what the item's image shows (the paper's item image summary)."""
    return Prompt(style.image_summary, (image,))


def text_summary_prompt(style: Style, title: str, words: int | None = None) -> Prompt:
    """Ask for a summary of the item's text (the paper's item text summary), of about as many `words` if any."""
    asked = style.text_summary_length.format(words=words) if words and style.text_summary_length else ""
    return Prompt(_fill(style.text_summary, title=title) + asked)


def fused_summary_prompt(style: Style, image: str, text: str) -> Prompt:
    """Ask to fuse the summaries of image and text into one (the paper's fusion prompt)."""
    return Prompt(_fill(style.fused_summary, image=image, text=text))


def item_line(style: Style, title: str, summary: str) -> str:
    """Return how one item of a history reads; without a summary its title stands alone."""
    return _fill(style.item_line if summary else style.item_line_bare, title=title, summary=summary)


def preference_prompt(style: Style, lines: Sequence[str], previous: str | None) -> Prompt:
    """Ask for the preference behind `lines` (from `item_line`, oldest first), given the `previous` one if any."""
    items = "\n".join(lines)
    if previous is None:
        return Prompt(style.first_block.format(items=items))
    return Prompt(style.next_block.format(items=items, preference=f"{OPEN}{unmark(previous)}{CLOSE}"))


def titles_as_preference(style: Style, titles: Sequence[str]) -> str:
    """Return what stands for the preference under ``summary_mode: none``: the titles themselves, oldest first."""
    return _fill(style.titles, titles="\n".join(titles)) if titles else style.cold


def recommend_prompt(
    style: Style, preference: str, title: str, image: Path | None, *, item_first: bool = True
) -> Prompt:
    """Ask whether the user would take the item; training and scoring both call this.

    Without an image the wording speaks of none, the same in training and scoring.
    """
    order = "recommend_item_first" if item_first else "recommend_user_first"
    template = getattr(style, order if image else f"{order}_without_image")
    marked = _fill(template, preference=preference, title=title)
    return Prompt(marked, (image,) if image else (), style.recommend_system)
