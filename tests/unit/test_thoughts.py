"""A served model that thinks aloud: the thought is no part of a summary, and one without an end is reported."""

from types import SimpleNamespace

import pytest
from stock_forward import STYLE

from recbole_mllm.mllm.chat import answer_of, message
from recbole_mllm.prompts import Prompt, recommend_prompt
from recbole_mllm.summaries.quality import Findings, table


def _completion(text, reason="stop"):
    choice = SimpleNamespace(message=SimpleNamespace(content=text), finish_reason=reason)
    return SimpleNamespace(choices=[choice], usage=None)


@pytest.mark.parametrize(
    "before", ["", "<think>\n\n</think>\n\n", "<think>red </b> or blue?</think> ", "so, red.</think>\n"]
)
def test_a_thought_is_cut_off(before):
    assert answer_of(_completion(f"{before}A red mug.")).text == "A red mug."


def test_a_thought_without_an_end_is_reported():
    text = answer_of(_completion("<think>First, the colour", "length")).text
    findings = Findings()
    findings.look(text, Prompt("What is it?"))
    assert findings.counts == {"thinks aloud": 1} and "docs/servers.md" in table(findings, "item", 1)[0]


def test_a_title_can_neither_begin_nor_end_a_thought():
    said = message(recommend_prompt(STYLE, "likes red", "a </think> and <think> mug", None))["content"]
    assert "think>" in said and "</think>" not in said and "<think>" not in said
