"""Answers of any form, environments of any kind: another try or one line, never a traceback or a lost prompt."""

import gzip
import json
import socket
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
from planned_server import Planned, completion, error, serving

from recbole_mllm.endpoints import Endpoint
from recbole_mllm.errors import UserError
from recbole_mllm.mllm.base import MOST_CHARACTERS, Answer, Batch, Decoding
from recbole_mllm.mllm.chat import message
from recbole_mllm.mllm.host import Host, Kind
from recbole_mllm.mllm.server import ServerModel
from recbole_mllm.prompts import Prompt
from recbole_mllm.settings import ServerSettings
from recbole_mllm.summaries.known import KnownTexts
from recbole_mllm.summaries.leases import Leases
from recbole_mllm.summaries.store import Store, answer_key
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


@contextmanager
def sending(serve):
    """Run a server that writes what `serve` writes into each connection, once a request has come."""
    listening, stop = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def one(connection):
        with connection:
            try:
                connection.recv(1 << 16)
                serve(connection, stop)
            except OSError:  # the client has gone
                pass

    def run():
        while not stop.is_set():
            try:
                threading.Thread(target=one, args=(listening.accept()[0],), daemon=True).start()
            except OSError:
                return

    threading.Thread(target=run, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    finally:
        stop.set()
        listening.close()


CHUNKED = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
PACKED = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n"


def a_byte_now_and_then(connection, stop):
    connection.sendall(CHUNKED)
    while not stop.wait(0.1):
        connection.sendall(b"1\r\n \r\n")


def an_error_by_the_byte(connection, stop):
    connection.sendall(CHUNKED.replace(b"200 OK", b"500 no"))
    while not stop.wait(0.1):
        connection.sendall(b"1\r\n \r\n")


def headers_without_end(connection, stop):
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while not stop.wait(0.1):
        connection.sendall(b"x-more: yes\r\n")


def a_body_without_end(connection, stop):
    connection.sendall(CHUNKED)
    while not stop.is_set():
        connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")


BOMB = gzip.compress(bytes(1 << 24), 1)


def a_few_bytes_that_unpack_to_many(connection, stop):
    connection.sendall(PACKED % len(BOMB) + BOMB)
    stop.wait(5)


@pytest.mark.parametrize(
    ("serve", "seconds", "said"),
    [
        (a_byte_now_and_then, 0.5, "no whole answer within 0.5 s"),
        (an_error_by_the_byte, 0.5, "no whole answer within 0.5 s"),
        (headers_without_end, 0.5, "no answer within 0.5 s"),
        (a_body_without_end, 9, "an answer of more than 8,388,608 bytes"),
        (a_few_bytes_that_unpack_to_many, 9, "an answer of more than 8,388,608 bytes"),
    ],
)
def test_an_answer_has_a_time_and_a_size_all_told(serve, seconds, said):
    with sending(serve) as url:
        host = Host(url, "m", replace(SETTINGS, server_timeout=seconds), None)
        started = time.monotonic()
        trouble = host.ask(message(Prompt("a"), 0), Decoding(9))
    assert time.monotonic() - started < seconds + 4
    assert (trouble.kind, trouble.text) == (Kind.AGAIN_BUT_COUNT, said)


def test_a_server_that_drips_does_not_hold_what_another_can_answer():
    with sending(a_byte_now_and_then) as slow, serving(Planned()) as planned:
        work = Batch([Prompt(f"p{n}") for n in range(6)], Decoding(9))
        ServerModel(Endpoint("m", (slow, planned.url)), replace(SETTINGS, server_timeout=0.5)).write(work)
    assert {place: answer.text for place, answer in work.answers.items()} == {n: f"P{n}" for n in range(6)}


def test_an_answer_far_too_long_is_asked_for_again_and_never_kept(tmp_path):
    long = said("word " * 10_000)
    with serving(Planned(lambda n, _: (200, {}, long) if n == 0 else None)) as planned:
        model, store = ServerModel(Endpoint("m", (planned.url,)), SETTINGS), Store(tmp_path / "s")
        assert Scribe("item", lambda: model, "server:m", store, Decoding(9)).answer([Prompt("a")]) == ["A"]
    assert len(planned.bodies) == 2 and len(store) == 1


def test_a_long_answer_to_a_long_request_is_an_answer():
    with serving(Planned(lambda n, _: completion("word " * 10_000))) as planned:
        work = Batch([Prompt("a")], Decoding(20_000))
        ServerModel(Endpoint("m", (planned.url,)), SETTINGS).write(work)
    assert len(work.answers[0].text) == 49_999


@pytest.mark.parametrize("leased", [False, True])
def test_an_answer_far_too_long_in_a_store_is_written_anew(leased, tmp_path, caplog):
    """Stores of earlier versions may hold one, and no file of texts would take it."""
    folder = tmp_path / "d"
    folder.mkdir()
    store, prompt = Store(folder / "d.mllm.sqlite"), Prompt("a")
    key = answer_key("server:m", prompt, Decoding(9))
    store.add("item", "server:m", [key], [Answer("x" * 20_000_000, 1, 1)], 0.0)
    assert KnownTexts(folder).get([key]) == {}
    for turn in (1, 2):
        with serving(Planned()) as planned:
            model = ServerModel(Endpoint("m", (planned.url,)), SETTINGS)
            leases = Leases(store) if leased else None
            scribe = Scribe("item", lambda m=model: m, "server:m", store, Decoding(9), leases=leases)
            assert scribe.answer([prompt]) == ["A"] and len(planned.bodies) == (turn == 1)
    assert f"1 answers of more than {MOST_CHARACTERS:,} characters" in caplog.text
    assert store.get([key]) == KnownTexts(folder).get([key]) == {key: "A"} and len(store) == 1


def test_an_answer_that_is_kept_is_not_replaced_by_a_second_one(tmp_path):
    store = Store(tmp_path / "s")
    for text in ("first", "second", "x" * 20_000_000):
        store.add("item", "m", ["k"], [Answer(text, 1, 1)], 0.0)
    assert store.get(["k"]) == {"k": "first"}
