"""pandas 3: copy-on-write, a string dtype, and ``Series.agg`` that no longer tries its function on each element."""

from __future__ import annotations

import csv
import warnings
from types import ModuleType
from typing import Any

from recbole_mllm.compat.patching import called_from, wrap

_WORDS = (":token", ":token_seq")
# pandas' own list (pandas.read_csv, na_values), which counts for the other columns
_MISSING = ["", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A",
            "NA", "NULL", "NaN", "None", "n/a", "nan", "null"]  # fmt: skip


def mend_pandas_3(dataset: ModuleType) -> None:
    """Apply what data/dataset/dataset.py needs from pandas 3 on; with older pandas, only words stay words."""
    import pandas as pd

    read_text_as_objects(dataset)
    # :2202 makes tensors of columns that pandas guards against writing; nothing writes to them
    warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning, dataset.__name__)
    if int(pd.__version__.split(".")[0]) >= 3:
        fill_nan_by_assignment(dataset)
        agg_len_by_element()
        # :501 still assigns to a copy, in vain and without harm: `read_text_as_objects` has filled the column
        warnings.filterwarnings("ignore", category=pd.errors.ChainedAssignmentError, module=dataset.__name__)


class _Pandas(ModuleType):
    """pandas as data/dataset/dataset.py sees it: ``read_csv`` is another, the rest its own."""

    def __init__(self, pandas: ModuleType, read_csv: Any) -> None:
        super().__init__("pandas")
        self._pandas = pandas
        self.read_csv = read_csv

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pandas, name)


def read_text_as_objects(dataset: ModuleType) -> None:
    """Give data/dataset/dataset.py:486 text columns of dtype object, and empty sequences as ``""``.

    ``dtype=str`` now means an extension dtype, whose values np.concatenate and pd.factorize (:1189, :1205) take
    differently, and ``df[field].fillna(value="", inplace=True)`` (:501) changes a copy. In tokens and their sequences
    only the empty string is missing: pandas would take an item called NA, or a film called None, for missing as well.
    """
    import numpy as np

    csv.field_size_limit(2**31 - 1)  # :486 reads through the csv module, which stops at a value of 131,072 characters
    pandas = dataset.pd
    if isinstance(pandas, _Pandas):
        return

    def read_csv(*args: Any, dtype: Any = None, **kwargs: Any) -> Any:
        if isinstance(dtype, dict):
            missing = {name: [""] if name.endswith(_WORDS) else _MISSING for name in map(str, dtype)}
            kwargs = {"na_values": missing, "keep_default_na": False, **kwargs}
        frame = pandas.read_csv(*args, dtype=dtype, **kwargs)
        for name in frame.columns:
            if isinstance(dtype, dict) and dtype.get(name) is str:
                text = frame[name].astype(object)
                frame[name] = text.where(text.notna(), "" if str(name).endswith("_seq") else np.nan)
        return frame

    dataset.pd = _Pandas(pandas, read_csv)  # type: ignore[attr-defined]  # the module's own name, patched


def read_past_marks(dataset: ModuleType) -> None:
    """Let data/dataset/dataset.py:459 read a header behind a byte order mark, as pandas reads the rows behind it.

    Without a configured `encoding` it is UTF-8, again as pandas reads the rows, and not the machine's own.
    """

    def open_text(file: Any, mode: str = "r", encoding: str | None = None) -> Any:
        plain = mode == "r" and (encoding or "utf-8").lower() in ("utf-8", "utf8")
        return open(file, mode, encoding="utf-8-sig" if plain else encoding)

    dataset.open = open_text  # type: ignore[attr-defined]  # found before the built-in one


def fill_nan_by_assignment(dataset: ModuleType) -> None:
    """Replace ``Dataset._fill_nan`` (data/dataset/dataset.py:636-657): :648 and :650 now fill a copy."""
    import numpy as np

    kinds = dataset.FeatureType

    def _fill_nan(self: Any) -> None:
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

    wrap(dataset.Dataset, "_fill_nan", lambda stock: _fill_nan)


def agg_len_by_element() -> None:
    """Let RecBole's ``Series.agg(len)`` mean the length of each element again; other callers get pandas' own.

    data/dataset/dataset.py:712, :792, :809, :1217, sequential_dataset.py:165, kg_dataset.py:316.
    """
    import pandas as pd

    def make(stock: Any) -> Any:
        def aggregate(self: Any, func: Any = None, *args: Any, **kwargs: Any) -> Any:
            if func is len and called_from("recbole"):
                return self.map(len)
            return stock(self, func, *args, **kwargs)

        return aggregate

    wrap(pd.Series, "agg", make)
