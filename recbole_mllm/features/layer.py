"""RecBole's feature layer, able to read a vector of an item.

RecBole 1.2.1's ``FeatureSeqEmbLayer`` cannot: a ``float_seq`` feature that is not among ``numerical_features`` is
passed over (model/layers.py:923), one that is has all its numbers share one embedding
(data/dataset/dataset.py:804-815), so that nothing but their sum counts, and SASRecF then expects more features than
there are (sasrecf.py:48-55) and stops.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from recbole_mllm.compat.patching import wrap


class Projected(nn.Module):
    """Items' vectors, frozen, behind one trained linear map.

    Args:
        vectors: ``[items, D]``.
        size: Of what comes out.
    """

    def __init__(self, vectors: Any, size: int) -> None:
        super().__init__()
        self.vectors: Tensor
        self.register_buffer("vectors", torch.as_tensor(vectors, dtype=torch.float32), persistent=False)
        self.linear = nn.Linear(vectors.shape[1], size, bias=False)

    def forward(self, items: Tensor) -> Tensor:
        """Return ``[..., size]`` of internal item ids ``[...]``."""
        found: Tensor = self.linear(self.vectors[items])
        return found


def read_vectors(layers: ModuleType) -> None:
    """Let every model with a ``FeatureSeqEmbLayer`` read selected features that ``preload_weight`` has vectors for."""

    def make_init(stock: Callable[..., None]) -> Callable[..., None]:
        def __init__(
            self: Any, dataset: Any, embedding_size: int, selected_features: Any, pooling_mode: str, device: Any
        ) -> None:
            loaded = dataset.config["preload_weight"] or {}
            plain = [name for name in selected_features if name not in loaded]
            stock(self, dataset, embedding_size, plain, pooling_mode, device)
            given = [name for name in selected_features if name in loaded]
            self.projected = nn.ModuleList(
                Projected(dataset.get_preload_weight(name), embedding_size) for name in given
            ).to(device)

        return __init__

    def make_forward(stock: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: Any, user_idx: Any, item_idx: Tensor) -> Any:
            sparse, dense = stock(self, user_idx, item_idx)
            if getattr(self, "projected", None):
                made = torch.stack([one(item_idx) for one in self.projected], -2)
                before = dense["item"]
                dense["item"] = made if before is None else torch.cat([before, made], -2)
            return sparse, dense

        return forward

    wrap(layers.FeatureSeqEmbLayer, "__init__", make_init)
    wrap(layers.ContextSeqEmbAbstractLayer, "forward", make_forward)
