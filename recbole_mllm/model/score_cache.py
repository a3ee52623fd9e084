"""Scores of an evaluation under way, beside the run's checkpoints, from which a killed evaluation resumes.

Each process appends records of 24 bytes to a file of its own: a prompt's digest and its score. The file's name holds a
digest of the model's state, so that no other adapter's scores are read. When the evaluation is done the files go.
Nothing here can stop a run: what cannot be read or written is done without.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from recbole_mllm.common import distributed
from recbole_mllm.common.files import remove_file
from recbole_mllm.common.prompts import Prompt
from recbole_mllm.data.images import image_digest

_RECORD = struct.Struct("<16sd")
_VERSION = 2  # of how prompts are named, encoded and scored


def prompt_digest(prompt: Prompt) -> bytes:
    """Return 16 bytes that stand for the prompt's texts and the bytes of its images."""
    parts = [prompt.system, prompt.marked, *(image_digest(path) for path in prompt.images)]
    return hashlib.sha256("\0".join(parts).encode()).digest()[:16]


def state_digest(parts: Iterable[object], tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of a model's state: what names it, and the bytes of what has been trained."""
    digest = hashlib.sha256(repr((_VERSION, *parts)).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"\0{name}:{tensor.dtype}:{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


class ScoreCache:
    """Asks a model only about prompts that a killed evaluation of the same state has not scored.

    Attributes:
        reused: How many scores were found.
    """

    def __init__(self, folder: Path) -> None:
        self.reused = 0
        self._folder, self._on = folder, False
        self._state: str | None = None
        self._known: dict[bytes, float] = {}  # what killed evaluations have left
        self._file: BinaryIO | None = None

    def use(self, wanted: bool) -> None:
        """Look scores up and append them from here on, or do neither."""
        self._on = wanted
        self.forget_state()

    def forget_state(self) -> None:
        """Take the model's state again before the next score: it may have changed."""
        if self._file:
            self._file.close()
        self._state, self._known, self._file = None, {}, None

    def scores(
        self, prompts: Sequence[Prompt], ask: Callable[[Sequence[Prompt]], list[float]], state: Callable[[], str]
    ) -> list[float]:
        """Return a score for each of `prompts`; `ask` gives those that are not known for `state`."""
        if not self._on:
            return ask(prompts)
        if self._state is None:
            self._open(state())
        digests = [prompt_digest(prompt) for prompt in prompts]
        missing = [n for n, digest in enumerate(digests) if digest not in self._known]
        new = dict(zip((digests[n] for n in missing), ask([prompts[n] for n in missing]), strict=True))
        self._append(new)
        self.reused += len(prompts) - len(missing)
        return [self._known[digest] if digest in self._known else new[digest] for digest in digests]

    def remove(self) -> None:
        """Remove the files of the state in use: its evaluation is done."""
        if self._state is not None:
            for path in self._files():
                remove_file(path)
        self.forget_state()

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob(f"scores-{self._state}.*"))

    def _open(self, state: str) -> None:
        self._state = state
        own = self._folder / f"scores-{state}.{distributed.process_index()}"
        try:
            for path in self._files():
                data = path.read_bytes()
                self._known |= dict(_RECORD.iter_unpack(data[: len(data) // _RECORD.size * _RECORD.size]))
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = own.open("ab", buffering=0)
            self._file.truncate(self._file.tell() // _RECORD.size * _RECORD.size)  # what a full disk has cut
        except OSError as error:
            self._give_up(error)

    def _append(self, scores: Mapping[bytes, float]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(b"".join(_RECORD.pack(*record) for record in scores.items()))
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        logging.getLogger().warning(f"scores are not cached in {self._folder}: {error}; a killed run scores all again")
        self._file = None
