"""LoRA dropout keyed by what a prompt says beside torch's own: a layer's way there and back, and what that keeps.

Both drop from the same vectors before the same matrix of rank 8, in turns, on one thread. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import torch
from torch import Tensor, nn

from recbole_mllm.mllm.dropout import KeyedDropout, Masks
from recbole_mllm.mllm.encode import Encoded


def there_and_back(dropout: nn.Module, matrix: nn.Module, x: Tensor) -> float:
    """Return the CPU seconds of one pass."""
    started = time.process_time()
    matrix(dropout(x)).sum().backward()
    return time.process_time() - started


def kept(dropout: nn.Module, matrix: nn.Module, x: Tensor) -> int:
    """Return the bytes that the way back needs, but for the matrix."""
    found: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in matrix.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        matrix(dropout(x))
    return sum(found.values())


def main() -> None:
    """Measure, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--p", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    masks, row = Masks(), Encoded(tuple(range(given.tokens)), (), 0)
    ways = {"torch": nn.Dropout(given.p), "keyed": KeyedDropout(given.p, 0, masks)}
    matrix = nn.Linear(given.width, 8, bias=False)
    x = torch.randn(1, given.tokens, given.width, requires_grad=True)
    times: dict[str, list[float]] = {name: [] for name in ways}
    with masks.over_text([row], 0, [given.tokens], -1):
        for _ in range(given.rounds):
            for name, dropout in ways.items():
                times[name].append(there_and_back(dropout, matrix, x))
        sizes = {name: kept(dropout, matrix, x) for name, dropout in ways.items()}
    best = {name: min(found) for name, found in times.items()}
    for name in ways:
        print(f"{name}: {best[name] * 1e3:.2f} ms, {sizes[name] / 2**20:.2f} MiB kept")
    ratio = {"time": best["torch"] / best["keyed"], "kept": sizes["torch"] / sizes["keyed"]}
    print(json.dumps({"benchmark": "dropout", **vars(given), "torch_over_keyed": ratio}))


if __name__ == "__main__":
    main()
