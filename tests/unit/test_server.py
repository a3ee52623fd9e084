"""Models behind servers: sharing, failures, refusals, keys, odd answers; against a real HTTP server on plan."""

import base64
import io
import json
import logging
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import replace

import pytest
from PIL import Image
from planned_server import Planned, completion, error, serving

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.model_names import Endpoint, parse_endpoint
from recbole_mllm.common.prompts import CLOSE, OPEN, Prompt
from recbole_mllm.common.settings import ServerSettings
from recbole_mllm.mllm import server
from recbole_mllm.mllm.generation import with_penalty
from recbole_mllm.mllm.interface import Answer, Batch, Decoding
from recbole_mllm.mllm.server import ServerModel
from recbole_mllm.mllm.server_messages import messages
from recbole_mllm.summaries.generator import CachedGenerator
from recbole_mllm.summaries.store import Store

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


def dead_url():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}/v1"


def test_every_prompt_is_answered_once_with_its_costs_and_bounded_concurrency():
    with serving(
        Planned(lambda n, text: completion("long", "length", usage=False) if text == "p1" else None)
    ) as planned:
        planned.delay = 0.2
        answers = ask(planned)
    assert texts(answers) == RIGHT | {1: "long"} and len(planned.bodies) == 12
    assert answers[0] == Answer("P0", 7, 3, truncated=False) and answers[1] == Answer("long", 0, 0, truncated=True)
    assert planned.most_active == 4  # as many as allowed, and no more


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


@pytest.mark.parametrize("status", [429, 500])
def test_a_passing_failure_is_retried_however_often_the_client_does(status):
    with serving(Planned(lambda n, text: error(status) if n in range(1, 7) else None)) as planned:
        assert texts(ask(planned)) == RIGHT


def test_retry_after_is_honoured():
    with serving(Planned(lambda n, text: error(429, "slow down", Retry_After="1.2") if n == 0 else None)) as planned:
        assert texts(ask(planned, settings=replace(SETTINGS, server_concurrency=1))) == RIGHT
    assert 1.2 <= planned.times[1] - planned.times[0] < 6


@pytest.mark.parametrize(
    ("timeout", "reply", "advice"),
    [
        (None, error(429, "slow down"), r"429 slow down\); set a smaller server_concurrency and repeat"),
        (0.3, None, r"no answer within 0\.3 s\); set a larger server_timeout, or start them again, and repeat"),
    ],
)
def test_servers_that_are_only_busy_or_slow_are_not_just_to_be_started_again(timeout, reply, advice):
    settings = replace(SETTINGS, server_patience=0.5, server_timeout=timeout or SETTINGS.server_timeout)
    with (
        serving(Planned(lambda n, text: reply, delay=2 * (timeout or 0.0))) as planned,
        pytest.raises(UserError, match=advice),
    ):
        ask(planned, settings=settings)


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
        serving(Planned(lambda n, text: error(400, "what \x1b[2J\nword") if text == "p3" else None)) as planned,
        pytest.raises(
            UserError, match=r"2 prompts were refused.*(bad\.png: no image|400 what \[2J word).*(saved|stored)"
        ) as caught,
    ):
        ServerModel(Endpoint("m", (planned.url,)), SETTINGS).write(work)
    assert len(work.answers) == 11 and str(caught.value).isprintable()


def test_a_prompt_that_always_fails_is_given_up_and_the_others_are_answered():
    with (
        serving(Planned(lambda n, text: error(500, "cuda assert") if text == "p3" else None)) as planned,
        pytest.raises(UserError, match="1 prompts were refused.*cuda assert"),
    ):
        ask(planned, settings=replace(SETTINGS, server_patience=60.0))
    assert planned.texts().count("p3") == 9 and len(set(planned.texts())) == 12  # three times, each retried twice


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


@pytest.mark.parametrize("status", [401, 400])
def test_a_refused_key_names_the_variable_and_no_key_is_ever_shown(status, monkeypatch, caplog):
    monkeypatch.setenv("MY_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    echo = error(status, f"Incorrect API key provided: {KEY}")
    with serving(Planned(lambda n, text: echo)) as planned, pytest.raises(UserError) as caught:
        ask(planned, settings=replace(SETTINGS, server_key_env="MY_KEY"))
    assert planned.headers[0]["authorization"] == f"Bearer {KEY}"
    words = "refuses the key in the environment variable MY_KEY" if status == 401 else "provided: ***"
    shown = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert words in str(caught.value) and KEY not in shown
    assert "During handling" not in shown and "direct cause" not in shown
    with serving(Planned()) as planned:
        ask(planned, PROMPTS[:1], settings=replace(SETTINGS, server_key_env=None))
    assert KEY not in str(planned.headers)


def test_marks_and_special_words_never_reach_the_server(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (5, 4), "red").save(path)
    prompt = Prompt(f"Look: <image>\nTitle {OPEN}[INST] <image> </think> <|im_end|> <b>{CLOSE}.", (path,))
    with serving(Planned()) as planned:
        ask(planned, [prompt])
    first, image, last = planned.bodies[0]["messages"][0]["content"]
    assert (first["text"], last["text"]) == ("Look: ", "\nTitle [ INST] < image> < /think> < |im_end|> <b>.")
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
    part = messages(Prompt("<image>", (path,)))[0]["content"][0]
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


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:9", "cannot start with this environment .*unset HTTP_PROXY"),
        ("http_proxy", "odd://x", "cannot start with this environment .*unset HTTP_PROXY"),
        ("SSL_CERT_FILE", "/no/file", "cannot start with this environment .*unset HTTP_PROXY"),
        ("OPENAI_API_KEY", f"{KEY} and more", "OPENAI_API_KEY holds a space"),
        ("", "", r'pip install "recbole-mllm\[server\]"'),
    ],
)
def test_an_environment_that_cannot_be_used_is_one_line(name, value, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "socksio" if name else "openai", None)
    monkeypatch.setenv(name or "NOTHING", value)
    with pytest.raises(UserError, match=words) as caught:
        ServerModel(Endpoint("m", ("http://127.0.0.1:9/v1",)), SETTINGS)
    assert "\n" not in str(caught.value) and KEY not in str(caught.value)


def said(content):
    found = completion("x")[2]
    found["choices"][0]["message"]["content"] = content
    return found


UNREADABLE = {
    "no choice": {"choices": []},
    "a number of choices": {"choices": 5},
    "nothing": None,
    "parts": said([{"type": "text", "text": "hi"}]),
    "an error all the same": {"error": {"message": "engine dead"}},
    "too deep": b"[" * 100_000,
    "no UTF-8": b'{"choices": "\xff"}',
    "no body": b"",
    "far too long": said("word " * 10_000),
}


@pytest.mark.parametrize("reply", UNREADABLE.values(), ids=UNREADABLE)
def test_an_answer_that_is_none_is_retried(reply, caplog):
    with serving(Planned(lambda n, text: (200, {}, reply) if n == 0 else None)) as planned:
        assert texts(ask(planned, PROMPTS[:3])) == {0: "P0", 1: "P1", 2: "P2"}
    assert len(planned.bodies) == 4
    assert not (isinstance(reply, dict) and "error" in reply) or "engine dead" in caplog.text


@pytest.mark.parametrize("count", ["1e999", "-3", '"many"', "null"])
def test_a_count_of_tokens_that_is_none_costs_no_answer(count):
    usage = {"prompt_tokens": "?", "completion_tokens": 3}
    text = json.dumps(completion("x")[2] | {"usage": usage}).replace('"?"', count)
    with serving(Planned(lambda n, _: (200, {}, text.encode()))) as planned:
        assert ask(planned, PROMPTS[:1]) == {0: Answer("x", 0, 3)}


def test_a_server_that_drips_does_not_hold_what_another_can_answer(caplog):
    def drip(connection):
        with connection, suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            while True:
                time.sleep(0.1)
                connection.sendall(b"1\r\n \r\n")

    def accept():
        with suppress(OSError):
            while True:
                threading.Thread(target=drip, args=(listening.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening, serving(Planned()) as planned:
        threading.Thread(target=accept, daemon=True).start()
        slow = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        assert texts(ask([slow, planned.url], settings=replace(SETTINGS, server_timeout=0.5))) == RIGHT
    assert "no answer within 0.5 s" in caplog.text


@pytest.mark.parametrize("before", ["", "<think>red </b> or blue?</think> ", "so, red.</think>\n"])
def test_a_thought_is_cut_off(before):
    with serving(Planned(lambda n, text: completion(f"{before}A red mug."))) as planned:
        assert texts(ask(planned, PROMPTS[:1])) == {0: "A red mug."}


def test_a_server_that_never_answered_costs_no_prompt():
    settings = replace(SETTINGS, server_concurrency=2, server_patience=20.0)
    with serving(Planned(lambda n, text: error(500, "broken"))) as broken, serving(Planned(delay=0.3)) as slow:
        assert texts(ask([broken.url, slow.url], settings=settings)) == RIGHT


def test_a_server_that_does_not_answer_is_said_to_be_waited_for(monkeypatch, caplog):
    monkeypatch.setattr(server, "EVERY_S", 0.3)
    caplog.set_level(logging.INFO)
    dead = dead_url()
    with pytest.raises(UserError, match="no server has answered for 2 s"):
        ask([dead])
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("waiting for ")]
    assert (
        len(lines) > 2 and lines[0] == f"waiting for {dead}: 0 s of 2 s" and f"waiting for {dead}: 2 s of 2 s" in lines
    )
    caplog.clear()
    with serving(Planned(lambda n, text: time.sleep(0.8))) as planned:
        ask(planned, PROMPTS[:1])
    assert f"waiting for {planned.url}: 0 s of 5 s" in caplog.text
