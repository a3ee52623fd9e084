"""Models behind servers: sharing, failures, refusals, keys, odd answers; against a real HTTP server on plan."""

import base64
import gzip
import io
import json
import logging
import socket
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from planned_server import Planned, completion, error, serving
from stock_forward import STYLE

from recbole_mllm.common.endpoints import Endpoint, parse_endpoint
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.prompts import CLOSE, OPEN, Prompt, recommend_prompt
from recbole_mllm.common.resources import PROPERTIES
from recbole_mllm.common.settings import ServerSettings, Settings
from recbole_mllm.mllm.generation import with_penalty
from recbole_mllm.mllm.interface import Answer, Batch, Decoding
from recbole_mllm.mllm.server import ServerModel
from recbole_mllm.mllm.server_host import Failure, FailureKind, Host
from recbole_mllm.mllm.server_messages import answer_of, message
from recbole_mllm.model.summarizers import make_summary_setup
from recbole_mllm.summaries.generator import CachedGenerator
from recbole_mllm.summaries.quality import Findings, table
from recbole_mllm.summaries.store import Store, answer_key

pytest.importorskip("openai")

GREEDY = Decoding(9)
SETTINGS = ServerSettings(4, 5.0, 2.0, "OPENAI_API_KEY")
KEY = "sk-a-secret-nobody-may-read"
PROMPTS = [Prompt(f"p{n}") for n in range(12)]
RIGHT = {n: f"P{n}" for n in range(12)}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No key and no proxy, and a client that waits little before it retries."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.02)


def ask(urls, prompts=PROMPTS, settings=SETTINGS, decoding=GREEDY):
    urls = [urls.url] if isinstance(urls, Planned) else urls
    work = Batch(prompts, decoding)
    ServerModel(Endpoint("m", tuple(urls)), settings).write(work)
    return work.answers


def texts(answers):
    return {place: answer.text for place, answer in answers.items()}


def scribe(planned, store, **keys):
    return CachedGenerator(
        "item", lambda: ServerModel(Endpoint("m", (planned.url,)), SETTINGS), "server:m", store, GREEDY, **keys
    )


def dead_url():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}/v1"


def test_every_prompt_is_answered_once_with_its_costs_and_bounded_concurrency():
    with serving(Planned(delay=0.2)) as planned:
        answers = ask(planned)
    assert texts(answers) == RIGHT and len(planned.bodies) == 12
    assert answers[0] == Answer("P0", 7, 3, truncated=False)
    assert planned.most_active == 4  # as many as allowed, and no more


def test_an_answer_cut_at_its_length_says_so_and_missing_usage_is_zero():
    with serving(Planned(lambda n, text: completion("long", "length", usage=False))) as planned:
        assert ask(planned, PROMPTS[:1]) == {0: Answer("long", 0, 0, truncated=True)}


def test_decoding_a_penalty_and_the_wish_for_no_thought_are_passed_on_and_nothing_otherwise():
    penalty = Decoding(5, 0.6, 0.9, 11, rules=with_penalty("", 1.1, served=True))
    with serving(Planned()) as planned:
        ask(planned, PROMPTS[:1])
        ask(planned, PROMPTS[:1], replace(SETTINGS, server_thinking="off"), penalty)
    greedy, other = planned.bodies
    assert set(greedy) == {"messages", "model", "max_tokens", "temperature"}
    assert (greedy["max_tokens"], greedy["temperature"], greedy["model"]) == (9, 0.0, "m")
    assert [other[k] for k in ("max_tokens", "temperature", "top_p", "seed")] == [5, 0.6, 0.9, 11]
    assert (other["repetition_penalty"], other["chat_template_kwargs"]) == (1.1, {"enable_thinking": False})


@pytest.mark.parametrize("status", [429, 500, 503, 408])
def test_a_passing_failure_is_retried_however_often_the_client_does(status):
    with serving(Planned(lambda n, text: error(status) if n in range(1, 7) else None)) as planned:
        assert texts(ask(planned)) == RIGHT


def test_retry_after_is_honoured():
    with serving(Planned(lambda n, text: error(429, "slow down", Retry_After="1.2") if n == 0 else None)) as planned:
        assert texts(ask(planned, settings=replace(SETTINGS, server_concurrency=1))) == RIGHT
    assert 1.2 <= planned.times[1] - planned.times[0] < 6


def test_a_server_that_hangs_loses_its_prompts_to_another_and_is_soon_left_alone():
    freed = threading.Event()

    def plan(n, text):
        freed.wait(20)

    with serving(Planned(plan)) as hangs, serving(Planned(delay=0.02)) as other:
        quick = replace(SETTINGS, server_timeout=0.3, server_concurrency=2)
        model = ServerModel(Endpoint("m", (hangs.url, other.url)), quick)
        for _ in range(3):
            work = Batch(PROMPTS, GREEDY)
            model.write(work)
            assert texts(work.answers) == RIGHT
        assert len(hangs.bodies) <= 8  # the client does not send again what took too long
        freed.set()


def test_a_dead_server_is_set_aside_and_the_other_does_all(caplog):
    with serving(Planned()) as alive:
        dead = dead_url()
        assert texts(ask([dead, alive.url])) == RIGHT
    said = [record.getMessage() for record in caplog.records if "set aside" in record.getMessage()]
    assert len(said) <= 1 and all(dead in line for line in said)


def test_a_failing_server_is_left_alone_for_longer_each_time_and_an_answer_to_what_it_was_sent_since_ends_that():
    host, failure, answer = Host(dead_url(), "m", SETTINGS, None), Failure(FailureKind.SERVER, "503"), Answer("a", 1, 1)
    waits = []
    for _ in range(9):
        started = time.monotonic()
        host.record(failure, sent=started)
        waits.append(host.resume_at - started)
        host.record(failure, sent=started - 1)  # of the same incident
        host.record(answer, sent=started - 1)
        assert host.failing_since is not None
    assert all(0.25 * 2**n <= wait <= 0.51 * 2**n for n, wait in enumerate(waits[:6])) and 15 <= waits[-1] <= 30.1
    host.record(answer, sent=time.monotonic())
    assert host.failing_since is None
    host.record(failure, sent=(now := time.monotonic()))
    assert host.resume_at - now <= 0.51


def test_all_dead_longer_than_patience_names_them_and_keeps_what_was_finished(tmp_path):
    with serving(Planned(lambda n, text: error(503, "draining") if n >= 5 else None)) as planned:
        other = dead_url()
        model = ServerModel(Endpoint("m", (planned.url, other)), replace(SETTINGS, server_patience=1.0))
        store = Store(tmp_path / "s")
        with pytest.raises(UserError, match="no server has answered for 1 s") as caught:
            CachedGenerator("item", lambda: model, "server:m", store, GREEDY).answer(PROMPTS)
        assert planned.url in str(caught.value) and other in str(caught.value) and "draining" in str(caught.value)
        assert len(store) == 5  # each was committed when it arrived
        planned.plan = lambda n, text: None
        again = CachedGenerator("item", lambda: model, "server:m", store, GREEDY)
        assert again.answer(PROMPTS) == list(RIGHT.values()) and again.tally.written == 7


def test_prompts_that_are_refused_or_cannot_be_sent_do_not_stop_the_others(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    work = Batch([Prompt("<image>", (tmp_path / "bad.png",)), *PROMPTS], GREEDY)
    with (
        serving(Planned(lambda n, text: error(400, "what a word") if text == "p3" else None)) as planned,
        pytest.raises(UserError, match="2 prompts were refused.*kept"),
    ):
        ServerModel(Endpoint("m", (planned.url,)), SETTINGS).write(work)
    assert len(work.answers) == 11
    with serving(Planned(lambda n, text: error(400, "what a word") if text == "p3" else None)) as planned:
        with pytest.raises(UserError, match=f"1 prompts were refused.*server {planned.url}: 400 what a word.*kept"):
            ask(planned)
        with pytest.raises(UserError, match=r"1 prompts were refused.*bad\.png: no image that can be read"):
            ask(planned, [Prompt("<image>", (tmp_path / "bad.png",)), Prompt("p1")])


def test_a_prompt_that_always_fails_is_given_up_and_the_others_are_answered():
    with (
        serving(Planned(lambda n, text: error(500, "cuda assert") if text == "p3" else None)) as planned,
        pytest.raises(UserError, match="1 prompts were refused.*cuda assert"),
    ):
        ask(planned, settings=replace(SETTINGS, server_patience=60.0))
    assert planned.texts().count("p3") == 9 and len(set(planned.texts())) == 12  # three times, each retried twice


def test_when_every_prompt_is_refused_the_first_few_are_enough():
    with (
        serving(Planned(lambda n, text: error(422, "no such field"))) as planned,
        pytest.raises(UserError, match="no such field"),
    ):
        ask(planned, [Prompt(f"p{n}") for n in range(500)])
    assert len(planned.bodies) < 100


def test_a_prompt_too_long_for_the_server_has_its_longest_text_shortened(caplog):
    long = Prompt(f"Read {OPEN}{'a' * 100}{CLOSE} and {OPEN}{'b' * 30}{CLOSE}.")

    def plan(n, text):
        return error(400, "This model's maximum context length is 70 tokens") if len(text) > 70 else None

    with serving(Planned(plan)) as planned:
        assert texts(ask(planned, [long])) == {0: f"READ {'A' * 25} AND {'B' * 30}."}
    assert "1 prompts were too long" in caplog.text


@pytest.mark.parametrize(
    ("reply", "path", "words"),
    [
        (error(404, "no model m"), "/v1", "does not know model 'm'.*llava, qwen"),
        (error(404, "no"), "", "check the name and that the URL ends"),
        (error(422, "Unexpected fields in the request: {'chat_template_kwargs'}"), "/v1", "server_thinking: auto"),
        (error(422, "Unknown repetition_penalty"), "/v1", "summary_repetition_penalty: null"),
        ((307, {"Location": "http://127.0.0.1:9/v1/chat/completions"}, {}), "/v1", "redirects, which is not followed"),
    ],
)
def test_what_no_prompt_could_get_past_ends_the_run_with_advice(reply, path, words):
    planned = Planned(lambda n, text: reply, models=["llava", "qwen"])
    with serving(planned), pytest.raises(UserError, match=words):
        ask([planned.url.removesuffix("/v1") + path])


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_names_the_variable_and_is_never_shown(status, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    echo = error(status, f"Incorrect API key provided: {KEY}")
    with serving(Planned(lambda n, text: echo)) as planned, pytest.raises(UserError) as caught:
        ask(planned)
    assert planned.headers[0]["authorization"] == f"Bearer {KEY}"
    assert "refuses the key in the environment variable OPENAI_API_KEY" in str(caught.value)
    shown = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert KEY not in shown and "During handling" not in shown and "direct cause" not in shown


def test_a_server_that_repeats_the_key_in_an_error_is_not_quoted_and_null_sends_none(monkeypatch, caplog):
    monkeypatch.setenv("MY_KEY", KEY)
    with (
        serving(Planned(lambda n, text: error(400, f"bad request by {KEY}"))) as planned,
        pytest.raises(UserError, match=r"bad request by \*\*\*") as caught,
    ):
        ask(planned, settings=replace(SETTINGS, server_key_env="MY_KEY"))
    assert KEY not in "".join(traceback.format_exception(caught.value)) + caplog.text
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(Planned()) as planned:
        ask(planned, PROMPTS[:1], settings=replace(SETTINGS, server_key_env=None))
    assert KEY not in str(planned.headers)


def test_marks_and_special_words_never_reach_the_server(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (5, 4), "red").save(path)
    prompt = Prompt(f"Look: <image>\nTitle {OPEN}[INST] <image> <|im_end|> <b>{CLOSE}.", (path,))
    with serving(Planned()) as planned:
        ask(planned, [prompt])
    first, image, last = planned.bodies[0]["messages"][0]["content"]
    assert (first["text"], last["text"]) == ("Look: ", "\nTitle [ INST] < image> < |im_end|> <b>.")
    head, data = image["image_url"]["url"].split(",")
    assert head == "data:image/png;base64" and base64.b64decode(data) == path.read_bytes()


@pytest.mark.parametrize("kind", ["rotated", "transparent", "webp", "grey"])
def test_images_that_servers_read_differently_go_out_upright_and_opaque(kind, tmp_path):
    path = tmp_path / ("a.webp" if kind == "webp" else "a.png")
    image = Image.new("RGBA" if kind == "transparent" else "L" if kind == "grey" else "RGB", (6, 4))
    exif = Image.Exif()
    if kind == "rotated":
        exif[0x0112] = 6
    image.save(path, exif=exif)
    part = message(Prompt("<image>", (path,)))["content"][0]
    sent = Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].removeprefix("data:image/png;base64,"))))
    assert sent.mode == "RGB" and sent.size == ((4, 6) if kind == "rotated" else (6, 4))
    assert kind != "transparent" or sent.getpixel((0, 0)) == (255, 255, 255)


def test_an_endpoint_holds_the_model_and_all_servers_but_not_the_host_in_its_identity():
    one = parse_endpoint("server:org/model@main@http://a:1/v1/, https://b/v1", "user_summarizer")
    assert one == Endpoint("org/model@main", ("http://a:1/v1", "https://b/v1"))
    assert one.identity == parse_endpoint("server:org/model@main@http://c/v1", "k").identity


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("server:m", "must read server:MODEL@http"),
        ("server:@http://a/v1", "must read server:MODEL@http"),
        ("server:m@ftp://a/v1", "neither http nor https"),
        ("server:m@http://a/v1,file:///etc/passwd", "URL 2: file:// is neither"),
        ("server:m@http://u:hunter2@a/v1", "no user, password or query"),
        ("server:m@http://a/v1?api_key=hunter2", "no user, password or query"),
        ("server:m@http://a:port/v1", "port cannot be read"),
        ("server:m@http:///v1", "no host"),
    ],
)
def test_a_wrong_endpoint_is_one_line_that_repeats_no_secret(text, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_endpoint(text, "item_summarizer")
    assert "hunter2" not in str(caught.value)


def test_nothing_is_sent_any_more_once_the_reader_stops():
    with serving(Planned(delay=0.05)) as planned:
        work = Batch([Prompt(str(n)) for n in range(200)], GREEDY)
        work.give = lambda arrived: 1 / len([]) if arrived else None  # the reader dies over the first answer
        with pytest.raises(ZeroDivisionError):
            ServerModel(Endpoint("m", (planned.url,)), SETTINGS).write(work)
        time.sleep(0.3)
        asked = len(planned.bodies)
        time.sleep(0.3)
        assert asked == len(planned.bodies) < 20


@pytest.mark.parametrize("models", [["other.gguf"], None])
def test_a_server_that_lists_other_models_or_none_is_used_all_the_same(models, caplog):
    with serving(Planned(models=models)) as planned:
        assert texts(ask(planned)) == RIGHT
    assert ("does not list model 'm'; it lists: other.gguf" in caplog.text) == (models is not None)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:9", "cannot start with this environment .*unset HTTP_PROXY"),
        ("http_proxy", "odd://x", "cannot start with this environment .*unset HTTP_PROXY"),
        ("SSL_CERT_FILE", "/no/file", "cannot start with this environment .*unset HTTP_PROXY"),
        ("OPENAI_API_KEY", f"{KEY} and more", "OPENAI_API_KEY holds a space"),
    ],
)
def test_an_environment_that_cannot_be_used_is_one_line(name, value, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words) as caught:
        ServerModel(Endpoint("m", ("http://127.0.0.1:9/v1",)), SETTINGS)
    assert "\n" not in str(caught.value) and KEY not in str(caught.value)


def test_without_the_client_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r'pip install "recbole-mllm\[server\]"'):
        ServerModel(Endpoint("m", ("http://127.0.0.1:9/v1",)), SETTINGS)


def test_a_server_behind_a_proxy_says_so_when_the_proxy_is_away(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing listens there
    with serving(Planned()) as planned:
        with pytest.raises(UserError, match="through the proxy of the environment; NO_PROXY"):
            ask(planned, PROMPTS[:1], replace(SETTINGS, server_patience=0.5))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert texts(ask(planned, PROMPTS[:1])) == {0: "P0"}


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
    "far too long": said("word " * 10_000),
}


@pytest.mark.parametrize("reply", UNREADABLE.values(), ids=UNREADABLE)
def test_an_answer_that_is_none_is_retried(reply, caplog):
    with serving(Planned(lambda n, text: (200, {}, reply) if n == 0 else None)) as planned:
        assert texts(ask(planned, PROMPTS[:3])) == {0: "P0", 1: "P1", 2: "P2"}
    assert len(planned.bodies) == 4
    assert not (isinstance(reply, dict) and "error" in reply) or "engine dead" in caplog.text


@pytest.mark.parametrize("count", ["1e999", "-3", "99999999999999999999", '"many"', "null", "[7]"])
def test_a_count_of_tokens_that_is_none_costs_no_answer(count, tmp_path):
    usage = {"prompt_tokens": "?", "completion_tokens": 3}
    text = json.dumps(completion("x")[2] | {"usage": usage}).replace('"?"', count)
    with serving(Planned(lambda n, _: (200, {}, text.encode()))) as planned:
        one = scribe(planned, Store(tmp_path / "s"))
        assert one.answer([Prompt("a")]) == ["x"]
    assert (one.tally.prompt_tokens, one.tally.new_tokens) == (0, 3)


def test_lone_surrogates_line_ends_and_zeros_are_stored_as_plain_words(tmp_path):
    with serving(Planned(lambda n, _: (200, {}, said("a\ud800b\tc\nd\x00e\u2028f")))) as planned:
        store = Store(tmp_path / "s")
        (text,) = scribe(planned, store).answer([Prompt("a")])
    assert text.isprintable() and text.split() == text.split(" ") and len(store) == 1
    assert "".join(text.split()) == "abcdef"


def test_what_a_server_says_is_shown_without_what_a_terminal_would_obey():
    with (
        serving(Planned(lambda n, _: error(400, "bad \x1b[2J\ud800 word\nand more"))) as planned,
        pytest.raises(UserError, match=r"400 bad \[2J word and more;") as caught,
    ):
        ask(planned, PROMPTS[:1])
    assert str(caught.value).isprintable()


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
BOMB = gzip.compress(bytes(1 << 24), 1)


def a_byte_now_and_then(connection, stop):
    connection.sendall(CHUNKED)
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


def a_few_bytes_that_unpack_to_many(connection, stop):
    connection.sendall(PACKED % len(BOMB) + BOMB)
    stop.wait(5)


@pytest.mark.parametrize("serve", [a_byte_now_and_then, headers_without_end])
def test_a_server_that_drips_does_not_hold_what_another_can_answer(serve, caplog):
    with sending(serve) as slow, serving(Planned()) as planned:
        assert texts(ask([slow, planned.url], settings=replace(SETTINGS, server_timeout=0.5))) == RIGHT
    assert "no answer within 0.5 s" in caplog.text or "no whole answer within 0.5 s" in caplog.text


@pytest.mark.parametrize("serve", [a_body_without_end, a_few_bytes_that_unpack_to_many])
def test_an_answer_without_end_is_cut_off(serve):
    with sending(serve) as url, pytest.raises(UserError, match="an answer of more than 8,388,608 bytes"):
        ask([url], PROMPTS[:1], replace(SETTINGS, server_timeout=9.0, server_patience=0.1))


def test_a_long_answer_to_a_long_request_is_an_answer():
    with serving(Planned(lambda n, _: completion("word " * 10_000))) as planned:
        assert len(ask(planned, PROMPTS[:1], decoding=Decoding(20_000))[0].text) == 49_999


def test_an_answer_in_the_store_is_not_replaced_by_a_second_one(tmp_path):
    store = Store(tmp_path / "s")
    for text in ("first", "second"):
        store.add("item", "m", ["k"], [Answer(text, 1, 1)], 0.0)
    assert store.get(["k"]) == {"k": "first"}


def test_the_key_of_an_answer_knows_model_and_decoding_not_the_host():
    prompt = Prompt("a")
    one, two = (parse_endpoint(f"server:m@http://{host}/v1", "k").identity for host in "ab")
    assert answer_key(one, prompt, GREEDY) == answer_key(two, prompt, GREEDY)
    others = [Decoding(8), Decoding(9, 0.6), Decoding(9, 0.6, 0.9), Decoding(9, 0.6, 0.9, 1)]
    keys = {answer_key(one, prompt, decoding) for decoding in (GREEDY, *others)}
    assert len(keys | {answer_key("server:n", prompt, GREEDY)}) == 6


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mllm", "server:m@http://a/v1", "finetune is lora, but mllm is behind a server"),
        ("item_summarizer", "server:m", "item_summarizer must read server:MODEL@"),
        ("server_key_env", KEY, "server_key_env must name an environment variable"),
    ],
)
def test_a_wrong_setting_is_one_line_before_anything_runs(key, value, message):
    base = yaml.safe_load((PROPERTIES / "model" / "MLLMMSR.yaml").read_text())
    with pytest.raises(UserError, match=message) as caught:
        Settings.from_config(base | {key: value})
    assert KEY not in str(caught.value)


def test_sampling_and_thinking_change_the_tag_only_where_they_are_set(tmp_path):
    base = yaml.safe_load((PROPERTIES / "model" / "MLLMMSR.yaml").read_text())
    (tmp_path / f"{tmp_path.name}.item").write_text("item_id:token\ttitle:token_seq\n1\ta\n")
    both = {"item_summarizer": "server:a/m@http://x/v1", "user_summarizer": "server:a/m@http://x/v1"}
    both |= {"use_image": False, "item_summary": "text"}  # the one item has no image

    def tag(**keys):
        settings = Settings.from_config(base | keys)
        return make_summary_setup(
            {"data_path": str(tmp_path), "ITEM_ID_FIELD": "item_id"}, settings, torch.device("cpu")
        ).tag

    assert tag(**both) == tag(**both, summary_seed=5, server_concurrency=2) != tag(**both, summary_temperature=0.6)
    assert tag(**both) != tag(**both, server_thinking=False), "YAML's off"
    assert tag(**both) == tag(**both, summary_repetition_penalty=None) != tag(**both, summary_repetition_penalty=1.1)
    assert tag(**both).startswith("m-recurrent-b3-text-")


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
    findings.look(text)
    assert findings.counts == {"thinks aloud": 1} and "docs/servers.md" in table(findings, "item", 1)[0]


def test_a_title_can_neither_begin_nor_end_a_thought():
    content = message(recommend_prompt(STYLE, "likes red", "a </think> and <think> mug", None))["content"]
    assert "think>" in content and "</think>" not in content and "<think>" not in content
