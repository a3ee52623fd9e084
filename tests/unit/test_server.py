"""Models behind servers: retries, sharing, refusals, keys; against a real HTTP server that misbehaves on plan."""

import base64
import io
import logging
import socket
import sys
import threading
import time
import traceback
from dataclasses import replace

import pytest
import torch
import yaml
from PIL import Image
from planned_server import Planned, completion, error, serving

from recbole_mllm.endpoints import Endpoint, parse_endpoint
from recbole_mllm.errors import UserError
from recbole_mllm.mllm.base import Answer, Batch, Decoding
from recbole_mllm.mllm.chat import message
from recbole_mllm.mllm.host import Host
from recbole_mllm.mllm.rules import with_penalty
from recbole_mllm.mllm.server import ServerModel
from recbole_mllm.model.stages import make_stage
from recbole_mllm.prompts import CLOSE, OPEN, Prompt
from recbole_mllm.resources import PROPERTIES
from recbole_mllm.settings import ServerSettings, Settings
from recbole_mllm.summaries.store import Store, answer_key
from recbole_mllm.summaries.writing import Scribe

GREEDY = Decoding(9)
SETTINGS = ServerSettings(4, 5.0, 2.0, "OPENAI_API_KEY")
KEY = "sk-a-secret-nobody-may-read"
PROMPTS = [Prompt(f"p{n}") for n in range(12)]
RIGHT = {n: f"P{n}" for n in range(12)}


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def ask(urls, prompts=PROMPTS, settings=SETTINGS, decoding=GREEDY):
    model = ServerModel(Endpoint("m", tuple(urls)), settings)
    work = Batch(prompts, decoding)
    model.write(work)
    return work.answers


def texts(answers):
    return {place: answer.text for place, answer in answers.items()}


def dead_url():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}/v1"


def test_every_prompt_is_answered_once_with_its_costs_and_bounded_concurrency():
    with serving(Planned(delay=0.2)) as planned:
        answers = ask([planned.url])
    assert texts(answers) == RIGHT and len(planned.bodies) == 12
    assert answers[0] == Answer("P0", 7, 3, truncated=False)
    assert planned.most_active == 4  # as many as allowed, and no more


def test_an_answer_cut_at_its_length_says_so_and_missing_usage_is_zero():
    with serving(Planned(lambda n, text: completion("long", "length", usage=False))) as planned:
        assert ask([planned.url], PROMPTS[:1]) == {0: Answer("long", 0, 0, truncated=True)}


def test_decoding_is_passed_on():
    with serving(Planned()) as planned:
        ask([planned.url], PROMPTS[:1])
        ask([planned.url], PROMPTS[:1], decoding=Decoding(5, 0.6, 0.9, 11))
    greedy, sampled = planned.bodies
    assert (greedy["max_tokens"], greedy["temperature"], greedy["model"]) == (9, 0.0, "m") and "seed" not in greedy
    assert [sampled[k] for k in ("max_tokens", "temperature", "top_p", "seed")] == [5, 0.6, 0.9, 11]


@pytest.mark.parametrize("status", [429, 500, 502, 503, 408])
def test_a_passing_failure_is_tried_again(status):
    with serving(Planned(lambda n, text: error(status) if n in (1, 2) else None)) as planned:
        assert texts(ask([planned.url])) == RIGHT


def test_retry_after_is_honoured():
    with serving(Planned(lambda n, text: error(429, "slow down", Retry_After="1.2") if n == 0 else None)) as planned:
        assert texts(ask([planned.url], settings=replace(SETTINGS, server_concurrency=1))) == RIGHT
    assert 1.2 <= planned.times[1] - planned.times[0] < 6


def test_what_was_under_way_does_not_end_the_time_a_server_asked_for():
    refused = threading.Event()

    def plan(number, text):
        if text == "refused":
            return error(429, "slow down", Retry_After="60")
        refused.wait(20)
        return None

    with serving(Planned(plan)) as planned:
        host = Host(planned.url, "m", SETTINGS, None)
        answers = []
        earlier = threading.Thread(target=lambda: answers.append(host.ask(message(Prompt("earlier"), 0), GREEDY)))
        earlier.start()
        while not planned.bodies:
            time.sleep(0.01)
        assert host.ask(message(Prompt("refused"), 0), GREEDY).wait == 60
        refused.set()
        earlier.join()
        stop = threading.Event()
        threading.Timer(0.3, stop.set).start()
        assert not host.admit(stop)
    assert answers[0].text == "EARLIER"


def test_a_server_that_hangs_is_timed_out_and_another_goes_on():
    slow = Planned(delay=3.0)
    with serving(slow), serving(Planned()) as quick:
        answers = ask([slow.url, quick.url], settings=replace(SETTINGS, server_timeout=0.3, server_concurrency=2))
    assert texts(answers) == RIGHT


def test_a_broken_answer_is_tried_again():
    broken = [(200, {}, b'{"id": "x", "choices"'), (200, {"content-type": "text/html"}, b"<html>"), completion("")]
    broken[2][2]["choices"] = []
    with serving(Planned(lambda n, text: broken[n] if n < 3 else None)) as planned:
        assert texts(ask([planned.url])) == RIGHT


def test_servers_share_the_work_by_who_is_free():
    with serving(Planned(delay=0.15)) as slow, serving(Planned(delay=0.01)) as quick:
        answers = ask([slow.url, quick.url], [Prompt(f"p{n}") for n in range(60)])
    assert len(answers) == 60 and len(slow.bodies) + len(quick.bodies) == 60
    assert 0 < len(slow.bodies) < len(quick.bodies)


def test_a_dead_server_is_set_aside_and_the_other_does_all(caplog):
    with serving(Planned()) as alive:
        dead = dead_url()
        assert texts(ask([dead, alive.url])) == RIGHT
    said = [record.getMessage() for record in caplog.records if "set aside" in record.getMessage()]
    assert len(said) <= 1 and all(dead in line for line in said)


def test_a_server_that_comes_back_is_used_again():
    url = dead_url()
    port = int(url.split(":")[2].split("/")[0])
    planned, done = Planned(), threading.Event()

    def later():
        time.sleep(0.8)
        with serving(planned, port):
            done.wait(20)

    thread = threading.Thread(target=later)
    thread.start()
    try:
        assert texts(ask([url], settings=replace(SETTINGS, server_patience=15.0))) == RIGHT
    finally:
        done.set()
        thread.join()


def test_all_dead_longer_than_patience_names_them_and_keeps_what_was_finished(tmp_path):
    with serving(Planned(lambda n, text: error(503, "draining") if n >= 5 else None)) as planned:
        other = dead_url()
        model = ServerModel(Endpoint("m", (planned.url, other)), replace(SETTINGS, server_patience=1.0))
        store = Store(tmp_path / "s")
        with pytest.raises(UserError, match="no server has answered for 1 s") as caught:
            Scribe("item", lambda: model, "server:m", store, Decoding(9)).answer(PROMPTS)
        assert planned.url in str(caught.value) and other in str(caught.value) and "draining" in str(caught.value)
        assert len(store) == 5  # each was committed when it arrived
        planned.plan, before = lambda n, text: None, len(planned.bodies)
        again = Scribe("item", lambda: model, "server:m", store, Decoding(9))
        assert again.answer(PROMPTS) == list(RIGHT.values()) and again.tally.written == 7
        assert len(planned.bodies) - before == 7


def test_a_prompt_that_is_refused_does_not_stop_the_others(tmp_path):
    with serving(Planned(lambda n, text: error(400, "what a word") if text == "p3" else None)) as planned:
        model, store = ServerModel(Endpoint("m", (planned.url,)), SETTINGS), Store(tmp_path / "s")
        with pytest.raises(UserError, match=f"1 prompts were refused.*server {planned.url}: 400 what a word.*kept"):
            Scribe("item", lambda: model, "server:m", store, Decoding(9)).answer(PROMPTS)
    assert len(store) == 11


def test_a_prompt_that_always_fails_is_given_up_not_repeated_for_ever():
    with (
        serving(Planned(lambda n, text: error(500, "cuda assert") if text == "p3" else None)) as planned,
        pytest.raises(UserError, match="1 prompts were refused.*cuda assert"),
    ):
        ask([planned.url], settings=replace(SETTINGS, server_patience=60.0))
    assert planned.texts().count("p3") == 5 and len(set(planned.texts())) == 12


def test_when_every_prompt_is_refused_the_first_few_are_enough():
    with (
        serving(Planned(lambda n, text: error(422, "no such field"))) as planned,
        pytest.raises(UserError, match="no such field"),
    ):
        ask([planned.url], [Prompt(f"p{n}") for n in range(500)])
    assert len(planned.bodies) < 100


def test_a_prompt_too_long_for_the_server_has_its_longest_text_shortened(caplog):
    long = Prompt(f"Read {OPEN}{'a' * 100}{CLOSE} and {OPEN}{'b' * 30}{CLOSE}.")

    def plan(n, text):
        return error(400, "This model's maximum context length is 70 tokens") if len(text) > 70 else None

    with serving(Planned(plan)) as planned:
        assert texts(ask([planned.url], [long])) == {0: f"READ {'A' * 25} AND {'B' * 30}."}
    assert "1 prompts were too long" in caplog.text


def test_a_server_is_told_not_to_think_where_that_is_set_and_nothing_where_not():
    quiet = replace(SETTINGS, server_thinking="off")
    with serving(Planned()) as planned:
        ask([planned.url], PROMPTS[:1])
        ask([planned.url], PROMPTS[:1], quiet)
    assert [body.get("chat_template_kwargs") for body in planned.bodies] == [None, {"enable_thinking": False}]

    def strict(n, text):
        return error(422, "Unexpected fields in the request: {'chat_template_kwargs'}")

    with serving(Planned(strict)) as planned, pytest.raises(UserError, match="Unexpected.*server_thinking: auto"):
        ask([planned.url], PROMPTS, quiet)


def test_an_unknown_model_lists_what_is_there():
    with (
        serving(Planned(lambda n, text: error(404, "no model m"), models=["llava", "qwen"])) as planned,
        pytest.raises(UserError, match="does not know model 'm'.*llava, qwen"),
    ):
        ask([planned.url])


def test_a_url_without_the_protocol_behind_it_says_to_check_it():
    with serving(Planned()) as planned, pytest.raises(UserError, match="check the name and that the URL ends"):
        ask([planned.url.removesuffix("/v1")])


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_names_the_variable_and_is_never_shown(status, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    echo = error(status, f"Incorrect API key provided: {KEY}")
    with serving(Planned(lambda n, text: echo)) as planned, pytest.raises(UserError) as caught:
        ask([planned.url])
    assert planned.headers[0]["authorization"] == f"Bearer {KEY}"
    assert "refuses the key in the environment variable OPENAI_API_KEY" in str(caught.value)
    shown = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert KEY not in shown and "During handling" not in shown and "direct cause" not in shown


def test_a_server_that_repeats_the_key_in_an_error_is_not_quoted(monkeypatch, caplog):
    monkeypatch.setenv("MY_KEY", KEY)
    with (
        serving(Planned(lambda n, text: error(400, f"bad request by {KEY}"))) as planned,
        pytest.raises(UserError, match=r"bad request by \*\*\*") as caught,
    ):
        ask([planned.url], settings=replace(SETTINGS, server_key_env="MY_KEY"))
    assert KEY not in "".join(traceback.format_exception(caught.value)) + caplog.text


def test_without_a_key_none_of_the_environment_is_sent(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(Planned()) as planned:
        ask([planned.url], PROMPTS[:1], settings=replace(SETTINGS, server_key_env=None))
    assert KEY not in str(planned.headers)


def test_a_redirect_is_not_followed():
    with serving(Planned()) as other:
        away = (307, {"Location": other.url + "/chat/completions"}, {})
        with serving(Planned(lambda n, text: away)) as planned, pytest.raises(UserError, match="redirects"):
            ask([planned.url])
    assert other.bodies == []


def test_marks_and_special_words_never_reach_the_server(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (5, 4), "red").save(path)
    prompt = Prompt(f"Look: <image>\nTitle {OPEN}[INST] <image> <|im_end|> <b>{CLOSE}.", (path,))
    with serving(Planned()) as planned:
        ask([planned.url], [prompt])
    first, image, last = planned.bodies[0]["messages"][0]["content"]
    assert (first["text"], last["text"]) == ("Look: ", "\nTitle [ INST] < image> < |im_end|> <b>.")
    head, data = image["image_url"]["url"].split(",")
    assert head == "data:image/png;base64" and base64.b64decode(data) == path.read_bytes()
    assert planned.texts() == ["Look: <image>\nTitle [ INST] < image> < |im_end|> <b>."]


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


def test_an_image_that_cannot_be_read_is_refused_by_its_path_and_the_others_go_on(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    work = Batch([Prompt("<image>", (tmp_path / "bad.png",)), *PROMPTS], GREEDY)
    with (
        serving(Planned()) as planned,
        pytest.raises(UserError, match=r"1 prompts .*bad\.png: no image that can be read"),
    ):
        ServerModel(Endpoint("m", (planned.url,)), SETTINGS).write(work)
    assert len(work.answers) == 12


def test_a_penalty_of_the_users_own_is_sent_and_none_otherwise():
    with serving(Planned()) as planned:
        ask([planned.url], PROMPTS[:1])
        ask([planned.url], PROMPTS[:1], decoding=Decoding(9, rules=with_penalty("", 1.1, served=True)))
        assert [body.get("repetition_penalty") for body in planned.bodies] == [None, 1.1]


def test_nothing_is_asked_any_more_once_the_reader_stops():
    with serving(Planned(delay=0.05)) as planned:
        work = Batch([Prompt(str(n)) for n in range(200)], GREEDY)
        work.give = lambda arrived: 1 / 0  # the reader dies over the first answer
        with pytest.raises(ZeroDivisionError):
            ServerModel(Endpoint("m", (planned.url,)), SETTINGS).write(work)
        time.sleep(0.3)
        asked = len(planned.bodies)
        time.sleep(0.3)
        assert asked == len(planned.bodies) < 20


def test_a_server_that_lists_other_models_is_warned_about_and_asked_all_the_same(caplog):
    with serving(Planned(models=["other.gguf"])) as planned:
        assert texts(ask([planned.url])) == RIGHT
    assert "does not list model 'm'; it lists: other.gguf" in caplog.text


def test_a_server_whose_listing_fails_is_asked_all_the_same():
    with serving(Planned(models=None)) as planned:
        assert texts(ask([planned.url])) == RIGHT


def test_without_the_client_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r'pip install "recbole-mllm\[server\]"'):
        ServerModel(Endpoint("m", ("http://127.0.0.1:9/v1",)), SETTINGS)


def test_a_key_with_a_line_in_it_is_refused_unseen(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY} and more")
    with pytest.raises(UserError, match="OPENAI_API_KEY holds a space") as caught:
        ServerModel(Endpoint("m", ("http://127.0.0.1:9/v1",)), SETTINGS)
    assert KEY not in str(caught.value)


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
        ("server_concurrency", 0, "server_concurrency is 0; it must be a whole number, at least 1"),
        ("server_patience", -1.0, "must be a number, above 0"),
        ("server_key_env", KEY, "server_key_env must name an environment variable"),
        ("summary_top_p", 0.0, "summary_top_p is 0.0; it must be a number, above 0 and at most 1"),
        ("summary_repetition_penalty", 0, "above 0"),
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
        return make_stage({"data_path": str(tmp_path), "ITEM_ID_FIELD": "item_id"}, settings, torch.device("cpu")).tag

    assert tag(**both) == tag(**both, summary_seed=5, server_concurrency=2) != tag(**both, summary_temperature=0.6)
    assert tag(**both) != tag(**both, server_thinking=False), "YAML's off"
    assert tag(**both) == tag(**both, summary_repetition_penalty=None) != tag(**both, summary_repetition_penalty=1.1)
    assert tag(**both).startswith("m-recurrent-b3-text-")
