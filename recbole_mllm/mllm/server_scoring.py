"""A recommender behind servers: its pairs are scored there, in one of four ways (docs/servers.md)."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.model_names import Endpoint, pinned
from recbole_mllm.common.prompts import IMAGE, Prompt, Style
from recbole_mllm.common.settings import MLLMSettings, ServerSettings
from recbole_mllm.mllm.encoder import Encoder, answer_tokens
from recbole_mllm.mllm.hf import encoder_of
from recbole_mllm.mllm.interface import Answer, Ask, Batch, Decoding, Scored
from recbole_mllm.mllm.server import Requests, make_hosts
from recbole_mllm.mllm.server_host import Failure, FailureKind, Host
from recbole_mllm.mllm.server_messages import cut, data_url, messages, query_and_document, shortened_prompt, tokens

QUESTION = "answer"
TOP = 20  # log-probabilities a chat completion is asked for: OpenAI's most, and what servers allow by default
_TINY = 1e-45  # a probability of exactly 0 or 1 has no logarithm; float32's smallest has
_BELOW_ONE = 1.0 - 2.0**-25  # nearer to 1 than any float32 but 1 itself
_SPACES = " \t\r\n\u2581\u0120\u010a"  # with the marks that tokenisers write for a space and a line's end
_ONE_TOKEN = Decoding(1)
_ABSENT = (404, 405, 501)  # what servers say to a path they do not have
_UNKNOWN_FORM = (400, 422)  # what servers say to a body of another form than theirs
IMAGES_LOST = "server_scoring: score sends token ids, which hold no image; set use_image: false or server_scoring: chat"
_INSTRUCTIONS = "Instructions that the template of an export leaves out."


class ServedScorer:
    """Scores prompts as `HFModel` does, without weights here. Servers that fail are treated as for summaries.

    Without a ``server_scoring`` a server is asked at ``/v1/systemone`` until it turns out to have none, then by a
    chat completion of one token. `mllm` says how the prompts of ``score`` are encoded, here.

    Raises:
        UserError: As `make_hosts`; or the tokenizer that ``score`` needs cannot be had.
    """

    model = encoder = None  # nothing of it is in this process

    def __init__(self, endpoint: Endpoint, settings: ServerSettings, mllm: MLLMSettings | None = None) -> None:
        self.identity = endpoint.identity
        self.settings = settings
        self.hosts = make_hosts(endpoint, settings)
        self.tokens_read = self.scored = self.bounded = self.unknown = 0
        self._words, self._labels = ("Yes", "No"), list[int]()
        self._without_decisions: set[Host] = set()
        self._looked_at: set[Host] = set()
        self._forms: dict[Host, int] = {}  # which of the forms of a request a server takes
        self._encoder: Encoder | None = None
        if settings.server_scoring == "score" and mllm is not None:
            name = settings.server_tokenizer or endpoint.model
            try:
                self._encoder = encoder_of(pinned(name), mllm)
            except UserError as error:
                raise UserError(
                    f"server_scoring: score needs the tokenizer of {endpoint.model!r} here; set server_tokenizer to "
                    f"its hub id or folder ({error})"
                ) from error

    def answers(self, style: Style) -> tuple[str, str]:
        """Return the style's words for Yes and No."""
        return style.answer_yes, style.answer_no

    def yes_scores(self, prompts: Sequence[Prompt], answers: tuple[str, str], *, share_prefix: bool = True) -> Tensor:
        """Return ``[B]`` float32 log-odds of Yes against No for each prompt; what servers share is their own business.

        Raises:
            UserError: As `ServerModel.write` does; scores that had arrived are lost then, as no store keeps them.
        """
        self._words = answers
        if self._encoder is not None:
            if any(prompt.images for prompt in prompts):
                raise UserError(IMAGES_LOST)
            found = answer_tokens(self._encoder, *answers)
            self._labels = [found.yes[0], found.no[0]]
        work = Batch(prompts, _ONE_TOKEN)
        Requests(work, self.hosts, self.settings, self._request).run()
        scores = [score for place in range(len(prompts)) if isinstance(score := work.answers[place], Scored)]
        self.scored += len(scores)
        self.tokens_read += sum(score.prompt_tokens for score in scores)
        self.bounded += sum(score.missing == 1 for score in scores)
        self.unknown += sum(score.missing > 1 for score in scores)
        if any(score.missing for score in scores):
            logging.getLogger().warning(
                f"{self.identity}: of {self.scored} pairs, {self.bounded} had one of {'/'.join(answers)} outside "
                f"the {TOP} likeliest tokens, and a bound in its place; {self.unknown} had both, and the score 0"
            )
        return torch.tensor([score.log_odds for score in scores], dtype=torch.float32)

    async def _request(self, host: Host, ask: Ask, shortened: int) -> Answer | Failure:
        """Ask in the way that is chosen; by itself for a typed decision where the server may have them."""
        if self._encoder is not None:
            return await self._label_tokens(host, self._encoder(shortened_prompt(ask.prompt, shortened)).ids)
        if self.settings.server_scoring == "rerank":
            return await self._reranked(host, ask.prompt, shortened)
        if host not in self._without_decisions and self.settings.server_scoring is None:
            body = decision_request(host.model, ask.prompt, shortened=shortened)
            outcome = await host.call(lambda client: self._decision(host, client, body))
            if isinstance(outcome, Answer) or outcome.status not in _ABSENT:
                return outcome
            if host not in self._without_decisions:
                self._without_decisions.add(host)
                logging.getLogger().info(
                    f"server {host.url} takes no typed decisions; asked for log-probabilities instead"
                )
        turns = messages(ask.prompt, shortened)

        async def request(client: Any) -> Scored:
            completion = await client.chat.completions.create(
                model=host.model,
                messages=turns,
                max_tokens=1,
                temperature=0.0,
                logprobs=True,
                top_logprobs=TOP,
                extra_body=host.unthinking or None,
            )
            return scored_completion(completion, self._words)

        return await host.call(request)

    async def _label_tokens(self, host: Host, ids: Sequence[int]) -> Answer | Failure:
        """Ask for the probabilities of the answers' tokens behind `ids`."""
        *query, last = ids
        body: dict[str, Any] = {"model": host.model, "query": query, "items": [[last]]}
        body |= {"label_token_ids": self._labels, "apply_softmax": True, "item_first": False}

        async def vllm(client: Any) -> Scored:
            found = await client.post(f"{host.url.removesuffix('/v1')}/generative_scoring", body=body, cast_to=object)
            return Scored("", len(ids), 0, log_odds=log_odds(found["data"][0]["score"]))

        async def sglang(client: Any) -> Scored:
            ((yes, no),) = (await client.post("/score", body=body, cast_to=object))["scores"]
            return Scored("", len(ids), 0, log_odds=log_odds(yes, no))

        return await self._first_form(host, (vllm, sglang), _ABSENT, "/generative_scoring (vLLM) or /v1/score (SGLang)")

    async def _reranked(self, host: Host, prompt: Prompt, shortened: int) -> Answer | Failure:
        """Ask a reranker, whose own template words the question; parts with an image stand in one of two forms."""
        instruction, *pair = query_and_document(prompt, shortened)

        def asked(form: Callable[[Any], Any]) -> Callable[[Any], Awaitable[Scored]]:
            query, document = (part if isinstance(part, str) else form(part) for part in pair)
            body = {"model": host.model, "query": query, "documents": [document]}
            body |= {"instruction": instruction, "instruct": instruction}  # vLLM's name for it, and SGLang's

            async def request(client: Any) -> Scored:
                found = await client.post("/rerank", body=body, cast_to=object)
                (one,) = found["results"] if isinstance(found, dict) else found
                return Scored("", 0, 0, log_odds=log_odds(one.get("relevance_score", one.get("score"))))

            return request

        forms = (asked(lambda parts: {"content": parts}), asked(lambda parts: parts))
        return await self._first_form(host, forms if prompt.images else forms[:1], _UNKNOWN_FORM, "/v1/rerank")

    async def _first_form(
        self, host: Host, forms: Sequence[Callable[[Any], Awaitable[Scored]]], other: Collection[int], path: str
    ) -> Answer | Failure:
        """Make the request of `forms` that `host` takes: the first without a status of `other`, then always it."""
        outcome: Answer | Failure
        for place in [self._forms[host]] if len(forms) > 1 and host in self._forms else range(len(forms)):
            outcome = await host.call(forms[place])
            if isinstance(outcome, Answer) and len(forms) > 1:
                self._forms[host] = place
            if isinstance(outcome, Answer) or outcome.status not in other or outcome.kind is FailureKind.TOO_LONG:
                break
        if isinstance(outcome, Failure) and outcome.status in _ABSENT:
            text = f"{outcome.status}: it has no {path}; set another server_scoring, or give the URL that ends in /v1"
            return replace(outcome, kind=FailureKind.FATAL, text=text)
        return outcome

    async def _decision(self, host: Host, client: Any, body: dict[str, Any]) -> Scored:
        """Ask for a decision; once a server, warn where it adds words of its own: its model has no template of ours."""
        score = scored_decision(await client.post("/systemone", body=body, cast_to=object))
        if host not in self._looked_at:
            self._looked_at.add(host)
            question = {**body["questions"][QUESTION], "instructions": _INSTRUCTIONS}
            asked = {**body, "questions": {QUESTION: question}}
            longer = scored_decision(await client.post("/systemone", body=asked, cast_to=object))
            if longer.prompt_tokens != score.prompt_tokens:
                logging.getLogger().warning(
                    f"server {host.url} adds words of its own to every question, as {host.model!r} has no "
                    "decision_template.jinja of recbole-mllm; for the prompt of training serve a folder that `export` "
                    "wrote"
                )
        return score


def decision_request(model: str, prompt: Prompt, instructions: str | None = None, shortened: int = 0) -> dict[str, Any]:
    """Return the body of a ``/v1/systemone`` request: the question as `state`, its images as `assets`.

    The style's own words may name no image twice, and no title may name one at all; so the placeholders are such as
    occur nowhere in the text.
    """
    pieces = cut(prompt, shortened)
    text = "".join(pieces)
    assets, names = {}, []
    for number, path in enumerate(prompt.images, start=1):
        name = f"<image-{number}>"
        while name in text:
            name = f"<{name}>"
        kind, _, data = data_url(path).partition(";base64,")
        assets[name] = {"type": "image", "format": kind.rpartition("/")[2], "data_base64": data}
        names.append(name)
    left = iter(names)
    for place in range(0, len(pieces), 2):  # marks in filled-in texts are plain text
        head, *tails = pieces[place].split(IMAGE)
        pieces[place] = head + "".join(next(left) + tail for tail in tails)
    question = {"type": "noul", "instructions": instructions}
    return {"model": model, "state": "".join(pieces), "questions": {QUESTION: question}, "assets": assets}


def scored_decision(answer: Any) -> Scored:
    """Return the log-odds of P(Yes), which the server gives itself.

    Raises:
        ValueError: There is no probability in the answer.
    """
    try:
        p = float(answer["answers"][QUESTION]["noul"])
        read = tokens((answer.get("usage") or {}).get("input_tokens"))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("the decision holds no probability") from error
    return Scored("", read, 0, log_odds=log_odds(p))


def log_odds(yes: Any, no: Any = None) -> float:
    """Return the log-odds of a probability, or of two that add up to 1, which tell more near 0 and 1.

    Raises:
        ValueError: It is none.
    """
    p = float(yes)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"the answer's probability is {p}")
    if no is not None and p > 0.0 and 0.0 < float(no) <= 1.0:
        return math.log(p) - math.log(float(no))
    p = min(max(p, _TINY), _BELOW_ONE)
    return math.log(p) - math.log1p(-p)


def scored_completion(completion: Any, words: tuple[str, str]) -> Scored:
    """Return log P(Yes) - log P(No) by the log-probabilities of a chat completion's first token.

    A word that is not among them is less likely than the least likely one that is, which takes its place: the
    difference keeps its sign and can only be too small. If neither is there, nothing is known: 0.

    Raises:
        ValueError: There are no log-probabilities in the answer, or such as are no numbers.
    """
    try:
        listed = completion.choices[0].logprobs.content[0].top_logprobs
        entries = [(str(entry.token), float(entry.logprob)) for entry in listed]
        least = min(value for _, value in entries)
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ValueError("the answer holds no log-probabilities; the server must give logprobs") from error
    found = spelt(entries, words)
    missing = found.count(None)
    yes, no = (least if value is None else value for value in found)
    odds = 0.0 if missing == len(words) else yes - no
    if not math.isfinite(odds):
        raise ValueError("the answer's log-probabilities are no numbers")
    usage = getattr(completion, "usage", None)
    return Scored("", tokens(getattr(usage, "prompt_tokens", 0)), 1, log_odds=odds, missing=missing)


def spelt(entries: Iterable[tuple[str, float]], words: tuple[str, str]) -> list[float | None]:
    """Return the log-probability of each word as an answer's first token, or None where no token spells it.

    Spellings that differ in the space around the word are added up (``Yes`` and `` Yes``): which of them a model was
    trained on is the tokeniser's business, and a server's client has none. Case counts. Where no token spells either
    word whole, as with a tokeniser that cuts both, tokens that begin one word and not the other stand for it.
    """
    bare = [(token.strip(_SPACES), value) for token, value in entries]
    whole = [[value for token, value in bare if token == word] for word in words]
    if not any(whole):
        whole = [
            [value for token, value in bare if token and word.startswith(token) and not other.startswith(token)]
            for word, other in (words, words[::-1])
        ]
    with np.errstate(invalid="ignore"):  # what is no number is refused by the caller
        return [float(np.logaddexp.reduce(values)) if values else None for values in whole]
