"""A recommender behind servers: its pairs are scored there, by typed decisions or by log-probabilities."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recbole_mllm.common.endpoints import Endpoint
from recbole_mllm.common.prompts import Prompt, Style
from recbole_mllm.common.settings import ServerSettings
from recbole_mllm.mllm.decision import TOP, decision_request, same_question, scored_completion, scored_decision
from recbole_mllm.mllm.interface import Answer, Ask, Batch, Decoding, Scored
from recbole_mllm.mllm.server import Requests, make_hosts
from recbole_mllm.mllm.server_host import Failure, FailureKind, Host
from recbole_mllm.mllm.server_messages import message

_ONE_TOKEN = Decoding(1)
_ABSENT = (404, 405, 501)  # what servers say to a path they do not have
_INSTRUCTIONS = "Instructions that the template of an export leaves out."


class ServedScorer:
    """Scores prompts as `HFModel` does, without weights here. Servers that fail are treated as for summaries.

    A server is asked at ``/v1/systemone`` until it turns out to have none, then by a chat completion of one token.

    Raises:
        UserError: The client is not installed, or a server refuses the key.
    """

    def __init__(self, endpoint: Endpoint, settings: ServerSettings) -> None:
        self.identity = endpoint.identity
        self.settings = settings
        self.hosts = make_hosts(endpoint, settings)
        self.tokens_read = self.scored = self.bounded = self.unknown = 0
        self._words = ("Yes", "No")
        self._without_decisions: set[Host] = set()
        self._looked_at: set[Host] = set()

    def answers(self, style: Style) -> tuple[str, str]:
        """Return the style's words for Yes and No."""
        return style.answer_yes, style.answer_no

    def yes_scores(self, prompts: Sequence[Prompt], answers: tuple[str, str], *, share_prefix: bool = True) -> Tensor:
        """Return ``[B]`` float32 log-odds of Yes against No for each prompt; what servers share is their own business.

        Raises:
            UserError: As `ServerModel.write` does; scores that had arrived are lost then, as no store keeps them.
        """
        self._words = answers
        work = Batch(prompts, _ONE_TOKEN)
        Requests(work, self.hosts, self.settings, self._request).run()
        found = [work.answers[place] for place in range(len(prompts))]
        scores = [answer for answer in found if isinstance(answer, Scored)]
        self._count(scores)
        return torch.tensor([score.log_odds for score in scores], dtype=torch.float32)

    def _count(self, scores: Sequence[Scored]) -> None:
        self.scored += len(scores)
        self.tokens_read += sum(score.prompt_tokens for score in scores)
        self.bounded += sum(score.missing == 1 for score in scores)
        self.unknown += sum(score.missing > 1 for score in scores)
        if any(score.missing for score in scores):
            logging.getLogger().warning(
                f"{self.identity}: of {self.scored} pairs, {self.bounded} had one of {'/'.join(self._words)} outside "
                f"the {TOP} likeliest tokens, and a bound in its place; {self.unknown} had both, and the score 0"
            )

    def _request(self, host: Host, ask: Ask, shortened: int) -> Answer | Failure:
        """Ask in the way the server is known to have."""
        if host not in self._without_decisions:
            body = decision_request(host.model, ask.prompt, shortened=shortened)
            outcome = host.call(lambda client: self._decision(host, client, body), absent=_ABSENT)
            if isinstance(outcome, Answer) or outcome.kind is not FailureKind.ABSENT:
                return outcome
            if host not in self._without_decisions:
                self._without_decisions.add(host)
                logging.getLogger().info(
                    f"server {host.url} takes no typed decisions; asked for log-probabilities instead"
                )
        turn = message(ask.prompt, shortened)
        return host.call(
            lambda client: scored_completion(
                client.chat.completions.create(
                    model=host.model,
                    messages=[turn],
                    max_tokens=1,
                    temperature=0.0,
                    logprobs=True,
                    top_logprobs=TOP,
                    extra_body=host.unthinking or None,
                ),
                self._words,
            )
        )

    def _decision(self, host: Host, client: Any, body: dict[str, Any]) -> Scored:
        answer = client.post("/systemone", body=body, cast_to=object)
        score = scored_decision(answer)
        if host not in self._looked_at:
            self._looked_at.add(host)
            _look_at_template(host, client, body, answer)
        return score


def _look_at_template(host: Host, client: Any, body: dict[str, Any], answer: Any) -> None:
    """Say so where the server adds words of its own to the question: its model has no template of ours."""
    instructed = {name: {**question, "instructions": _INSTRUCTIONS} for name, question in body["questions"].items()}
    if not same_question(answer, client.post("/systemone", body={**body, "questions": instructed}, cast_to=object)):
        logging.getLogger().warning(
            f"server {host.url} adds words of its own to every question, as {host.model!r} has no "
            "decision_template.jinja of recbole-mllm; for the prompt of training serve a folder that `export` wrote"
        )
