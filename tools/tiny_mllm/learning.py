"""The loss over samples, the optimiser, and how far the model has come."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_mllm.demo.attributes import VISIBLE
from tiny_mllm.network import projected
from tiny_mllm.pictures import Pictures
from tiny_mllm.samples import Maker, Sample, Target

SLOT_NOISE = 0.3  # in standard deviations of the word embeddings; makes room for the projector's error


@dataclass(frozen=True, slots=True)
class Outcome:
    """The loss of a batch, and the logits ``[T, V]`` at each of its targets."""

    loss: Tensor
    logits: Tensor
    targets: list[Target]


def judge(model: Any, samples: Sequence[Sample], images: Tensor | None = None, noise: Tensor | None = None) -> Outcome:
    """Return the weighted cross-entropy over all targets of `samples`.

    Args:
        model: The tiny LLaVA.
        samples: B samples.
        images: ``[K, 16, 192]`` projected images, in order, for the K samples with slots; without them the slots keep
            the words they hold.
        noise: ``[S, 192]`` added to the S slots' words.
    """
    length = max(len(sample.ids) for sample in samples)
    ids = torch.tensor([sample.ids + [0] * (length - len(sample.ids)) for sample in samples])
    mask = torch.tensor([[1] * len(sample.ids) + [0] * (length - len(sample.ids)) for sample in samples])
    vectors = model.get_input_embeddings()(ids)
    rows, places = slot_places(samples)
    if images is not None:
        vectors = vectors.index_put((rows, places), images.flatten(0, 1).to(vectors.dtype))
    elif noise is not None:
        vectors = vectors.index_put((rows, places), vectors[rows, places] + noise)
    targets = [target for sample in samples for target in sample.targets]
    of = torch.tensor([row for row, sample in enumerate(samples) for _ in sample.targets])
    at = torch.tensor([target.position for target in targets])
    with torch.autocast("cpu", torch.bfloat16):
        states = model.model.language_model(inputs_embeds=vectors, attention_mask=mask).last_hidden_state
        logits = model.lm_head(states[of, at]).float()
    weights = torch.tensor([target.weight for target in targets])
    losses = F.cross_entropy(logits, torch.tensor([target.token for target in targets]), reduction="none")
    return Outcome((losses * weights).sum() / weights.sum(), logits.detach(), targets)


def slot_places(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Return row and position ``[S]`` of every image slot."""
    pairs = [(row, place) for row, sample in enumerate(samples) for place in sample.slots]
    both = torch.tensor(pairs, dtype=torch.long).view(-1, 2)
    return both[:, 0], both[:, 1]


def slot_noise(model: Any, samples: Sequence[Sample], generator: torch.Generator) -> Tensor:
    """Return ``[S, 192]`` noise for the slots of `samples`."""
    words: Tensor = model.get_input_embeddings().weight.detach()
    slots = sum(len(sample.slots) for sample in samples)
    return SLOT_NOISE * words.std() * torch.randn(slots, words.shape[1], generator=generator)


class Learner:
    """AdamW with warm-up, cosine decay and clipped gradients; `losses` are running means by name."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, steps: int, *, warm_up: int, decay: float):
        self.parameters = list(parameters)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=decay, betas=(0.9, 0.98))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, _warm_cosine(steps, warm_up))
        self.losses: dict[str, float] = {}

    def backward(self, **losses: Tensor) -> None:
        """Add the gradients of the sum of `losses`."""
        sum(losses.values(), torch.zeros(())).backward()
        for name, loss in losses.items():
            self.losses[name] = 0.95 * self.losses.get(name, loss.item()) + 0.05 * loss.item()

    def step(self) -> None:
        """Update the parameters and forget the gradients."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def __str__(self) -> str:
        return " ".join(f"{name} {loss:.4f}" for name, loss in self.losses.items())


def _warm_cosine(steps: int, warm_up: int, floor: float = 0.03) -> Callable[[int], float]:
    def factor(step: int) -> float:
        return min(1, (step + 1) / warm_up) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps)))

    return factor


@torch.no_grad()
def progress(model: Any, maker: Maker, count: int = 100) -> dict[str, float]:
    """Return accuracies on fixed samples, by what is learnt; slots hold words here."""
    fresh = Maker(maker.tokenizer, maker.style, Random(9))
    tasks: dict[str, Callable[[], Sample]] = {
        "summary": fresh.summary,
        "caption": fresh.caption,
        "text": fresh.text_summary,
        "fused": fresh.fused_summary,
        "titles": fresh.title_match,
        "match": fresh.match,
    }
    result: dict[str, float] = {}
    for name, make in tasks.items():
        samples = [make() for _ in range(3 * count if name == "match" else count)]
        result |= {f"{name} {kind}": share for kind, share in _accuracies(judge(model, samples), fresh).items()}
    return result


def _accuracies(outcome: Outcome, maker: Maker) -> dict[str, float]:
    said = outcome.logits.argmax(1)
    says_yes = outcome.logits[:, maker.yes] > outcome.logits[:, maker.no]
    right: dict[str, list[bool]] = {}
    for i, target in enumerate(outcome.targets):
        if target.kind == "decision":
            if target.token == maker.yes and abs(target.weight - 0.5) > 0.3:  # leave out two or three agreeing fields
                right.setdefault("decision", []).append(bool(says_yes[i]) == (target.weight > 0.5))
        elif target.kind.startswith("agree"):
            right.setdefault(target.kind, []).append(bool(says_yes[i]) == (target.token == maker.yes))
        else:
            right.setdefault(target.kind, []).append(bool(said[i] == target.token))
    return {kind: round(sum(hits) / len(hits), 3) for kind, hits in right.items()}


@torch.no_grad()
def caption_accuracy(model: Any, maker: Maker, pictures: Pictures) -> dict[str, float]:
    """Return the share of right words by field on held-out real images, each word given the right ones before it."""
    numbers = pictures.unseen
    samples = [maker.caption(pictures.items[n]) for n in numbers]
    outcome = judge(model, samples, projected(model, pictures.normalised(numbers)))
    values = [i for i, target in enumerate(outcome.targets) if target.kind == "value"]
    tokens = torch.tensor([outcome.targets[i].token for i in values])
    hits = (outcome.logits[values].argmax(1) == tokens).view(len(numbers), -1).float().mean(0).tolist()
    return {name: round(hit, 3) for name, hit in zip(VISIBLE, hits, strict=True)}
