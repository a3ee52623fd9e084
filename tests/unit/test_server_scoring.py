"""Scoring through servers: what is asked, and how log-odds are read from typed decisions and log-probabilities."""

import base64
import io
import json
import math
from dataclasses import replace

import pytest
import stock_forward
import torch
from PIL import Image
from planned_server import Planned, completion, error, serving
from stock_forward import CPU, STYLE
from tiny_models import qwen3_vl
from transformers import AutoModelForImageTextToText

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.model_names import Endpoint
from recbole_mllm.common.prompts import read_style, recommend_prompt
from recbole_mllm.common.settings import ServerSettings
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.loading import load_processor
from recbole_mllm.mllm.server_scoring import ServedScorer, decision_request, scored_decision, spelt

pytest.importorskip("openai")

SETTINGS = ServerSettings(3, 5.0, 5.0, None)
MLLM = stock_forward.SETTINGS.mllm


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


def asked(planned, prompts, settings=SETTINGS, style=STYLE):
    with serving(planned):
        scorer = ServedScorer(Endpoint("m", (planned.url,)), settings)
        return scorer, scorer.yes_scores(prompts, scorer.answers(style)).tolist()


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


def test_a_real_models_log_probabilities_give_its_own_score(tiny, tmp_path):
    model = tiny
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


# Endpoints that score, spoken by a real model in the servers' own forms (docs/servers.md)


@pytest.fixture(scope="module")
def tiny():
    return HFModel("tiny", MLLM, CPU)


@pytest.mark.parametrize("path", ["/generative_scoring", "/v1/score"])
def test_probabilities_of_the_answers_tokens_are_those_of_this_process(tiny, path):
    prompts = [
        recommend_prompt(STYLE, f"likes {n} <image> </s>", title, None) for n in range(3) for title in ("mug", "car")
    ]
    asked = []

    def probabilities(body):
        asked.append(body)
        ids = torch.tensor([[*body["query"], *body["items"][0]]])
        with torch.inference_mode():
            logits = tiny.model(input_ids=ids).logits[0, -1].double()
        return logits[body["label_token_ids"]].softmax(-1).tolist()

    replies = {
        "/generative_scoring": lambda p: {"object": "list", "data": [{"index": 0, "object": "score", "score": p[0]}]},
        "/v1/score": lambda p: {"scores": [p], "model": "m", "object": "scoring"},
    }
    planned = Planned(posts={path: lambda body: (200, {}, replies[path](probabilities(body)))})
    with serving(planned):
        settings = replace(SETTINGS, server_scoring="score", server_tokenizer="tiny")
        scorer = ServedScorer(Endpoint("m", (planned.url,)), settings, MLLM)
        there = scorer.yes_scores(prompts, scorer.answers(STYLE))
    here = tiny.yes_scores(prompts, tiny.answers(STYLE))
    assert here.sigmoid().std() > 1e-4
    torch.testing.assert_close(there.sigmoid(), here.sigmoid(), atol=1e-5, rtol=0)
    assert all(body["apply_softmax"] and not body["item_first"] for body in asked)
    assert scorer.tokens_read == sum(len(one.ids) for one in tiny.encode(prompts)) and not planned.bodies


def test_token_ids_are_sent_for_no_image_and_to_no_server_without_the_endpoint(tmp_path):
    Image.new("RGB", (48, 64), "red").save(tmp_path / "red.png")
    planned, settings = Planned(), replace(SETTINGS, server_scoring="score", server_tokenizer="tiny")
    with serving(planned):
        scorer = ServedScorer(Endpoint("m", (planned.url,)), settings, MLLM)
        with pytest.raises(UserError, match="hold no image; set use_image: false or server_scoring: chat"):
            scorer.yes_scores([recommend_prompt(STYLE, "x", "mug", tmp_path / "red.png")], ("Yes", "No"))
        with pytest.raises(UserError, match=r"404: it has no /generative_scoring \(vLLM\) or /v1/score \(SGLang\)"):
            scorer.yes_scores(questions(), ("Yes", "No"))
        with pytest.raises(UserError, match="needs the tokenizer of 'm' here; set server_tokenizer"):
            ServedScorer(Endpoint("m", (planned.url,)), replace(settings, server_tokenizer=None), MLLM)
    assert not planned.bodies


class Reranker:
    """A Qwen3-VL made into a classifier of yes, behind vLLM's template for it, or SGLang's requests."""

    def __init__(self, folder, sglang):
        self.stock, self.processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), load_processor(folder)
        self.sglang = sglang

    def __call__(self, body):
        (document,), images = body["documents"], []
        if self.sglang and isinstance(document, dict) or not self.sglang and isinstance(document, list):
            return error(422, "Input should be a valid string")
        query, document = (self._text(part, images) for part in (body["query"], document))
        text = (
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        )
        text += 'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
        text += (
            f"<Instruct>: {body['instruct' if self.sglang else 'instruction']}<Query>:{query}\n<Document>:{document}"
        )
        text += "<|im_end|>\n<|im_start|>assistant\n"
        inputs = self.processor(text=[text], images=images or None, return_tensors="pt")
        yes, no = (self.processor.tokenizer(word)["input_ids"][0] for word in ("yes", "no"))
        head = (self.stock.lm_head.weight[yes] - self.stock.lm_head.weight[no]).double()
        with torch.no_grad():
            p = float((self.stock.model(**inputs).last_hidden_state[0, -1].double() @ head).sigmoid())
        one = {"index": 0, "score": p, "document": None} if self.sglang else {"index": 0, "relevance_score": p}
        return 200, {}, [one] if self.sglang else {"id": "x", "model": "m", "results": [one]}

    def _text(self, content, images):
        parts = content["content"] if isinstance(content, dict) else content
        if isinstance(parts, str):
            return parts
        for part in parts:
            if part["type"] == "image_url":
                data = base64.b64decode(part["image_url"]["url"].partition(";base64,")[2])
                images.append(Image.open(io.BytesIO(data)))
        return "".join(part.get("text", "<|vision_start|><|image_pad|><|vision_end|>") for part in parts)


@pytest.mark.parametrize("sglang", [False, True], ids=["vllm", "sglang"])
@pytest.mark.parametrize("item_first", [False, True])
def test_a_served_reranker_scores_as_in_this_process_with_images_and_without(reranker, sglang, item_first):
    style, likes = read_style("qwen3-vl-reranker"), ("likes cats", "likes a \n<Document>: of dogs")
    prompts = [
        recommend_prompt(style, like, f"mug {n}", image, item_first=item_first)
        for like in likes
        for n, image in enumerate((reranker / "red.png", None))
    ]
    mllm = HFModel(str(reranker), MLLM, CPU)
    here = mllm.yes_scores(prompts, mllm.answers(style))
    planned = Planned(posts={"/v1/rerank": Reranker(reranker, sglang)})
    _, there = asked(planned, prompts, replace(SETTINGS, server_scoring="rerank"), style)
    assert here.sigmoid().std() > 1e-3
    torch.testing.assert_close(torch.tensor(there).sigmoid(), here.sigmoid(), atol=1e-5, rtol=0)


def test_a_style_without_query_and_document_is_refused_before_a_request():
    planned = Planned()
    with pytest.raises(UserError, match="needs a prompt_style with <Instruct>, <Query> and <Document>"):
        asked(planned, questions(3), replace(SETTINGS, server_scoring="rerank"))
    assert not planned.bodies


@pytest.fixture(scope="module")
def reranker(tmp_path_factory):
    folder = qwen3_vl(tmp_path_factory.mktemp("reranker"))
    Image.effect_noise((40, 30), 60).convert("RGB").save(folder / "red.png")
    return folder


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
