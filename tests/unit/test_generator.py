"""What generates summaries: each text once, stored as it arrives, looked at, retried where it repeats its prompt."""

import threading
import time

import pytest
from planned_server import Planned, serving
from planted_writers import Planted

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.model_names import Endpoint
from recbole_mllm.common.prompts import Prompt
from recbole_mllm.common.settings import ServerSettings
from recbole_mllm.mllm.interface import Answer, Decoding, Work
from recbole_mllm.mllm.server import ServerModel
from recbole_mllm.summaries import store as store_module
from recbole_mllm.summaries.generator import CachedGenerator, FixedRequests, Request
from recbole_mllm.summaries.quality import cut_at_sentence, repeats_prompt
from recbole_mllm.summaries.store import Leases, Store

WORDING = (
    "A user watched these, oldest first:\n- one\n\nBased on the content and visual style of the items above, summarize "
    "the user's preferences in one continuous paragraph. Start with 'The user appears to have a preference for'."
)
FINE = "The user appears to have a preference for quiet films with blue covers and few words."


def generator(writer, store, kind="user", length=50, **more):
    return CachedGenerator(kind, lambda: writer, "m", store, Decoding(length), **more)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "s")


def upper(size=2):
    return Planted(lambda prompt: prompt.text.upper() + "\n\tx", size)


def test_equal_prompts_are_answered_once_however_they_arrive_and_answers_are_one_line(store):
    writer = upper()

    class Later(FixedRequests):
        def receive(self, name, text):
            super().receive(name, text)
            if name == 0:
                self.waiting += [Request(9, Prompt("a")), Request(10, Prompt("b"))]

    source = Later([(0, Prompt("a")), (1, Prompt("b")), (2, Prompt("a"))])
    generator(writer, store).generate(source)
    assert source.texts == {0: "A x", 1: "B x", 2: "A x", 9: "A x", 10: "B x"}
    assert sorted(sum(writer.batches, [])) == ["a", "b"]


def test_off_never_writes_and_names_the_command_and_a_look_up_leaves_out_what_is_missing(store):
    with pytest.raises(UserError, match="1 user summaries are missing or stale.*summarize"):
        generator(upper(), store, may_write=False).answer([Prompt("a")])
    generator(upper(), store).answer([Prompt("a")])
    source = FixedRequests([(0, Prompt("a")), (1, Prompt("b"))])
    generator(None, store).generate(source, known_only=True)
    assert source.texts == {0: "A x"}


def test_a_crash_loses_only_the_batch_in_flight(store):
    writer, second = upper(), upper()
    said, writer.reply = writer.reply, lambda prompt: said(prompt) if len(writer.batches) < 3 else 1 / 0
    prompts = [Prompt(f"p{n}") for n in range(6)]
    with pytest.raises(ZeroDivisionError):
        generator(writer, store).answer(prompts)
    generator(second, store).answer(prompts)
    assert writer.asked == 6 and second.asked == 2  # it died over the last two


@pytest.fixture
def hanging(tmp_path, store):
    """A store that a generator in a thread writes to: three prompts are answered at once, the last one at the end."""
    freed = threading.Event()

    def work(url):
        own = Store(tmp_path / "s")
        model = ServerModel(Endpoint("m", (url,)), ServerSettings(4, 60.0, 60.0, None))
        generator(model, own, leases=Leases(own)).answer([Prompt(f"p{n}") for n in range(4)])
        own.close()

    with serving(Planned(lambda number, text: freed.wait(60) and None if text == "p3" else None)) as planned:
        thread = threading.Thread(target=work, args=(planned.url,))
        thread.start()
        try:
            yield store
        finally:
            freed.set()
            thread.join()


def until(true):
    end = time.monotonic() + 30
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return true()


def test_while_the_last_prompt_hangs_answers_are_stored_and_its_claim_is_renewed(hanging, monkeypatch):
    assert until(lambda: len(hanging) == 3)

    def lapses():
        with hanging.transaction() as db:
            return db.execute("SELECT until FROM leases").fetchall()

    assert until(lambda: len(lapses()) == 1)  # p3's alone
    before = lapses()[0][0]
    monkeypatch.setattr(store_module, "_RENEW_S", 0.1)
    assert until(lambda: lapses()[0][0] > before)


@pytest.mark.parametrize(
    ("text", "kept"),
    [("One. Two. Thr", "One. Two."), ("No end at all", "No end at all"), ("第一。第二。第", "第一。第二。")],
)
def test_a_text_cut_at_its_limit_ends_with_a_sentence_where_much_remains(text, kept):
    assert cut_at_sentence(Answer(text, 1, 1, truncated=True)) == kept
    assert cut_at_sentence(Answer(text, 1, 1, truncated=False)) == text


def test_a_repeated_prompt_is_known():
    assert repeats_prompt(WORDING[40:], Prompt(WORDING)) and not repeats_prompt(FINE, Prompt(WORDING))
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
def test_an_answer_that_repeats_its_prompt_is_retried_once_then_kept_and_counted(store, stubborn, caplog):
    writer = Twice(stubborn)
    made = generator(writer, store)
    (text,) = made.answer([Prompt(WORDING)])
    assert [d.temperature for d in writer.decodings] == [0.0, 0.6] and writer.decodings[1].max_new_tokens == 50
    assert (text == FINE) is not stubborn and made.findings.counts["repeats its prompt"] == stubborn
    made.report()
    assert ("repeats its prompt" in caplog.text) is stubborn
    assert generator(writer, store).answer([Prompt(WORDING)]) == [text] and len(writer.decodings) == 2


def test_the_report_counts_what_is_odd_known_answers_too_gives_examples_and_names_the_key(store, caplog):
    replies = {
        "a": "I'm sorry, I can't help with that.", "b": "", "c": "Likes films.", "d": FINE,
        "e": "As an AI language model I see nothing.",
    }  # fmt: skip
    writer = Planted(lambda prompt: replies[prompt.text[0]])
    for made in (generator(writer, store), generator(writer, store)):
        made.answer([Prompt(f"{letter}: {WORDING}") for letter in replies])
        assert dict(made.findings.counts) == {"refusal": 2, "empty": 1}
    assert made.tally.written == 0
    made.report()
    words = ("refusal", "2 of 5 (40.0%)", "I'm sorry, I can't help", "user_summarizer", "prompt_style")
    assert all(word in caplog.text for word in words) and FINE not in caplog.text
