"""numpy 2, SciPy 1.13 and torch 2.6 removed or turned round what RecBole 1.2.1 relies on."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from recbole_mllm.compat.patching import called_from, wrap

# What config/configurator.py:625-635 adds to numpy, without reading the names that numpy 2 removed
_NUMPY_NAMES = {
    "bool": "bool_",
    "int": "int_",
    "float": "float64",
    "complex": "complex128",
    "object": "object_",
    "str": "str_",
    "long": "int_",
    "unicode": "str_",
}


def name_numpy_scalars(configurator: ModuleType) -> None:
    """Replace ``Config.compatibility_settings`` (config/configurator.py:625-635), which reads ``np.float_``.

    The names it sets are used all over RecBole: evaluator/metrics.py:90, data/interaction.py:31,
    data/dataset/dataset.py:652, model/layers.py:932, trainer/hyper_tuning.py:386.
    """
    import numpy as np

    if hasattr(np, "float_"):
        return

    def compatibility_settings(self: Any) -> None:
        for name, scalar in _NUMPY_NAMES.items():
            setattr(np, name, getattr(np, scalar))

    wrap(configurator.Config, "compatibility_settings", lambda stock: compatibility_settings)


def keep_dok_update(_: ModuleType) -> None:
    """Add ``dok_matrix._update``, removed in SciPy 1.13.

    Called by model/general_recommender/lightgcn.py:111, ngcf.py:110, ncl.py:131, gcmc.py:174, spectralcf.py:123 and
    model/knowledge_aware_recommender/kgin.py:356, mcclk.py:425.
    """
    from scipy.sparse import dok_matrix

    if not hasattr(dok_matrix, "_update"):
        dok_matrix._update = lambda self, data: self._dict.update(data)


def load_checkpoints_whole(_: ModuleType) -> None:
    """Let RecBole's own calls of ``torch.load`` read what RecBole saved; everybody else's stay as torch has them.

    trainer/trainer.py:323, :583, quick_start/quick_start.py:250 and eight models with pre-training (s3rec.py:120, …)
    pass no ``weights_only``, which torch 2.6 reads as True; but a checkpoint holds a pickled Config (trainer.py:300).
    Allow-listing does not help: trainer.py:308 saves with pickle protocol 4, torch's restricted unpickler knows
    protocol 2 alone. A checkpoint is therefore unpickled in full: load only those you trust.
    """
    import torch

    def make(stock: Any) -> Any:
        def load(f: Any, *args: Any, **kwargs: Any) -> Any:
            if called_from("recbole"):
                kwargs.setdefault("weights_only", False)
            return stock(f, *args, **kwargs)

        return load

    wrap(torch.serialization, "load", make)
