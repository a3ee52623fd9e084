"""Answers of any form, environments of any kind: another try or one line, never a traceback or a lost prompt."""

import json
import sys

import pytest
from planned_server import Planned, completion, error, serving

from recbole_mllm.endpoints import Endpoint
from recbole_mllm.errors import UserError
from recbole_mllm.mllm.base import Batch, Decoding
from recbole_mllm.mllm.server import ServerModel
from recbole_mllm.prompts import Prompt
from recbole_mllm.settings import ServerSettings
from recbole_mllm.summaries.store import Store
from recbole_mllm.summaries.writing import Scribe

SETTINGS = ServerSettings(4, 5.0, 2.0, None)
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def body(**keys):
    return completion("x")[2] | keys


def said(content):
    found = completion("x")[2]
    found["choices"][0]["message"]["content"] = content
    return found


UNREADABLE = {
    "no choice": {"choices": []},
    "choices by name": {"choices": {"a": 1}},
    "a number of choices": {"choices": 5},
    "no object": [1],
    "nothing": None,
    "parts": said([{"type": "text", "text": "hi"}]),
    "a number": said(5),
    "an error all the same": {"error": {"message": "engine dead"}},
    "too deep": b"[" * 100_000,
    "no UTF-8": b'{"choices": "\xff"}',
    "no JSON": b"<html>",
    "no body": b"",
}


@pytest.mark.parametrize("reply", UNREADABLE.values(), ids=UNREADABLE)
def test_an_answer_of_another_form_is_asked_for_again(reply):
    prompts = [Prompt(f"p{n}") for n in range(3)]
    with serving(Planned(lambda n, text: (200, {}, reply) if n == 0 else None)) as planned:
        work = Batch(prompts, Decoding(9))
        ServerModel(Endpoint("m", (planned.url,)), SETTINGS).write(work)
    assert {place: answer.text for place, answer in work.answers.items()} == {0: "P0", 1: "P1", 2: "P2"}
    assert len(planned.bodies) == 4


@pytest.mark.parametrize("count", ["1e999", "-3", "99999999999999999999", '"many"', "null", "[7]"])
def test_a_count_of_tokens_that_is_none_costs_no_answer(count, tmp_path):
    text = json.dumps(body(usage={"prompt_tokens": "?", "completion_tokens": 3})).replace('"?"', count)
    with serving(Planned(lambda n, _: (200, {}, text.encode()))) as planned:
        model = ServerModel(Endpoint("m", (planned.url,)), SETTINGS)
        scribe = Scribe("item", lambda: model, "server:m", Store(tmp_path / "s"), Decoding(9))
        assert scribe.answer([Prompt("a")]) == ["x"]
    assert (scribe.tally.prompt_tokens, scribe.tally.new_tokens) == (0, 3)


def test_lone_surrogates_line_ends_and_zeros_in_an_answer_are_kept_as_plain_words(tmp_path):
    with serving(Planned(lambda n, _: (200, {}, said("a\ud800b\tc\nd\x00e\u2028f")))) as planned:
        model, store = ServerModel(Endpoint("m", (planned.url,)), SETTINGS), Store(tmp_path / "s")
        (text,) = Scribe("item", lambda: model, "server:m", store, Decoding(9)).answer([Prompt("a")])
    assert text.isprintable() and text.split() == text.split(" ") and len(store) == 1
    assert "".join(text.split()) == "abcdef"


def test_what_a_server_says_is_shown_without_what_a_terminal_would_obey():
    with (
        serving(Planned(lambda n, _: error(400, "bad \x1b[2J\ud800 word\nand more"))) as planned,
        pytest.raises(UserError, match=r"400 bad \[2J word and more;") as caught,
    ):
        ServerModel(Endpoint("m", (planned.url,)), SETTINGS).write(Batch([Prompt("a")], Decoding(9)))
    assert str(caught.value).isprintable()


def test_an_error_in_an_answer_of_status_200_is_shown():
    dead = {"error": {"message": "engine dead"}}
    with serving(Planned(lambda n, _: (200, {}, dead))) as planned, pytest.raises(UserError, match="engine dead"):
        ServerModel(Endpoint("m", (planned.url,)), ServerSettings(1, 5.0, 0.5, None)).write(
            Batch([Prompt("a")], Decoding(9))
        )


@pytest.mark.parametrize(
    ("name", "value"), [("ALL_PROXY", "socks5://127.0.0.1:9"), ("http_proxy", "odd://x"), ("SSL_CERT_FILE", "/no/file")]
)
def test_an_environment_the_client_cannot_take_is_one_line(name, value, monkeypatch):
    if value.startswith("socks"):
        monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="cannot start with this environment .*unset HTTP_PROXY") as caught:
        ServerModel(Endpoint("m", ("http://127.0.0.1:9/v1",)), SETTINGS)
    assert "\n" not in str(caught.value)


def test_a_server_asked_through_a_proxy_says_so_when_the_proxy_is_away(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing listens there
    quick = ServerSettings(1, 5.0, 0.5, None)
    with serving(Planned()) as planned:
        with pytest.raises(UserError, match="through the proxy of the environment; NO_PROXY"):
            ServerModel(Endpoint("m", (planned.url,)), quick).write(Batch([Prompt("a")], Decoding(9)))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        work = Batch([Prompt("a")], Decoding(9))
        ServerModel(Endpoint("m", (planned.url,)), quick).write(work)
    assert work.answers[0].text == "A"
