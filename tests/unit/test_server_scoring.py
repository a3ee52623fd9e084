"""Scoring through servers: what is asked, and how log-odds are read from typed decisions and log-probabilities."""

import base64
import json
import math
from dataclasses import replace

import pytest
import torch
import yaml
from PIL import Image
from planned_server import Planned, completion, error, serving

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.model_names import Endpoint
from recbole_mllm.common.prompts import Style, recommend_prompt
from recbole_mllm.common.resources import resource
from recbole_mllm.common.settings import ServerSettings, Settings
from recbole_mllm.mllm.server_scoring import ServedScorer, decision_request, scored_decision, spelt

pytest.importorskip("openai")

STYLE = Style.from_mapping("demo", yaml.safe_load(resource("prompt", "demo").read_text()))
SETTINGS = ServerSettings(3, 5.0, 5.0, None)


def logprobs(**tokens):
    """A completion whose first token has these log-probabilities."""
    status, headers, body = completion("Yes")
    entries = [{"token": token, "logprob": value, "bytes": None} for token, value in tokens.items()]
    content = [{"token": "Yes", "logprob": 0.0, "bytes": None, "top_logprobs": entries}]
    body["choices"][0]["logprobs"] = {"content": content, "refusal": None}
    return status, headers, body


def decided(p, tokens=11):
    return (
        200,
        {},
        {"model": "m", "answers": {"answer": {"type": "noul", "noul": p}}, "usage": {"input_tokens": tokens}},
    )


def asked(planned, prompts, settings=SETTINGS):
    with serving(planned):
        scorer = ServedScorer(Endpoint("m", (planned.url,)), settings)
        return scorer, scorer.yes_scores(prompts, scorer.answers(STYLE)).tolist()


def questions(count=1):
    return [recommend_prompt(STYLE, "likes red", f"mug {n}", None) for n in range(count)]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ({"Yes": -1.0, "No": -3.0, "Maybe": -4.0}, 2.0),
        ({" Yes": math.log(0.2), "Yes": math.log(0.1), "No": math.log(0.4), "the": -9.0}, math.log(0.3 / 0.4)),
        ({"\u2581Yes": -2.0, "ĠNo": -1.0, "yes": -0.1, "Yesterday": -0.1}, -1.0),
        ({"Yes": -1.0, "N": -5.0, "a": -7.0}, 6.0),  # a beginning does not stand for a word where the other is whole
        ({"Y": -1.0, "N": -2.5, "a": -7.0}, 1.5),
    ],
)
def test_words_are_added_up_over_their_spellings(tokens, expected):
    scorer, (score,) = asked(Planned(lambda n, text: logprobs(**tokens)), questions())
    assert score == pytest.approx(expected, abs=1e-6)


def test_a_missing_word_is_bounded_and_both_are_unknown_and_all_is_counted(caplog):
    plans = {
        "mug 0": logprobs(Yes=-0.5, a=-6.0),
        "mug 1": logprobs(No=-0.5, a=-6.0),
        "mug 2": logprobs(a=-1.0, b=-2.0),
        "mug 3": logprobs(Yes=-1.0, No=-1.5),
    }
    planned = Planned(lambda n, text: next(reply for key, reply in plans.items() if key in text))
    scorer, scores = asked(planned, questions(4))
    assert scores == pytest.approx([5.5, -5.5, 0.0, 0.5])
    assert (scorer.scored, scorer.bounded, scorer.unknown) == (4, 2, 1)
    assert "of 4 pairs, 2 had one of Yes/No outside the 20 likeliest" in caplog.text and "1 had both" in caplog.text
    body = planned.bodies[0]
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"], body["temperature"]) == (1, True, 20, 0.0)
    assert "chat_template_kwargs" not in body
    asked(planned, questions(), replace(SETTINGS, server_thinking="off"))
    assert planned.bodies[-1]["chat_template_kwargs"] == {"enable_thinking": False}


def test_a_real_models_log_probabilities_give_its_own_score(tmp_path):
    from recbole_mllm.mllm.hf import HFModel

    base = yaml.safe_load(resource("model", "MLLMMSR").read_text())
    model = HFModel("tiny", Settings.from_config(base | {"mllm": "tiny"}).mllm, torch.device("cpu"))
    Image.new("RGB", (48, 64), "red").save(tmp_path / "red.png")
    prompts = [recommend_prompt(STYLE, "likes red", title, tmp_path / "red.png") for title in ("mug", "blue car")]
    by_text = {prompt.text: prompt for prompt in prompts}

    def speak(number, text):
        encoded = model.encoder(by_text[text])
        pixels = encoded.images[0].tensors
        with torch.inference_mode():
            logits = model.model(input_ids=torch.tensor([encoded.ids]), **pixels).logits[0, -1].float()
        top = logits.log_softmax(-1).topk(20)
        return logprobs(**{model.encoder.tokenizer.decode([i]): float(v) for v, i in zip(*map(list, top), strict=True)})

    here = model.yes_scores(prompts, model.answers(STYLE))
    _, there = asked(Planned(speak), prompts)
    torch.testing.assert_close(torch.tensor(there).sigmoid(), here.sigmoid(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_log_probabilities_that_are_no_numbers_are_no_score(value):
    replies = [logprobs(Yes=value, No=-1.0), logprobs(Yes=-1.0, No=-2.0)]
    _, scores = asked(Planned(lambda n, text: replies[min(n, 1)]), questions())
    assert scores == pytest.approx([1.0])


@pytest.mark.parametrize("status", [404, 405])
def test_typed_decisions_are_preferred_and_their_absence_is_found_out_once_a_thread(status):
    planned = Planned(lambda n, text: logprobs(Yes=-1.0, No=-2.0), decide=lambda body: error(status))
    _, scores = asked(planned, questions(30))
    assert scores == [1.0] * 30 and len(planned.bodies) == 30
    assert 1 <= len(planned.decisions) <= SETTINGS.server_concurrency


def test_a_decisions_probability_becomes_log_odds_and_extremes_stay_finite(caplog):
    ps = {"mug 0": 0.25, "mug 1": 0.0, "mug 2": 1.0, "mug 3": 0.5}
    planned = Planned(decide=lambda body: decided(next(p for key, p in ps.items() if key in body["state"])))
    scorer, scores = asked(planned, questions(4))
    assert scores[0] == pytest.approx(math.log(1 / 3)) and scores[3] == 0.0
    assert scores[1] < -80 and 17 < scores[2] < 18 and not planned.bodies
    assert "adds words of its own" not in caplog.text and scorer.tokens_read == 44


def test_a_template_that_adds_instructions_is_told_of_once(caplog):
    planned = Planned(decide=lambda body: decided(0.5, 11 + 9 * bool(body["questions"]["answer"]["instructions"])))
    asked(planned, questions(9))
    assert caplog.text.count("adds words of its own to every question, as 'm' has no decision_template.jinja") == 1


def test_a_question_too_long_for_the_server_is_shortened(caplog):
    def decide(body):
        return error(400, "maximum context length is 100") if len(body["state"]) > 100 else decided(0.75)

    _, scores = asked(Planned(decide=decide), [recommend_prompt(STYLE, "red " * 100, "mug", None)])
    assert scores == pytest.approx([math.log(3)]) and "1 prompts were too long" in caplog.text


def test_an_image_goes_by_a_placeholder_that_no_title_holds(tmp_path):
    Image.new("RGB", (4, 3), "red").save(tmp_path / "red.png")
    prompt = recommend_prompt(STYLE, "likes <image> and <image-1>", "mug", tmp_path / "red.png")
    body = decision_request("m", prompt)
    ((name, asset),) = body["assets"].items()
    assert body["state"].count(name) == 1 and name != "<image-1>"
    assert body["state"].replace(name, "<image>", 1) == prompt.text
    assert base64.b64decode(asset["data_base64"]) == (tmp_path / "red.png").read_bytes() and asset["format"] == "png"
    assert json.loads(json.dumps(body)) == body


@pytest.mark.parametrize("answer", [None, [], {"answers": {}}, {"answers": {"answer": {"noul": 1.5}}}])
def test_an_answer_without_a_probability_is_refused(answer):
    with pytest.raises(ValueError, match="probability"):
        scored_decision(answer)


def test_what_gives_no_log_probabilities_says_so_and_other_words_count_for_nothing():
    with pytest.raises(UserError, match="the answer holds no log-probabilities"):
        asked(Planned(), questions(3), replace(SETTINGS, server_patience=1.0))
    assert spelt([("yes", -1.0), ("NO", -1.0), ("", -1.0), (" ", -1.0)], ("Yes", "No")) == [None, None]
