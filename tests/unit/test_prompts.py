"""Prompts: marks are counted, filled-in text cannot pose as a mark, styles refuse to be incomplete."""

from pathlib import Path

import pytest
import yaml

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.prompts import (
    Prompt,
    Style,
    item_line,
    preference_prompt,
    read_style,
    recommend_prompt,
    titles_as_preference,
)
from recbole_mllm.common.resources import PROPERTIES, named

WORDING = yaml.safe_load((PROPERTIES / "prompt" / "demo.yaml").read_text())
STYLE = Style.from_mapping("demo", WORDING)
PNG = Path("a.png")


def test_a_prompt_refuses_a_mark_without_an_image():
    with pytest.raises(ValueError, match="1 <image> marks for 0 images"):
        Prompt("<image> what is it?")


def test_titles_are_plain_text_and_the_wording_without_an_image_speaks_of_none():
    prompt = recommend_prompt(STYLE, "likes <image>", "<image> of a {preference} {0}", None)
    assert prompt.images == () and prompt.text.count("<image>") == 2 and "{preference} {0}" in prompt.text
    assert "<image>" in recommend_prompt(STYLE, "p", "t", PNG).text
    assert "<image>" not in recommend_prompt(STYLE, "p", "t", None).text


def test_order_puts_item_or_user_first():
    first = recommend_prompt(STYLE, "PREF", "TITLE", PNG).text
    second = recommend_prompt(STYLE, "PREF", "TITLE", PNG, item_first=False).text
    assert first.index("TITLE") < first.index("PREF") and second.index("PREF") < second.index("TITLE")


def test_pieces_separate_the_styles_words_from_filled_in_texts():
    lines = [item_line(STYLE, "mug", "red"), item_line(STYLE, "hat", "")]
    pieces = preference_prompt(STYLE, lines, "likes red").pieces()
    assert pieces[1::2] == ["likes red", "mug", "red", "hat"]


def test_titles_stand_for_the_preference_and_none_is_a_cold_start():
    assert titles_as_preference(STYLE, ["a", "b"]).count("a") >= 1
    assert titles_as_preference(STYLE, []) == STYLE.cold


@pytest.mark.parametrize("name", named("prompt"))
def test_every_shipped_style_is_complete(name):
    Style.from_mapping(name, yaml.safe_load((PROPERTIES / "prompt" / f"{name}.yaml").read_text()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first_block": None}, "first_block must be a text"),
        ({"first_block": "no field"}, "first_block must be a text with {items}"),
        ({"image_summary": "no mark"}, "image_summary must hold 1 <image>"),
        ({"extra": "x"}, "there is no wording 'extra'"),
        ({"first_blok": "x"}, "there is no wording 'first_blok'; did you mean first_block"),
        ({"item_line": "{title:>9999} {summary}"}, r"item_line holds {title:>9999}; write plain {field} alone"),
        ({"item_line": "{title!r} {summary}"}, r"item_line holds {title!r}"),
        ({"item_line": "{title.x} {summary}"}, r"item_line holds {title\.x}"),
        ({"item_line": "{title} {summary} {name}"}, r"item_line must be a text with {summary}, {title}"),
        ({"image_summary": "<image> {"}, "image_summary holds unpaired braces"),
        ({"titles": 5}, "titles must be a text with {titles}"),
        ({"cold": "a \ue001 mark"}, "cold holds a private-use character"),
    ],
)
def test_a_style_says_what_is_wrong_with_it(change, message):
    with pytest.raises(UserError, match=message):
        Style.from_mapping("mine", WORDING | change)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"- a list", ":1: it must hold `key: value` lines"),
        (b"", ": missing wording answer_no, "),
        (bytes(range(256)), ":2: it is not UTF-8"),
        (b"titles: x\ntitles: y\n", ":2: it is no valid YAML: titles stands there already, on line 1"),
        (b"cold: {a: b}\n", ": missing wording"),
    ],
)
def test_a_styles_file_is_named_with_what_is_wrong_in_it(tmp_path, text, said):
    path = tmp_path / "mine.yaml"
    path.write_bytes(text)
    with pytest.raises(UserError) as found:
        read_style(str(path))
    assert str(found.value).startswith(f"{path}{said}")


def test_a_style_that_is_not_there_names_those_that_are():
    for name in ("nothing", "nothing.yaml", "../demo"):
        with pytest.raises(UserError, match="is unknown; give a YAML file or one of demo, movie"):
            read_style(name)
