"""The fast ways give what RecBole's own give, or are not taken: the C parser, lazy list columns, choosing rows."""

import copy
import pickle
import string

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recbole.data.dataset import dataset as dataset_module

from recbole_mllm.recbole_patches import fast_loading, list_column
from recbole_mllm.recbole_patches.fast_loading import as_places, read_fast
from recbole_mllm.recbole_patches.list_column import ListColumn

FLOATS = [
    "", "NA", "nan", "NaN", "null", "inf", "-Infinity", "1e5", "-3.25E-7", " 4", "4 ", "+5", "007", "1_000", "0x1A",
    "True", "-0", ".5", "5.", "1e400", "9007199254740993", "123456789012345678901", "881250949",
    "0.1234567890123456789",
]  # fmt: skip
TEXTS = [
    "", "NA", "null", "n/a", "None", "a b", " a", "b ", "'", "#x", "é", "日本", "1.0", "01", "-", "\\", "\\t", "a,b",
    "\u2028", "\x1c",
]  # fmt: skip
BREAKING = ['"', '"a"', "a\rb", "\x00", "a\tb"]
float_text = st.sampled_from(FLOATS) | st.floats(allow_nan=False, width=64).map(repr) | st.integers(0, 2**54).map(str)
text = st.sampled_from(TEXTS) | st.text(string.ascii_letters + " .é", max_size=8)
plain_row = st.tuples(text, float_text, text)
any_row = st.tuples(text | st.sampled_from(BREAKING), float_text, text | st.sampled_from(BREAKING))


def asked(names=("a:token", "b:float", "c:token_seq")):
    kinds = {name: np.float64 if name.endswith("float") else str for name in names}
    return {"delimiter": "\t", "usecols": list(names), "dtype": kinds, "encoding": "utf-8", "engine": "python"}


def check(path, text_of_file):
    """Compare our way with RecBole's own call (dataset.py:486) where ours is taken; return whether it is."""
    path.write_bytes(text_of_file.encode())
    if read_fast(path, **asked()) is None:
        return False
    found = dataset_module.pd.read_csv(path, **asked())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_loading, "is_plain", lambda *_: False)
        expected = dataset_module.pd.read_csv(path, **asked())
    assert list(expected.dtypes) == list(found.dtypes)
    for name in expected:
        one, two = expected[name].to_numpy(), found[name].to_numpy()
        if name.endswith("float"):
            assert one.dtype == np.float64 and one.tobytes() == two.tobytes()
        else:
            assert [x if isinstance(x, str) else None for x in one] == [x if isinstance(x, str) else None for x in two]
    return True


def as_file(rows, end="\n"):
    return "a:token\tb:float\tc:token_seq\n" + "\n".join("\t".join(row) for row in rows) + end


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(plain_row, min_size=1, max_size=5) | st.lists(any_row, min_size=1, max_size=4), cut=st.integers(0, 30)
)
def test_files_plain_or_broken_are_read_alike_or_left_to_recbole(tmp_path, rows, cut):
    whole = as_file(rows)
    try:
        check(tmp_path / "file", whole[: len(whole) - cut] if cut < len(whole) - 30 else whole)
    except (ValueError, pd.errors.ParserError) as error:
        raise AssertionError("read by C what RecBole's parser refuses") from error


def test_an_ordinary_file_is_read_by_c_texts_as_objects(tmp_path):
    assert check(tmp_path / "x", as_file([("u1", "881250949", "one two"), ("u2", "", ""), ("NA", "3.5", "é")]))
    (tmp_path / "x").write_text(as_file([("u", "1", ""), ("", "", "x y")]))
    frame = dataset_module.pd.read_csv(tmp_path / "x", **asked())
    assert frame["a:token"].dtype == object and pd.isna(frame["a:token"][1])
    assert list(frame["c:token_seq"]) == ["", "x y"] and dataset_module.pd.DataFrame is pd.DataFrame


@pytest.mark.parametrize(
    "text_of_file",
    [
        as_file([('"u1"', "1", "x")]),
        as_file([("u1", "1", "x\r")]),
        as_file([("u1", "1", "x", "more")]),
        as_file([("u1", "1")]),
        as_file([(" u1", "1", "x")]),
        as_file([("u1", "1", "x"), ("",), ("u2", "1", "x")]),
        as_file([]),
        "\ufeff" + as_file([("u1", "1", "x")]),
        "a:token\n1\n",
        as_file([("u1", "9007199254740993", "x")]),
        as_file([("u1", "-0", "x")]),
        as_file([("u1", "one", "x")]),
    ],
)
def test_what_the_parsers_may_read_apart_is_left_to_recbole(tmp_path, text_of_file):
    (tmp_path / "x").write_bytes(text_of_file.encode())
    assert read_fast(tmp_path / "x", **asked()) is None


def test_lines_are_told_apart_across_blocks(tmp_path, monkeypatch):
    path, good = tmp_path / "x", as_file([(f"u{n}", str(n), "é" * (n % 7)) for n in range(200)])
    monkeypatch.setattr(fast_loading, "_BLOCK", 64)
    path.write_bytes(good.encode())
    assert fast_loading.is_plain(path, "\t")
    for place in range(40, len(good), 131):
        path.write_bytes((good[:place] + "\t" + good[place:]).encode())
        assert not fast_loading.is_plain(path, "\t")


ROWS, WIDTH = 40, 6


@pytest.fixture(params=[(), (2,)], ids=["plain", "pairs"])
def column(request, monkeypatch):
    monkeypatch.setattr(list_column, "PLAIN_ELEMENTS", 0)
    rng = np.random.default_rng(3)
    values = torch.from_numpy(rng.integers(1, 99, (200, *request.param)))
    start = torch.from_numpy(rng.integers(0, 190, ROWS))
    length = torch.from_numpy(rng.integers(0, WIDTH + 1, ROWS).astype(np.int32))
    return ListColumn(values, start, length, WIDTH)


def padded(column):
    """The same by a loop over rows, as RecBole pads (sequential_dataset.py:146-149)."""
    out = torch.zeros((len(column.start), column.width, *column.flat.shape[1:]), dtype=column.flat.dtype)
    for row, (start, length) in enumerate(zip(column.start.tolist(), column.length.tolist(), strict=True)):
        out[row][:length] = column.flat[start : start + length]
    return out


def test_chosen_rows_stay_lazy(column):
    for choice in (
        [3, 1, 1, -1],
        [True, False] * (ROWS // 2),
        slice(4, 30, 3),
        torch.arange(ROWS) % 3 == 1,
        np.array([2, 5]),
        [],
    ):
        found = column[choice]
        assert (type(found) is ListColumn or not len(found)) and torch.equal(found, padded(column)[choice])


OPERATIONS = [
    lambda c: c[3],
    lambda c: c[-1, 2],
    lambda c: c[torch.tensor([2, 3]), torch.tensor([1, 0])],
    lambda c: c[:, 0],
    lambda c: c[:, 2:4],
    lambda c: c.to(torch.float32),
    lambda c: c.clone(),
    lambda c: torch.cat([c, c]),
    lambda c: c.unsqueeze(-1)[[1, 2]],
    lambda c: torch.where(c > 5, c, 0),
    lambda c: torch.from_numpy(c.numpy()),
    lambda c: torch.tensor(c.tolist()),
    lambda c: torch.ops.aten.add(c, 1),
    lambda c: pickle.loads(pickle.dumps(c)),
    lambda c: copy.deepcopy(c),
]


def test_every_operation_sees_the_padded_tensor(column):
    for number, operation in enumerate(OPERATIONS):
        expected, found = operation(padded(column)), operation(column)
        assert found.dtype == expected.dtype and found.shape == expected.shape, number
        assert torch.equal(found, expected), number
    for ask in (len, torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, repr, lambda c: (c.device, c.dtype)):
        assert ask(column) == ask(padded(column))


def test_a_row_is_had_without_the_others(column, monkeypatch):
    """FEARec takes rows of the training column one by one (fearec.py:218)."""
    expected = padded(column)[[5]][0]
    rows = []
    monkeypatch.setattr(ListColumn, "plain", lambda c, stock=ListColumn.plain: [rows.append(len(c)), stock(c)][1])
    assert torch.equal(column[np.int64(5)], expected)
    assert rows == [1]
    with pytest.raises(IndexError):
        column[ROWS]


def test_writing_in_place_is_refused_as_it_would_be_lost(column):
    for write in (
        lambda c: c.__setitem__((slice(None), 0), 5),
        lambda c: c.add_(1),
        lambda c: c.__iadd__(c),
        lambda c: c.masked_fill_(c > 9, 0),
    ):
        with pytest.raises(RuntimeError, match=r"write into its clone\(\)"):
            write(column)
    column.clone().add_(1)


INDICES = [
    np.array([2, 0, 2]), np.array([1, 0, 1], dtype=np.uint8), np.array([-1], dtype=np.int32), np.array([]),
    np.array([True, False, True, True]), torch.tensor([1, 0, 1], dtype=torch.uint8),
    torch.tensor([], dtype=torch.float32), torch.tensor([False] * 4), [3] * 40, [np.int64(1)] * 40,
]  # fmt: skip


def test_places_choose_what_the_list_chooses_and_other_indices_are_left_to_recbole():
    rows = torch.arange(4) * 10
    for index in INDICES:
        assert torch.equal(rows[as_places(index)], rows[index if isinstance(index, list) else index.tolist()]), index
    for index in (np.array([[0, 1]]), np.array(1), torch.tensor(2), np.array([0.5]), [1, 2], "x", 3):
        assert as_places(index) is None
