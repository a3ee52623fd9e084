"""Score prompts through a prefix trie: what several prompts share (an item's image and title) is computed once.

The order of prompts does not matter; they are sorted here. A shared prefix never ends inside an image, and always
leaves each prompt at least one token of its own. Key-value caches live while their node is scored, no longer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor
from transformers import DynamicCache

from recbole_mllm.mllm.encode import Encoded
from recbole_mllm.mllm.forward import Body

# Prefix-LM: the whole prompt is read in both directions, so no part of it can be computed without the rest
_NO_SHARING = {"paligemma"}
_LEAST_GAIN = 512  # tokens a shared prefix must save to be worth a forward pass, and smaller batches behind it
_BATCH_TOKENS = 8192  # tokens of keys and values a batch holds, padding included


def yes_logits(body: Body, prompts: Sequence[Encoded], tokens: Sequence[int], *, share_prefix: bool = True) -> Tensor:
    """Return ``[B, len(tokens)]`` float32 logits of `tokens` at the position behind each prompt."""
    out = torch.empty(len(prompts), len(tokens))
    keys = [_key(body, prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=keys.__getitem__)
    trie = _Trie(body, prompts, keys, tokens, out)
    if share_prefix and body.family not in _NO_SHARING:
        trie.node(order, 0, None)
    else:
        trie.leaf(order, 0, None)
    return out


def _key(body: Body, prompt: Encoded) -> tuple[int, ...]:
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


class _Trie:
    """One pass over sorted prompts; `node` shares a prefix, `leaf` scores what shares no more."""

    def __init__(
        self,
        body: Body,
        prompts: Sequence[Encoded],
        keys: Sequence[tuple[int, ...]],
        tokens: Sequence[int],
        out: Tensor,
    ) -> None:
        self.body, self.prompts, self.keys, self.tokens, self.out = body, prompts, keys, tokens, out

    def node(self, rows: Sequence[int], depth: int, cache: DynamicCache | None) -> None:
        """Score `rows` (sorted by key), whose first `depth` tokens `cache` holds."""
        shared = self._shared(rows, depth)
        if len(rows) > 1 and (shared - depth) * (len(rows) - 1) >= _LEAST_GAIN:
            cache = fork(cache, 1) if cache is not None else self.body.new_cache()
            self.body.hidden([self.prompts[rows[0]]], depth, [shared], cache)
            depth = shared
        alone: list[int] = []
        for group in self._groups(rows, depth):
            deeper = self._shared(group, depth)
            if len(group) < len(rows) and (deeper - depth) * (len(group) - 1) >= _LEAST_GAIN:
                self.node(group, depth, cache)
            else:
                alone += group
        self.leaf(alone, depth, cache)

    def leaf(self, rows: Sequence[int], depth: int, cache: DynamicCache | None) -> None:
        """Score `rows` in length-sorted batches behind the shared `depth` tokens."""
        for batch in self._batches(sorted(rows, key=lambda i: (len(self.keys[i]), self.keys[i]))):
            prompts = [self.prompts[i] for i in batch]
            behind = fork(cache, len(batch)) if cache is not None else None
            states = self.body.hidden(prompts, depth, [len(p.ids) for p in prompts], behind)
            last = torch.tensor([len(p.ids) - depth - 1 for p in prompts], device=states.device)
            ends = states[torch.arange(len(batch), device=states.device), last]
            self.out[list(batch)] = self.body.logits(ends, self.tokens).cpu()

    def _batches(self, rows: Sequence[int]) -> Iterator[list[int]]:
        batch: list[int] = []
        for row in rows:
            if batch and (len(batch) + 1) * len(self.keys[row]) > _BATCH_TOKENS:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _shared(self, rows: Sequence[int], depth: int) -> int:
        """Return the length of the prefix all of `rows` share: that of the first and the last, as they are sorted."""
        shared = common_prefix(self.keys[rows[0]], self.keys[rows[-1]], depth)
        shared = min(shared, min(len(self.keys[i]) for i in rows) - 1)
        # a prefix that ends inside an image would cut its features in two
        marks = [t for t, token in enumerate(self.prompts[rows[0]].ids) if token == self.body.image_token_id]
        inside = bool(marks) and marks[0] < shared <= marks[-1]
        return max(marks[0] if inside else shared, depth)

    def _groups(self, rows: Sequence[int], depth: int) -> Iterator[list[int]]:
        """Split `rows` by their next token."""
        for _, group in groupby(rows, key=lambda i: self.keys[i][depth : depth + 1]):
            yield list(group)
