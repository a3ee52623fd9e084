"""Score prompts through a prefix trie: what several prompts share (an item's image and title) is computed once.

The order of prompts does not matter; they are sorted here. A shared prefix never ends inside an image, and always
leaves each prompt at least one token of its own. Key-value caches live while their node is scored, no longer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import get_args

import torch
from torch import Tensor
from transformers import DynamicCache

from recbole_mllm.mllm.batching import in_batches
from recbole_mllm.mllm.check import Way, way_to_score
from recbole_mllm.mllm.encode import Encoded
from recbole_mllm.mllm.forward import Body
from recbole_mllm.mllm.plain import plain_logits

_LEAST_GAIN = 512  # tokens a shared prefix must save to be worth a forward pass, and smaller batches behind it


def yes_logits(
    body: Body,
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
    found = way_of(body, prompts, tokens)
    return _by("flat" if found == "shared" and not share_prefix else found, body, prompts, tokens, name, _LEAST_GAIN)


def way_of(body: Body, prompts: Sequence[Encoded], tokens: Sequence[int]) -> Way:
    """Return the fastest way that is exact for this model, found once, by two of `prompts` and logits of `tokens`.

    What was found by prompts without an image tells nothing of those with one: the first of these are checked too.
    """
    images = any(prompt.images for prompt in prompts)
    if body.way is None or (images and not body.way_sees):
        found = way_to_score(body, prompts, tokens, lambda pair, way: _by(way, body, pair, tokens, str, 1))
        body.way, body.way_sees = max(body.way or found, found, key=get_args(Way).index), images
    way: Way = body.way
    return way


def _by(
    way: Way,
    body: Body,
    prompts: Sequence[Encoded],
    tokens: Sequence[int],
    name: Callable[[int], str],
    least_gain: int,
) -> Tensor:
    if way == "plain":
        return torch.stack([plain_logits(body, prompt, tokens) for prompt in prompts])
    trie = Trie(body, prompts, tokens, name, least_gain)
    trie.run(way)
    return trie.out


def input_key(body: Body, prompt: Encoded) -> tuple[int, ...]:
    """Return the prompt's ids with image placeholders named after their image, so that equal keys are equal inputs."""
    if not prompt.images:
        return prompt.ids
    mark, out, images, left = body.image_token_id, list(prompt.ids), iter(prompt.images), 0
    for i, token in enumerate(prompt.ids):
        if token == mark:
            if not left:
                image = next(images)
                left, name = image.ids.count(mark), -2 - int(image.key[:15], 16)
            out[i] = name
            left -= 1
    return tuple(out)


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


def common_prefix(a: Sequence[int], b: Sequence[int], start: int = 0) -> int:
    """Return how many leading elements `a` and `b` share, given that the first `start` are equal."""
    stop = min(len(a), len(b))
    while start < stop and a[start] == b[start]:
        start += 1
    return start


class Trie:
    """One pass over sorted prompts; `node` shares a prefix, `leaf` scores what shares no more."""

    def __init__(
        self,
        body: Body,
        prompts: Sequence[Encoded],
        tokens: Sequence[int],
        name: Callable[[int], str],
        least_gain: int,
    ) -> None:
        self.body, self.prompts, self.tokens, self.name, self.least_gain = body, prompts, tokens, name, least_gain
        self.keys = [input_key(body, prompt) for prompt in prompts]
        self.out = torch.empty(len(prompts), len(tokens))

    def run(self, way: Way) -> None:
        """Score all prompts, sharing prefixes or not."""
        order = sorted(range(len(self.prompts)), key=self.keys.__getitem__)
        (self.node if way == "shared" else self.leaf)(order, 0, None)

    def node(self, rows: Sequence[int], depth: int, cache: DynamicCache | None) -> None:
        """Score `rows` (sorted by key), whose first `depth` tokens `cache` holds."""
        shared = self._shared(rows, depth)
        if len(rows) > 1 and (shared - depth) * (len(rows) - 1) >= self.least_gain:
            cache, depth = self._prefix(rows[0], depth, shared, cache), shared
        alone: list[int] = []
        # where they part ways, which may lie behind words too few to be shared (the template's own before an image)
        for group in self._groups(rows, shared):
            deeper = self._shared(group, depth)
            if len(group) < len(rows) and (deeper - depth) * (len(group) - 1) >= self.least_gain:
                self.node(group, depth, cache)
            else:
                alone += group
        self.leaf(alone, depth, cache)

    def _prefix(self, row: int, depth: int, stop: int, parent: DynamicCache | None) -> DynamicCache:
        """Return a cache of the first `stop` tokens of `row`, `depth` of which `parent` holds."""

        def run(_: Sequence[int]) -> DynamicCache:
            return self.read(row, depth, stop, parent)

        ((_, cache),) = in_batches([row], run, self._cost, self.body.budget, self._named)
        return cache

    def read(self, row: int, depth: int, stop: int, parent: DynamicCache | None) -> DynamicCache:
        """Compute what `_prefix` returns."""
        cache = fork(parent, 1) if parent is not None else self.body.new_cache()
        self.body.hidden([self.prompts[row]], depth, [stop], cache)
        return cache

    def leaf(self, rows: Sequence[int], depth: int, cache: DynamicCache | None) -> None:
        """Score `rows` in length-sorted batches behind the shared `depth` tokens."""

        def run(batch: Sequence[int]) -> Tensor:
            return self.scored(batch, depth, cache)

        by_length = sorted(rows, key=lambda i: (len(self.keys[i]), self.keys[i]))
        for batch, logits in in_batches(by_length, run, self._cost, self.body.budget, self._named):
            self.out[list(batch)] = logits

    def scored(self, batch: Sequence[int], depth: int, cache: DynamicCache | None) -> Tensor:
        """Return ``[B, tokens]`` logits of a batch behind the first `depth` tokens of its rows."""
        prompts = [self.prompts[i] for i in batch]
        behind = fork(cache, len(batch)) if cache is not None else None
        states = self.body.hidden(prompts, depth, [len(p.ids) for p in prompts], behind)
        last = torch.tensor([len(p.ids) - depth - 1 for p in prompts], device=states.device)
        ends = states[torch.arange(len(batch), device=states.device), last]
        return self.body.logits(ends, self.tokens).cpu()

    def _cost(self, batch: Sequence[int]) -> int:
        """Tokens of keys and values of a batch sorted by length, padding included."""
        return len(batch) * len(self.keys[batch[-1]])

    def _named(self, row: int) -> str:
        return f"{self.name(row)} ({len(self.keys[row])} tokens)"

    def _shared(self, rows: Sequence[int], depth: int) -> int:
        """Return the length of the prefix all of `rows` share: that of the first and the last, as they are sorted."""
        shared = common_prefix(self.keys[rows[0]], self.keys[rows[-1]], depth)
        shared = min(shared, min(len(self.keys[i]) for i in rows) - 1)
        # a prefix that ends inside an image would cut its features in two
        marks = [t for t, token in enumerate(self.prompts[rows[0]].ids) if token == self.body.image_token_id]
        inside = bool(marks) and marks[0] < shared <= marks[-1]
        return max(marks[0] if inside else shared, depth)

    def _groups(self, rows: Sequence[int], place: int) -> Iterator[list[int]]:
        """Split `rows` by their token at `place`, before which they are alike."""
        for _, group in groupby(rows, key=lambda i: self.keys[i][place : place + 1]):
            yield list(group)
