"""Score prompts through a prefix trie: what several prompts share (an item's image and title) is computed once.

The order of prompts does not matter; they are sorted here. A shared prefix never ends inside an image, and always
leaves each prompt at least one token of its own. Key-value caches live while their node is scored, no longer.

Families with a row in ``families`` are tested; any other may read its prompt in a way nobody here has thought of, and
is checked once against its own plain forward pass.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import DynamicCache

from recbole_mllm.common.errors import UserError, first_line
from recbole_mllm.mllm.backbone import Backbone
from recbole_mllm.mllm.encoder import Encoded
from recbole_mllm.mllm.memory import in_batches

# fastest first. shared: common prefixes once; flat: batches of whole prompts; plain: its own call, one at a time
ScoringMode = Literal["shared", "flat", "plain"]
LEAST_GAIN = 512  # tokens a shared prefix must save to be worth a forward pass, and smaller batches behind it
# How far a mode's logits may be off, root mean square over a sample of the vocabulary, by rounding alone: in float32 a
# part of the logits' own, in half precision so many of its steps, or twice what padding moves. Right modes of the
# tested families are off by at most 1.1 steps, attention in both directions that a mode lacks by at least 2.4
_EXACT, _STEPS, _NOISES = 1e-4, 1.5, 2
_SAMPLE, _MASKED = 512, 1e4
# What a model that knows nothing of our caches, features or positions may raise
UNSUITED = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


def yes_logits(
    body: Backbone,
    prompts: Sequence[Encoded],
    tokens: Sequence[int],
    *,
    share_prefix: bool = True,
    name: Callable[[int], str] = str,
) -> Tensor:
    """Return ``[B, len(tokens)]`` float32 logits of `tokens` at the position behind each prompt.

    Args:
        body: The model.
        prompts: What is scored, in any order.
        tokens: The ids whose logits are wanted.
        share_prefix: Whether a prefix several prompts share may be computed once.
        name: Names the n-th prompt to the user, where it alone is too large for the memory.
    """
    if not prompts:
        return torch.empty(0, len(tokens))
    mode = scoring_mode(body, prompts, tokens)
    if mode == "plain":
        return torch.stack([plain_logits(body, prompt, tokens) for prompt in prompts])
    return Trie(body, prompts, tokens, name, LEAST_GAIN).score(share=mode == "shared" and share_prefix)


def plain_logits(body: Backbone, prompt: Encoded, tokens: Sequence[int]) -> Tensor:
    """Return ``[len(tokens)]`` float32 logits behind `prompt` by the model's own forward pass with pixels."""
    return body.plain_logits(prompt)[-1, list(tokens)].cpu()


def scoring_mode(body: Backbone, prompts: Sequence[Encoded], tokens: Sequence[int]) -> ScoringMode:
    """Return the fastest mode that is exact for this model, found once, by two of `prompts` and logits of `tokens`.

    What was found by prompts without an image says nothing of those with one: the first of these are checked too.
    """
    images = any(prompt.images for prompt in prompts)
    if body.scoring_mode is None or (images and not body.mode_sees):
        found = find_scoring_mode(body, prompts, tokens)
        body.scoring_mode = max(body.scoring_mode or found, found, key=get_args(ScoringMode).index)
        body.mode_sees = images
    mode: ScoringMode = body.scoring_mode
    return mode


def find_scoring_mode(body: Backbone, prompts: Sequence[Encoded], tokens: Sequence[int]) -> ScoringMode:
    """Return the fastest mode whose scores of two short prompts are those of the plain forward pass."""
    if body.architecture.known:
        return "shared" if body.architecture.shares_prefix else "flat"
    # the shortest that shows an image, if any does; its twin says its last words again and again
    first = min(prompts, key=lambda p: (not p.images, len(p.ids)))
    pair = [first, Encoded((*first.ids, *first.ids[-3:] * 8), first.images)]
    model, training = body.head_model, body.head_model.training
    model.eval()  # dropout would make any two passes differ
    with torch.no_grad(), torch.autocast(body.device.type, enabled=False):  # compared as precisely as its weights are
        found = _exact_mode(body, pair, tokens)
    model.train(training)
    return found


def _exact_mode(body: Backbone, pair: Sequence[Encoded], tokens: Sequence[int]) -> ScoringMode:
    """Return the fastest mode that scores both prompts as the plain forward pass does; say why others are not used.

    Raises:
        UserError: The plain forward pass fails.
    """
    try:
        vocabulary = body.head_model.get_output_embeddings().weight.size(0)
        tokens = sorted({*tokens, *range(0, vocabulary, max(1, vocabulary // _SAMPLE))})
        own = torch.stack([plain_logits(body, prompt, tokens) for prompt in pair])
        told = (own.abs() < _MASKED).all(0)  # not those of tokens that the model never writes (Chameleon's of images)
        own, tokens = own[:, told], [token for token, it in zip(tokens, told.tolist(), strict=True) if it]
    except torch.OutOfMemoryError:
        raise
    except UNSUITED as error:
        raise UserError(
            f"models of the family {body.config.model_type} cannot be asked here: their own forward pass fails with "
            f"{error_line(error)}; take another backbone (docs/backbones.md) or a server"
        ) from error
    allowed = _allowed(body, pair, tokens, own)
    modes: tuple[ScoringMode, ...] = ("shared", "flat")
    for mode in modes:
        try:
            off = _rms(Trie(body, pair, tokens, str, 1).score(share=mode == "shared") - own)
            if off <= allowed:
                return mode
            reason = f"logits differ by {off:.2g}, rounding by {allowed:.2g} at most"
        except UNSUITED as error:
            reason = error_line(error)
        logging.getLogger().warning(
            f"{body.config.model_type}: {mode} scoring disagrees with a plain forward pass ({reason}); it is not used"
        )
    return "plain"


def _allowed(body: Backbone, pair: Sequence[Encoded], tokens: Sequence[int], own: Tensor) -> float:
    """Return how far logits may be from the plain forward pass's `own`, ``[2, len(tokens)]``, by rounding alone."""
    dtype = body.head_model.get_output_embeddings().weight.dtype
    if dtype not in (torch.float16, torch.bfloat16):
        return _EXACT * _rms(own)
    try:
        noise = _rms(body.padded_logits(pair, tokens) - own)
    except torch.OutOfMemoryError:
        raise
    except UNSUITED:
        noise = 0.0  # a batch is nothing it can read
    return max(_STEPS * torch.finfo(dtype).eps * _rms(own), _NOISES * noise)


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def error_line(error: Exception) -> str:
    """Return an error's name and first line."""
    return f"{type(error).__name__}: {first_line(error)}"


def input_key(body: Backbone, prompt: Encoded) -> tuple[int, ...]:
    """Return the prompt's ids with image placeholders named after their image, so that equal keys are equal inputs."""
    mark = body.image_token_id
    names = (-2 - int(image.key[:15], 16) for image in prompt.images for _ in range(image.ids.count(mark)))
    return tuple(next(names) if token == mark else token for token in prompt.ids) if prompt.images else prompt.ids


def fork(cache: DynamicCache, rows: int) -> DynamicCache:
    """Return a batch-1 `cache` seen as `rows` rows; `update` rebinds keys and values, so the parent stays as it is."""
    new = copy.copy(cache)
    new.layers = []
    for layer in cache.layers:
        twin = copy.copy(layer)
        if layer.is_initialized:
            twin.keys = layer.keys.expand(rows, -1, -1, -1)
            twin.values = layer.values.expand(rows, -1, -1, -1)
        new.layers.append(twin)
    return new


def common_prefix(keys: Sequence[Sequence[int]], rows: Sequence[int], start: int) -> int:
    """Return how many leading elements of their keys all `rows` share, sorted by key, the first `start` being equal."""
    first, last = keys[rows[0]], keys[rows[-1]]
    stop = min(len(first), len(last))
    while start < stop and first[start] == last[start]:
        start += 1
    return start


def split_by_next(keys: Sequence[Sequence[int]], rows: Sequence[int], place: int) -> list[list[int]]:
    """Split `rows`, sorted by key, by the element at `place`, before which their keys are alike."""
    return [list(group) for _, group in groupby(rows, key=lambda i: keys[i][place : place + 1])]


class Trie:
    """One pass over sorted prompts; `_node` shares a prefix, `_leaf` scores what shares no more."""

    def __init__(
        self,
        body: Backbone,
        prompts: Sequence[Encoded],
        tokens: Sequence[int],
        name: Callable[[int], str],
        least_gain: int,
    ) -> None:
        self.backbone, self.prompts, self.tokens, self.name, self.least_gain = body, prompts, tokens, name, least_gain
        self.keys = [input_key(body, prompt) for prompt in prompts]
        self.out = torch.empty(len(prompts), len(tokens))

    def score(self, *, share: bool) -> Tensor:
        """Return ``[B, tokens]`` logits behind all prompts, whose common prefixes are computed once or not."""
        order = sorted(range(len(self.prompts)), key=self.keys.__getitem__)
        (self._node if share else self._leaf)(order, 0, None)
        return self.out

    def _node(self, rows: Sequence[int], depth: int, cache: DynamicCache | None) -> None:
        """Score `rows` (sorted by key), whose first `depth` tokens `cache` holds."""
        shared = self._shared(rows, depth)
        if len(rows) > 1 and (shared - depth) * (len(rows) - 1) >= self.least_gain:
            start, parent = depth, cache
            ((_, cache),) = self._in_batches(rows[:1], lambda one: self._read(one[0], start, shared, parent))
            depth = shared
        alone: list[int] = []
        # where they part ways, which may lie behind words too few to be shared (the template's own before an image)
        for group in split_by_next(self.keys, rows, shared):
            deeper = self._shared(group, depth)
            if len(group) < len(rows) and (deeper - depth) * (len(group) - 1) >= self.least_gain:
                self._node(group, depth, cache)
            else:
                alone += group
        self._leaf(alone, depth, cache)

    def _read(self, row: int, depth: int, stop: int, parent: DynamicCache | None) -> DynamicCache:
        cache = fork(parent, 1) if parent is not None else self.backbone.new_cache()
        self.backbone.hidden([self.prompts[row]], depth, [stop], cache)
        return cache

    def _leaf(self, rows: Sequence[int], depth: int, cache: DynamicCache | None) -> None:
        by_length = sorted(rows, key=lambda i: (len(self.keys[i]), self.keys[i]))
        for batch, logits in self._in_batches(by_length, lambda batch: self._scored(batch, depth, cache)):
            self.out[list(batch)] = logits

    def _scored(self, batch: Sequence[int], depth: int, cache: DynamicCache | None) -> Tensor:
        prompts = [self.prompts[i] for i in batch]
        behind = fork(cache, len(batch)) if cache is not None else None
        states = self.backbone.hidden(prompts, depth, [len(p.ids) for p in prompts], behind)
        last = torch.tensor([len(p.ids) - depth - 1 for p in prompts], device=states.device)
        ends = states[torch.arange(len(batch), device=states.device), last]
        return self.backbone.logits(ends, self.tokens).cpu()

    def _in_batches(self, rows: Sequence[int], run: Callable[[Sequence[int]], Any]) -> Iterator[Any]:
        """Run `rows`, sorted by length, by the tokens of keys and values a batch holds, padding included."""
        keys = self.keys

        def alone(row: int) -> str:
            prompt = f"{self.name(row)} ({len(keys[row])} tokens)"
            return f"with one prompt alone: {prompt}; take a smaller model, image or max_text_tokens"

        return in_batches(rows, run, lambda batch: len(batch) * len(keys[batch[-1]]), self.backbone.budget, alone)

    def _shared(self, rows: Sequence[int], depth: int) -> int:
        """Return the length of the prefix that all of `rows` share and that ends in no image's middle."""
        shared = min(common_prefix(self.keys, rows, depth), min(len(self.keys[i]) for i in rows) - 1)
        # a prefix that ends inside an image would cut its features in two
        marks = [t for t, token in enumerate(self.prompts[rows[0]].ids) if token == self.backbone.image_token_id]
        inside = bool(marks) and marks[0] < shared <= marks[-1]
        return max(marks[0] if inside else shared, depth)
