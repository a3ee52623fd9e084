"""One (preference, candidate) pair as a server is asked to score it, and the log-odds of Yes read off its answer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from recbole_mllm.common.prompts import IMAGE, Prompt
from recbole_mllm.mllm.interface import Scored
from recbole_mllm.mllm.server_messages import cut, data_url, tokens

QUESTION = "answer"
TOP = 20  # log-probabilities a chat completion is asked for: OpenAI's most, and what servers allow by default
_TINY = 1e-45  # a probability of exactly 0 or 1 has no logarithm; float32's smallest has
_BELOW_ONE = 1.0 - 2.0**-25  # nearer to 1 than any float32 but 1 itself
_SPACES = " \t\r\n\u2581\u0120\u010a"  # with the marks that tokenisers write for a space and a line's end


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
    """Return the log-odds of P(Yes), which the server tells itself.

    Raises:
        ValueError: There is no probability in the answer.
    """
    try:
        p = float(answer["answers"][QUESTION]["noul"])
        usage = answer.get("usage") or {}
        read = tokens(usage.get("input_tokens"))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("the decision holds no probability") from error
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"the decision's probability is {p}")
    p = min(max(p, _TINY), _BELOW_ONE)
    return Scored("", read, 0, log_odds=math.log(p) - math.log1p(-p))


def scored_completion(completion: Any, words: tuple[str, str]) -> Scored:
    """Return log P(Yes) - log P(No) by the log-probabilities of a chat completion's first token.

    A word that is not among them is less likely than the least likely one that is, which takes its place: the
    difference keeps its sign and can only be too small. If neither is there, nothing is known: 0.

    Raises:
        ValueError: There are no log-probabilities in the answer, or such as are no numbers.
    """
    try:
        told = completion.choices[0].logprobs.content[0].top_logprobs
        entries = [(str(entry.token), float(entry.logprob)) for entry in told]
    except (AttributeError, IndexError, TypeError) as error:
        raise ValueError("the answer holds no log-probabilities; the server must give logprobs") from error
    if not entries:
        raise ValueError("the answer holds no log-probabilities; the server must give top_logprobs")
    usage = getattr(completion, "usage", None)
    read = tokens(getattr(usage, "prompt_tokens", 0))
    yes, no = spelt(entries, words)
    least = min(value for _, value in entries)
    missing = (yes is None) + (no is None)
    odds = 0.0 if missing == len(words) else (least if yes is None else yes) - (least if no is None else no)
    if not math.isfinite(odds):
        raise ValueError("the answer's log-probabilities are no numbers")
    return Scored("", read, 1, log_odds=odds, missing=missing)


def spelt(entries: Iterable[tuple[str, float]], words: tuple[str, str]) -> tuple[float | None, float | None]:
    """Return the log-probability of each word as an answer's first token, or None where no token spells it.

    Spellings that differ in the space around the word are added up (``Yes`` and `` Yes``): which of them a model was
    trained on is the tokeniser's business, and a server's client has none. Case counts. Where no token spells either
    word whole, as with a tokeniser that cuts both, tokens that begin one word and not the other stand for it.
    """
    bare = [(token.strip(_SPACES), value) for token, value in entries]
    whole: list[float | None] = [_sum(value for token, value in bare if token == word) for word in words]
    if whole == [None, None]:
        first, second = words
        whole = [
            _sum(value for token, value in bare if token and word.startswith(token) and not other.startswith(token))
            for word, other in ((first, second), (second, first))
        ]
    return whole[0], whole[1]


def _sum(values: Iterable[float]) -> float | None:
    """Return the logarithm of the sum of probabilities given by logarithms; None for no value."""
    kept = list(values)
    top = max(kept, default=-math.inf)
    if top == -math.inf:
        return None
    return top + math.log(sum(math.exp(value - top) for value in kept))


def same_question(plain: Mapping[str, Any], told: Mapping[str, Any]) -> bool:
    """Whether two answers read prompts of one length: then the template does not add the instructions to the state."""
    return (plain.get("usage") or {}).get("input_tokens") == (told.get("usage") or {}).get("input_tokens")
