"""LoRA dropout that follows from what a prompt says, not from who computes it or beside what.

Torch draws a mask for every call. A batch's gradient would then depend on how many processes share it, how it is cut
into micro-batches, and whether what its rows have in common is computed once. Here a token's mask is a function of the
step, the layer and everything up to the token: the same wherever, however often and beside whatever it is computed.
Tokens with the same beginning in one batch have one mask; any other two have independent ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from recbole_mllm.mllm.encode import Encoded

_ID, _PLACE = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1B54A32D192ED03)  # odd, their bits in no order
_FIRST, _SECOND = -2048144789, -1028477387  # MurmurHash3's finaliser (0x85EBCA6B, 0xC2B2AE35) as int32


class Masks:
    """What the dropout layers of one model need to know of the pass they are in."""

    def __init__(self) -> None:
        self._step = np.uint64(0)
        self._tokens: Tensor | None = None  # [B, S] int32, of the text in hand
        self._image: np.uint64 | None = None  # of the image in hand, whose patches are known by their number

    def begin(self, *step: int) -> None:
        """Take other masks from here on, those of `step` (numbers of any meaning)."""
        self._step = np.random.SeedSequence(step).generate_state(1, np.uint64)[0]

    @contextmanager
    def over_text(self, rows: Sequence[Encoded], start: int, stops: Sequence[int], image_token: int) -> Iterator[None]:
        """Know within that tokens ``[start, stop)`` of each row are in hand, right-padded."""
        tokens = np.zeros((len(rows), max(stops) - start), np.uint64)
        for own, row, stop in zip(tokens, rows, stops, strict=True):
            own[: stop - start] = beginnings(row, image_token)[start:stop]
        with self._in_hand(_int32(_mixed(tokens ^ self._step)), None):
            yield

    @contextmanager
    def over_image(self, key: str) -> Iterator[None]:
        """Know within that the image named `key` is in hand, and no text."""
        with self._in_hand(None, _mixed([_number_of(key) ^ self._step])[0]):
            yield

    def once_more(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return what torch's checkpointing enters before it computes, and before it computes the same again."""
        return nullcontext(), self._in_hand(self._tokens, self._image)

    @contextmanager
    def _in_hand(self, tokens: Tensor | None, image: np.uint64 | None) -> Iterator[None]:
        before = self._tokens, self._image
        self._tokens, self._image = tokens, image
        try:
            yield
        finally:
            self._tokens, self._image = before

    def of(self, shape: Sequence[int], device: torch.device) -> Tensor | None:
        """Return ``[*shape]`` int32, a number of each vector in hand, or None where their order is not known."""
        count = int(np.prod(shape))
        if self._image is not None:
            return _int32(_mixed(np.arange(count, dtype=np.uint64) * _PLACE + self._image)).view(*shape).to(device)
        if self._tokens is None or self._tokens.numel() != count:
            return None
        self._tokens = self._tokens.to(device)  # once a pass, not once a layer
        return self._tokens.view(*shape) if len(shape) == 1 or self._tokens.shape == torch.Size(shape) else None


class KeyedDropout(nn.Module):
    """Dropout of layer `number`, with the masks of `masks`; torch's own where nothing is known of its input."""

    def __init__(self, p: float, number: int, masks: Masks) -> None:
        super().__init__()
        self.p, self._number, self._masks = p, number, masks
        self._channels: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` ``[..., D]``; in training each number is zero with probability `p`, else larger by 1/(1-p)."""
        if not self.training:
            return x
        vectors = self._masks.of(x.shape[:-1], x.device)
        if vectors is None:
            return functional.dropout(x, self.p)
        kept = self._kept(vectors[..., None], x.size(-1))
        zero = torch.zeros((), dtype=x.dtype, device=x.device)
        return torch.where(kept, x, zero).div_(1 - self.p)  # in place: the widest inputs are the step's peak

    def _kept(self, vectors: Tensor, width: int) -> Tensor:
        """Return ``[..., width]`` bool, a hash of each vector's number and the channel; 16 bits decide each."""
        if self._channels is None or self._channels.numel() < width / 2:
            own = np.arange((width + 1) // 2, dtype=np.uint64) + np.uint64(self._number << 32)
            self._channels = _int32(_mixed(own * _ID))
        self._channels = self._channels.to(vectors.device)
        bits = vectors ^ self._channels
        bits ^= (bits >> 16) & 0xFFFF
        bits *= _FIRST
        bits ^= (bits >> 13) & 0x7FFFF
        bits *= _SECOND
        bits ^= (bits >> 16) & 0xFFFF
        return bits.view(torch.int16)[..., :width] >= round(self.p * 2**16) - 2**15


def key_dropout(adapted: Any) -> Masks | None:
    """Put keyed dropout in the place of torch's before each LoRA matrix of a PEFT model; None where it has none."""
    masks, number = Masks(), 0
    for module in adapted.modules():
        dropouts = getattr(module, "lora_dropout", None)
        for name, dropout in list(dropouts.items()) if isinstance(dropouts, nn.ModuleDict) else ():
            if isinstance(dropout, nn.Dropout):
                dropouts[name] = KeyedDropout(dropout.p, number, masks)  # type: ignore[index]
                number += 1
    return masks if number else None


def beginnings(row: Encoded, image_token: int) -> NDArray[np.uint64]:
    """Return ``[T]`` uint64: a hash of the tokens up to and with each one, and of the images if any was among them."""
    ids = np.array(row.ids, np.int64).astype(np.uint64)
    each = _mixed(ids * _ID + np.arange(len(ids), dtype=np.uint64) * _PLACE)
    if row.images and image_token in row.ids:
        shown = np.array([_number_of(image.key) for image in row.images], np.uint64)
        first = row.ids.index(image_token)
        each[first : first + 1] += shown.sum(dtype=np.uint64)
    return _mixed(np.cumsum(each, dtype=np.uint64))


def _number_of(key: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big"))


def _mixed(numbers: Any) -> NDArray[np.uint64]:
    """Return MurmurHash3's 64-bit finaliser of each number of a list or an array."""
    numbers = np.array(numbers, np.uint64)
    for factor in (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)):
        numbers = (numbers ^ (numbers >> np.uint64(33))) * factor
    mixed: NDArray[np.uint64] = numbers ^ (numbers >> np.uint64(33))
    return mixed


def _int32(numbers: NDArray[np.uint64]) -> Tensor:
    return torch.from_numpy((numbers >> np.uint64(32)).astype(np.uint32).view(np.int32))
