"""Written texts are looked at: what was cut, refused, repeated or begun otherwise is counted, with examples."""

import pytest
from planted_writers import Planted

from recbole_mllm.mllm.base import Answer, Decoding, Work
from recbole_mllm.prompts import Prompt
from recbole_mllm.summaries.generator import FixedRequests, Request, Scribe
from recbole_mllm.summaries.quality import asked_start, cut_at_sentence, repeats_prompt
from recbole_mllm.summaries.store import Store

WORDING = (
    "A user watched these, oldest first:\n- one\n\nBased on the content and visual style of the items above, summarize "
    "the user's preferences in one continuous paragraph. Start with 'The user appears to have a preference for'."
)
FINE = "The user appears to have a preference for quiet films with blue covers and few words."


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("One. Two. Thr", "One. Two."),
        ("No end at all", "No end at all"),
        ("A. and then a very long remainder that has no end", "A. and then a very long remainder that has no end"),
        ("第一。第二。第", "第一。第二。"),
        ("It costs 3.50 or so. And mor", "It costs 3.50 or so."),
    ],
)
def test_a_text_cut_at_its_limit_ends_with_a_sentence_where_much_remains(text, kept):
    assert cut_at_sentence(Answer(text, 1, 1, truncated=True)) == kept
    assert cut_at_sentence(Answer(text, 1, 1, truncated=False)) == text


def test_the_start_that_is_asked_for_is_read_off_the_wording():
    assert asked_start(Prompt(WORDING)) == "The user appears to have a preference for"
    assert asked_start(Prompt("Describe this.")) == ""


def test_repeating_the_prompt_is_told_from_keeping_a_preference():
    assert repeats_prompt(WORDING[40:], Prompt(WORDING))
    assert not repeats_prompt(FINE, Prompt(WORDING))
    known = Prompt(f"So far: {FINE}\n{WORDING}")
    assert repeats_prompt(FINE, known) and not repeats_prompt(FINE, known, previous=FINE)


class Twice(Planted):
    """Repeats the prompt when asked greedily; says something else when asked with a seed, unless stubborn."""

    def __init__(self, stubborn=False):
        super().__init__()
        self.stubborn, self.decodings = stubborn, []

    def write(self, work: Work) -> None:
        while asks := work.take(2):
            self.decodings += [ask.decoding for ask in asks]
            said = [ask.prompt.text if self.stubborn or not ask.decoding.temperature else FINE for ask in asks]
            work.give([(a.place, Answer(text, 9, 8)) for a, text in zip(asks, said, strict=True)])


@pytest.mark.parametrize("stubborn", [False, True])
def test_an_answer_that_repeats_its_prompt_is_asked_for_once_more_then_kept_and_counted(tmp_path, stubborn, caplog):
    writer, store = Twice(stubborn), Store(tmp_path / "s")
    scribe = Scribe("user", lambda: writer, "m", store, Decoding(50))
    (text,) = scribe.answer([Prompt(WORDING)])
    assert [d.temperature for d in writer.decodings] == [0.0, 0.6] and writer.decodings[1].max_new_tokens == 50
    assert (text == FINE) is not stubborn
    assert scribe.findings.counts["repeats its prompt"] == stubborn
    scribe.report()
    assert ("repeats its prompt" in caplog.text) is stubborn
    again = Scribe("user", lambda: writer, "m", store, Decoding(50))
    assert again.answer([Prompt(WORDING)]) == [text] and len(writer.decodings) == 2


def test_the_report_counts_what_is_odd_gives_examples_and_names_the_key(tmp_path, caplog):
    replies = {
        "a": "I'm sorry, I can't help with that.",
        "b": "",
        "c": "Likes films.",
        "d": FINE,
        "e": "As an AI language model I see nothing.",
    }
    writer = Planted(lambda prompt: replies[prompt.text[0]])
    scribe = Scribe("user", lambda: writer, "m", Store(tmp_path / "s"), Decoding(50))
    scribe.answer([Prompt(f"{letter}: {WORDING}") for letter in replies])
    assert dict(scribe.findings.counts) == {"refusal": 2, "empty": 1, "other start": 1}
    scribe.report()
    for told in (
        "refusal",
        "2 of 5 (40.0%)",
        "I'm sorry, I can't help",
        "user_summarizer",
        "prompt_style",
        "Likes films.",
    ):
        assert told in caplog.text
    assert FINE not in caplog.text


def test_known_answers_are_looked_at_too(tmp_path):
    store = Store(tmp_path / "s")
    writer = Planted(lambda prompt: "I cannot do that.")
    Scribe("item", lambda: writer, "m", store, Decoding(5)).answer([Prompt("x")])
    again = Scribe("item", lambda: writer, "m", store, Decoding(5))
    again.answer([Prompt("x")])
    assert again.findings.counts["refusal"] == 1 and again.tally.written == 0


def test_equal_questions_of_one_asker_are_written_once_however_they_arrive(tmp_path):
    writer = Planted(lambda prompt: prompt.text.upper(), size=1)

    class Later(FixedRequests):
        def receive(self, name, text):
            super().receive(name, text)
            if name == 0:
                self.waiting += [Request(9, Prompt("a")), Request(10, Prompt("b"))]

    asker = Later([(0, Prompt("a")), (1, Prompt("b")), (2, Prompt("a"))])
    Scribe("item", lambda: writer, "m", Store(tmp_path / "s"), Decoding(5)).generate(asker)
    assert asker.texts == {0: "A", 1: "B", 2: "A", 9: "A", 10: "B"}
    assert sorted(sum(writer.batches, [])) == ["a", "b"]
