"""RecBole's way from atomic files to loaders without its loops over rows: the same results, sooner, in less memory.

Whatever a replacement is not certain to do alike goes through RecBole's own code. ``RECBOLE_MLLM_FASTDATA=off`` leaves
RecBole as it is, for tests and benchmarks to compare with.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from recbole_mllm.data.histories import places_in_groups
from recbole_mllm.recbole_patches.hooks import replace
from recbole_mllm.recbole_patches.list_column import ListColumn

_SEPARATORS = ("\t", ",", ";", "|")
_ENCODINGS = ("utf-8", "utf8", "ascii")
_OPTIONS = {"delimiter", "usecols", "dtype", "encoding", "engine", "na_values", "keep_default_na"}
_EXACT = 2.0**53
_BLOCK = 1 << 24
_LONG = 32  # torch reads shorter lists in ways of its own


def is_on() -> bool:
    """Return whether the replacements are wanted."""
    return os.environ.get("RECBOLE_MLLM_FASTDATA") != "off"


# --- files: pandas' C parser where it provably gives the frame that its Python parser gives


def read_fast(path: Any, **options: Any) -> Any:
    """Return the frame of RecBole's ``read_csv(path, **options)`` (data/dataset/dataset.py:486), texts as objects.

    None where that is not certain; else its ``attrs["plain"]`` says that the file `is_plain`.
    """
    import pandas as pd

    delimiter, encoding, dtype = (options.get(name) for name in ("delimiter", "encoding", "dtype"))
    known = set(options) <= _OPTIONS and delimiter in _SEPARATORS and options.get("engine") == "python"
    if not (known and str(encoding or "utf-8").lower() in _ENCODINGS and is_plain(Path(path), str(delimiter))):
        return None
    assert isinstance(dtype, dict)
    # `high` is the Python parser's own precision; without `low_memory` equal texts are one object
    how = {"engine": "c", "float_precision": "high", "low_memory": False}
    how["dtype"] = {name: object if kind is str else kind for name, kind in dtype.items()}
    try:
        frame = pd.read_csv(path, **options | how)
    except ValueError:  # pandas' parser errors are ValueErrors too; the other parser words its own
        return None
    if any(kind is not str and _may_differ(frame[name]) for name, kind in dtype.items()):
        return None
    frame.attrs["plain"] = True
    return frame


def _may_differ(numbers: Any) -> bool:
    """Return whether a parser that first reads a column as whole numbers may give other ones: -0, beyond 53 bits."""
    values = numbers.to_numpy()
    return bool(((np.abs(values) >= _EXACT) | (np.signbit(values) & (values == 0))).any())


def is_plain(path: Path, delimiter: str) -> bool:
    """Return whether every line has as many fields as the first, two or more, and nothing that parsers read apart.

    That is quotes, carriage returns, NULs, a byte order mark, repeated names and lines that begin with a space.
    """
    separator = delimiter.encode()
    with path.open("rb") as file:
        header = file.readline().rstrip(b"\n")
    fields = header.split(separator)
    if len(separator) != 1 or len(fields) < 2 or len(set(fields)) < len(fields) or header.startswith(b"\xef\xbb\xbf"):
        return False
    lines = 0
    for block in _blocks(path):
        if not _is_plain_block(np.frombuffer(block, np.uint8), separator[0], len(fields) - 1):
            return False
        lines += block.count(b"\n")
    return lines >= 2


def _blocks(path: Path) -> Iterator[bytes]:
    """Yield the file in blocks of whole lines."""
    rest = b""
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            whole, newline, rest = (rest + block).rpartition(b"\n")
            if newline:
                yield whole + newline
    if rest:
        yield rest + b"\n"


def _is_plain_block(array: Any, separator: int, separators: int) -> bool:
    control = array[array < 0x23]  # few: line ends, tabs and spaces
    if np.isin(control, [0x00, 0x0D, 0x22]).any():
        return False
    ends = np.flatnonzero(array == 0x0A)
    starts = np.r_[0, ends[:-1] + 1]
    places = np.flatnonzero(array == separator)
    if (array[starts] == 0x20).any() or len(places) != separators * len(ends):
        return False
    table = places.reshape(-1, separators)
    return bool((table[:, 0] >= starts).all() and (table[:, -1] < ends).all())


# --- choosing rows


def index_by_tensor(module: ModuleType) -> None:
    """Let ``Interaction.__getitem__`` (data/interaction.py:133-141) index by tensor what it indexes by list.

    The list is converted to a tensor for each column: half a second a million rows and column.
    """

    @replace(module.Interaction)
    def __getitem__(stock: Any, self: Any, index: Any) -> Any:
        places = as_places(index)
        if places is None:
            return stock(self, index)
        return module.Interaction({k: v[places.to(v.device)] for k, v in self.interaction.items()})


def as_places(index: Any) -> torch.Tensor | None:
    """Return the tensor that chooses what ``index.tolist()`` chooses; None where that is not plain places or booleans.

    Whole numbers of any width become int64 (torch would read uint8 as booleans), and nothing chooses nothing.
    """
    if isinstance(index, list) and len(index) > _LONG:
        index = np.asarray(index)
    elif isinstance(index, torch.Tensor) and index.device.type == "cpu":
        index = index.numpy()
    if not isinstance(index, np.ndarray) or index.ndim != 1 or (index.dtype.kind not in "iub" and index.size):
        return None
    return torch.from_numpy(np.ascontiguousarray(index if index.dtype.kind == "b" else index.astype(np.int64)))


# --- rows of sequences


def augment_as_arrays(module: ModuleType) -> None:
    """Replace ``SequentialDataset.data_augmentation`` (data/dataset/sequential_dataset.py:77-152), a loop over rows."""

    @replace(module.SequentialDataset)
    def data_augmentation(stock: Any, self: Any) -> None:
        self._aug_presets()
        self._check_field("uid_field", "time_field")
        self.sort(by=[self.uid_field, self.time_field], ascending=True)
        place = places_in_groups(self.inter_feat[self.uid_field].numpy())
        if place.any() and _shapes_fit(self):
            self.logger.debug("data_augmentation")
            _augment(self, module.Interaction, place)
        else:
            stock(self)


def _shapes_fit(dataset: Any) -> bool:
    """Return whether each field has the shape its list needs (:125-140); where not, RecBole broadcasts or fails."""
    numerical = set(dataset.float_like_fields) & set(dataset.config["numerical_features"])
    for field in dataset.inter_feat:
        if field != dataset.uid_field:
            listed = dataset.field2seqlen[getattr(dataset, f"{field}_list_field")]
            tail = () if isinstance(listed, int) else tuple(listed[1:])
            if tuple(dataset.inter_feat[field].shape[1:]) != tail + (2,) * (field in numerical):
                return False
    return True


def _augment(dataset: Any, interaction: Any, place: Any) -> None:
    """Keep the rows with a history, each with the rows of its user before it as lists (:119-152)."""
    rows, longest = dataset.inter_feat, dataset.max_item_list_len
    target = np.flatnonzero(place)
    length = np.minimum(place[target], longest)
    chosen = rows[target]
    start, short = torch.from_numpy(target - length), torch.from_numpy(length.astype(np.int32))
    lists = {dataset.item_list_length_field: torch.from_numpy(length.astype(np.int64))}
    for field in rows:
        if field != dataset.uid_field:
            name = getattr(dataset, f"{field}_list_field")
            lists[name] = ListColumn.of(rows[field], start, short, longest)
    chosen.update(interaction(lists))
    dataset.inter_feat = chosen


# --- splits


class Groups:
    """The places of equal keys, keys in the order in which they first appear; iterates over lists as RecBole's do.

    Args:
        keys: ``[rows]`` whole numbers.
    """

    def __init__(self, keys: Any) -> None:
        import pandas as pd

        codes, found = pd.factorize(keys)
        self.order = np.argsort(codes, kind="stable")
        self.bounds = np.r_[0, np.cumsum(np.bincount(codes, minlength=len(found)))]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __iter__(self) -> Iterator[list[int]]:
        return map(np.ndarray.tolist, np.split(self.order, self.bounds[1:-1]))

    def leave_out(self, count: int) -> list[Any]:
        """Return the places of each part: the last `count` of a group go one to each later part, at least one stays.

        A group of two with `count` 2 has nothing in the middle part, as in RecBole.
        """
        sizes = np.diff(self.bounds)
        from_end = np.repeat(self.bounds[1:], sizes) - 1 - np.arange(len(self.order))
        part = np.where(from_end < np.repeat(np.minimum(count, sizes - 1), sizes), count - from_end, 0)
        return [self.order[part == number] for number in range(count + 1)]


def group_by_sorting(module: ModuleType) -> None:
    """Replace the loops of ``Dataset._grouped_index`` and the split by it (data/dataset/dataset.py:1591, :1666)."""

    @replace(module.Dataset)
    def _grouped_index(stock: Any, self: Any, group_by_list: Any) -> Any:
        keys = np.asarray(group_by_list)
        return Groups(keys) if keys.ndim == 1 and keys.dtype.kind in "iu" else stock(self, group_by_list)

    @replace(module.Dataset)
    def _split_index_by_leave_one_out(stock: Any, self: Any, grouped_index: Any, leave_one_num: int) -> Any:
        if isinstance(grouped_index, Groups):
            return grouped_index.leave_out(leave_one_num)
        return stock(self, grouped_index, leave_one_num)
