"""What RecBole 1.2.1 needs to run on today's numpy, pandas, SciPy and torch, and without ray."""

from __future__ import annotations

import builtins
import csv
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

from recbole_mllm.common.errors import UserError
from recbole_mllm.recbole_patches.hooks import called_from, replace

# What config/configurator.py:625-635 adds to numpy, without reading the names that numpy 2 removed
_NUMPY_NAMES = {"bool": "bool_", "int": "int_", "float": "float64", "complex": "complex128", "object": "object_",
                "str": "str_", "long": "int_", "unicode": "str_"}  # fmt: skip
_WORDS = (":token", ":token_seq")
# pandas' own list (pandas.read_csv, na_values), which counts for the other columns
_MISSING = ["", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A",
            "NA", "NULL", "NaN", "None", "n/a", "nan", "null"]  # fmt: skip


class RecBoleMissing(UserError, ModuleNotFoundError):
    """RecBole is not installed; from Python 3.12 on pip cannot bring it, as its metadata asks for ray<=2.6.3."""


class MissingRecBoleFinder:
    """Stands last on ``sys.meta_path``: reached only when nobody else has found RecBole."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        """Say in one line how RecBole is installed.

        Raises:
            RecBoleMissing: `fullname` is ``recbole``.
        """
        if fullname == "recbole":
            install = "pip install --no-deps recbole==1.2.1"
            raise RecBoleMissing(f"RecBole is not installed; run `{install}`", name="recbole")


def do_without_ray(module: ModuleType) -> None:
    """Let `module` alone, about to be imported, see something that reports nothing where it says ``from ray import``.

    Nothing is put into ``sys.modules``: transformers and accelerate look there, and in ``find_spec``, for what is
    installed.
    """
    ray = SimpleNamespace(tune=SimpleNamespace(report=report_to_ray))

    def lending_import(name: str, *args: Any, **kwargs: Any) -> Any:
        return ray if name == "ray" else builtins.__import__(name, *args, **kwargs)

    vars(module)["__builtins__"] = {**vars(builtins), "__import__": lending_import}


def report_to_ray(**metrics: Any) -> None:
    """Answer ``tune.report(**test_result)`` (quick_start/quick_start.py:223): nothing, unless ray has been imported.

    ray reaches ``objective_function`` only after it was imported, so there is no need to import it to find out.
    """
    if (tune := sys.modules.get("ray.tune")) is not None:
        tune.report(metrics)  # from ray 2.7 on one dict


def restore_numpy_names(configurator: ModuleType) -> None:
    """Set the names that RecBole uses (evaluator/metrics.py:90, data/interaction.py:31, model/layers.py:932)."""
    import numpy as np

    if hasattr(np, "float_"):
        return

    @replace(configurator.Config)
    def compatibility_settings(stock: Any, self: Any) -> None:
        set_numpy_names()


def set_numpy_names(_module: ModuleType | None = None) -> None:
    """Set them now."""
    import numpy as np

    for name, scalar in _NUMPY_NAMES.items():
        if name not in vars(np):
            setattr(np, name, getattr(np, scalar))


def restore_dok_update(_: ModuleType) -> None:
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

    @replace(torch.serialization)
    def load(stock: Any, f: Any, *args: Any, **kwargs: Any) -> Any:
        if called_from("recbole"):
            kwargs.setdefault("weights_only", False)
        return stock(f, *args, **kwargs)


def adapt_to_pandas_3(dataset: ModuleType) -> None:
    """Fill columns by assignment, not in a copy, and let ``agg(len)`` mean each element's length again."""
    import pandas as pd

    # :2202 makes tensors of columns that pandas guards against writing; nothing writes to them
    warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning, dataset.__name__)
    if int(pd.__version__.split(".")[0]) >= 3:
        _fill_nan_by_assignment(dataset)
        _agg_len_by_element(pd)
        # :501 still assigns to a copy, in vain and without harm: `read_text_as_objects` has filled the column
        warnings.filterwarnings("ignore", category=pd.errors.ChainedAssignmentError, module=dataset.__name__)


def _fill_nan_by_assignment(dataset: ModuleType) -> None:
    """Replace ``Dataset._fill_nan`` (data/dataset/dataset.py:636-657): :648 and :650 now fill a copy."""
    import numpy as np

    kinds = dataset.FeatureType

    @replace(dataset.Dataset)
    def _fill_nan(stock: Any, self: Any) -> None:
        for feat in (getattr(self, name) for name in self.feat_name_list):
            for field in feat:
                kind = self.field2type[field]
                if kind == kinds.TOKEN:
                    feat[field] = feat[field].fillna(0)
                elif kind == kinds.FLOAT:
                    feat[field] = feat[field].fillna(feat[field].mean())
                else:
                    empty = np.array([], dtype=np.int64 if kind == kinds.TOKEN_SEQ else np.float64)
                    feat[field] = [empty if isinstance(value, float) else value for value in feat[field]]


def _agg_len_by_element(pandas: Any) -> None:
    """Patch ``Series.agg`` for RecBole alone.

    data/dataset/dataset.py:712, :792, :809, :1217, sequential_dataset.py:165, kg_dataset.py:316.
    """

    @replace(pandas.Series)
    def agg(stock: Any, self: Any, func: Any = None, *args: Any, **kwargs: Any) -> Any:
        if func is len and called_from("recbole"):
            return self.map(len)
        return stock(self, func, *args, **kwargs)


def read_text_as_objects(dataset: ModuleType) -> None:
    """Give data/dataset/dataset.py:486 text columns of dtype object, and empty sequences as ``""``.

    ``dtype=str`` now means an extension dtype, whose values np.concatenate and pd.factorize (:1189, :1205) take
    differently, and ``df[field].fillna(value="", inplace=True)`` (:501) changes a copy. In tokens and their sequences
    only the empty string is missing: pandas would take an item called NA, or a film called None, for missing as well.
    """
    import numpy as np

    from recbole_mllm.recbole_patches import fast_loading

    csv.field_size_limit(2**31 - 1)  # :486 reads through the csv module, which stops at a value of 131,072 characters
    pandas = dataset.pd

    def read_csv(path: Any, *, dtype: Any = None, **options: Any) -> Any:
        if not isinstance(dtype, dict):
            return pandas.read_csv(path, dtype=dtype, **options)
        missing = {name: [""] if name.endswith(_WORDS) else _MISSING for name in map(str, dtype)}
        options = {"na_values": missing, "keep_default_na": False, **options}
        frame = fast_loading.read_fast(path, dtype=dtype, **options) if fast_loading.is_on() else None
        if frame is None:
            frame = pandas.read_csv(path, dtype=dtype, **options)
        for name in frame.columns:
            if dtype.get(name) is str:
                text = frame[name].astype(object)
                frame[name] = text.where(text.notna(), "" if str(name).endswith("_seq") else np.nan)
        return frame

    dataset.pd = SimpleNamespace(**{**vars(pandas), "read_csv": read_csv})  # type: ignore[attr-defined]


def read_past_marks(dataset: ModuleType) -> None:
    """Let data/dataset/dataset.py:459 read a header behind a byte order mark, as pandas reads the rows behind it.

    Without a configured `encoding` it is UTF-8, again as pandas reads the rows, and not the machine's own.
    """

    def open_text(file: Any, mode: str = "r", encoding: str | None = None) -> Any:
        plain = mode == "r" and (encoding or "utf-8").lower() in ("utf-8", "utf8")
        return open(file, mode, encoding="utf-8-sig" if plain else encoding)

    dataset.open = open_text  # type: ignore[attr-defined]  # found before the built-in one
