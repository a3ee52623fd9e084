"""The C parser reads what RecBole's parser reads, or is not asked."""

import string

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recbole.data.dataset import dataset as dataset_module

from recbole_mllm.fastdata import reading
from recbole_mllm.fastdata.reading import Scan, read_fast, scan

FLOATS = [
    "",
    "NA",
    "nan",
    "NaN",
    "null",
    "inf",
    "-Infinity",
    "1e5",
    "-3.25E-7",
    " 4",
    "4 ",
    "+5",
    "007",
    "1_000",
    "0x1A",
]
FLOATS += [
    "True",
    "-0",
    ".5",
    "5.",
    "1e400",
    "9007199254740993",
    "123456789012345678901",
    "881250949",
    "0.1234567890123456789",
]
TEXTS = [
    "",
    "NA",
    "null",
    "n/a",
    "None",
    "a b",
    " a",
    "b ",
    "'",
    "#x",
    "é",
    "日本",
    "1.0",
    "01",
    "-",
    "\\",
    "\\t",
    "a,b",
    "\u2028",
    "\x1c",
]
BREAKING = ['"', '"a"', "a\rb", "\x00", "a\tb"]
float_text = st.sampled_from(FLOATS) | st.floats(allow_nan=False, width=64).map(repr) | st.integers(0, 2**54).map(str)
text = st.sampled_from(TEXTS) | st.text(string.ascii_letters + " .é", max_size=8)
plain_row = st.tuples(text, float_text, text)
any_row = st.tuples(text | st.sampled_from(BREAKING), float_text, text | st.sampled_from(BREAKING))


def asked(path, names=("a:token", "b:float", "c:token_seq")):
    kinds = {name: np.float64 if name.endswith("float") else str for name in names}
    return {"delimiter": "\t", "usecols": list(names), "dtype": kinds, "encoding": "utf-8", "engine": "python"}


def by_recbole(path):
    """RecBole's own call, on what compat makes of pandas (dataset.py:486)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "scan", lambda *_: Scan(False))
        return dataset_module.pd.read_csv(path, **asked(path))


def check(path, text_of_file):
    """Compare the two ways where ours is taken; return whether it is."""
    path.write_bytes(text_of_file.encode())
    if read_fast(path, **asked(path)) is None:
        return False
    expected, found = by_recbole(path), dataset_module.pd.read_csv(path, **asked(path))
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


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(plain_row, min_size=1, max_size=5), end=st.sampled_from(["\n", ""]))
def test_plain_files_are_read_alike(tmp_path, rows, end):
    check(tmp_path / "plain", as_file(rows, end))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(any_row, min_size=1, max_size=4), cut=st.integers(0, 30))
def test_broken_files_are_read_alike_or_left_to_recbole(tmp_path, rows, cut):
    whole = as_file(rows)
    try:
        check(tmp_path / "broken", whole[: len(whole) - cut] if cut < len(whole) - 30 else whole)
    except (ValueError, pd.errors.ParserError) as error:
        raise AssertionError("read by C what RecBole's parser refuses") from error


def test_an_ordinary_file_is_read_by_c(tmp_path):
    assert check(tmp_path / "x", as_file([("u1", "881250949", "one two"), ("u2", "", ""), ("NA", "3.5", "é")]))


@pytest.mark.parametrize(
    "text_of_file",
    [
        as_file([('"u1"', "1", "x")]),
        as_file([("u1", "1", "x\r")]),
        as_file([("u1", "1", "x", "more")]),
        as_file([("u1", "1")]),
        as_file([("u1", "1", "x", "more"), ("u2", "1")]),
        as_file([(" u1", "1", "x")]),
        as_file([("u1", "1", "x" * 70_000)]),
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
    assert read_fast(tmp_path / "x", **asked(tmp_path / "x")) is None


def test_lines_are_told_apart_across_blocks(tmp_path, monkeypatch):
    path, good = tmp_path / "x", as_file([(f"u{n}", str(n), "é" * (n % 7)) for n in range(200)])
    monkeypatch.setattr(reading, "_BLOCK", 64)
    path.write_bytes(good.encode())
    found = scan(path, "\t")
    assert found == (True, (2, 1, 0), (4, 3, 12))
    for place in range(40, len(good), 131):
        path.write_bytes((good[:place] + "\t" + good[place:]).encode())
        assert not scan(path, "\t").plain
