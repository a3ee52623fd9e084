"""In which forward passes prompts would be computed, found by the code that computes them, without computing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recbole_mllm.mllm.check import Way
from recbole_mllm.mllm.encode import Encoded
from recbole_mllm.mllm.forward import Body
from recbole_mllm.mllm.scoring import _LEAST_GAIN, Trie
from recbole_mllm.mllm.sft import micro_batches
from recbole_mllm.mllm.sharing import groups


class Pass(NamedTuple):
    """`rows` rows of up to `width` new tokens each, `tokens` in all without padding, behind `before` known ones.

    `images` is how many images' features it reads.
    """

    rows: int
    before: int
    width: int
    tokens: int
    images: int


class _Counting(Trie):
    """The walk of a scoring, each pass noted instead of run."""

    passes: list[Pass]

    def read(self, row: int, depth: int, stop: int, parent: Any) -> Any:
        """Note the pass of a shared prefix; there is no cache to hand on."""
        self.passes.append(_pass(self.body, [self.prompts[row]], depth, [stop]))

    def scored(self, batch: Sequence[int], depth: int, cache: Any) -> Tensor:
        """Note the pass of a batch; there are no logits."""
        rows = [self.prompts[i] for i in batch]
        self.passes.append(_pass(self.body, rows, depth, [len(row.ids) for row in rows]))
        return torch.empty(len(batch), 0)


def scoring_passes(body: Body, prompts: Sequence[Encoded], *, share: bool) -> list[Pass]:
    """Return the passes in which `prompts` are scored in one call.

    A family that is not in the table is taken to share prefixes, which its first use will find out.
    """
    walk = _Counting(body, prompts, (), str, _LEAST_GAIN)
    walk.passes = []
    way: Way = "shared" if share and body.architecture.shares_prefix else "flat"
    walk.run(way)
    return walk.passes


def training_passes(body: Body, examples: Sequence[Encoded], size: int | None, *, share: bool) -> list[list[Pass]]:
    """Return, for each backward pass of a batch, the forward passes it goes back through."""
    out = []
    for part in micro_batches(body, examples, size, share=share):
        rows = [examples[i] for i in part]
        passes = []
        for group in groups(body, rows, share=share):
            own = [rows[i] for i in group.rows]
            if group.shared:
                passes.append(_pass(body, own[:1], 0, [group.shared]))
            passes.append(_pass(body, own, group.shared, [len(row.ids) for row in own]))
        out.append(passes)
    return out


def _pass(body: Body, rows: Sequence[Encoded], start: int, stops: Sequence[int]) -> Pass:
    """Return the pass that `Body.hidden` would make of tokens ``[start, stop)`` of each row."""
    widths = [stop - start for stop in stops]
    mark = body.image_token_id
    shown = (len(row.images) for row, stop in zip(rows, stops, strict=True) if mark in row.ids[start:stop])
    return Pass(len(rows), start, max(widths), sum(widths), sum(shown))
