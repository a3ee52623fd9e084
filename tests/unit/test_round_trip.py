"""Arbitrary ids and titles: what is written comes back from RecBole's reader and ours, or is refused with a reason."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from recbole_mllm.data.atomic import clean, id_problem, read_atomic, value_problem, write_atomic
from recbole_mllm.errors import UserError

TRAPS = [
    "NA", "null", "nan", "None", "N/A", "", " ", "a b", "a  b", " a", "a ", '"', '"a', '"a"', 'a"', 'say "yes"', "'til",
    "a\tb", "a\nb", "a\r\nb", "a\rb", "\0", "a\0", "\ufeffa", "a\u200bb", "\u200d", "👩\u200d🚀", "🏴", "❤\ufe0f",
    "שלום", "می\u200cخواهم", "\u202eabc\u202c", "a\x0bb", "a\x85b", "a\u2028b", "\ud800", "[PAD]", "0", "1e5", "#", "-",
    "é", "e\u0301", "\u00ad", "\ue000", "item_id:token", "é" * 400, "\uffff", "\U0001f468\u200d\U0001f469",
]  # fmt: skip
NASTY = st.sampled_from("\t\n\r\0\"' \u200b\u200d\u200c\u202e\ufeff\u00a0\u2028\x85\x1f#,:[]aAé한🙂\ud800\ue000")
TEXT = st.one_of(st.sampled_from(TRAPS), st.text(NASTY, max_size=8), st.text(max_size=12))
ITEMS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=40)


def recbole_dataset(folder: Path):
    """Read `folder` as stock RecBole does, titles included."""
    from recbole.config import Config
    from recbole.data import create_dataset

    keys = {
        "data_path": str(folder.parent),
        "load_col": {"inter": ["user_id", "item_id"], "item": ["item_id", "title"]},
        "gpu_id": "",
        "checkpoint_dir": str(folder / "none"),
    }
    return create_dataset(Config("BPR", folder.name, config_dict=keys))


def titles_in_recbole(folder: Path) -> dict[str, list[str]]:
    """Return each item's title as RecBole knows it: the words between spaces."""
    dataset = recbole_dataset(folder)
    words, ids = dataset.field2id_token["title"], dataset.field2id_token["item_id"]
    rows = dataset.item_feat["title"].tolist()
    return {str(ids[n]): [str(words[word]) for word in row if word] for n, row in enumerate(rows) if n}


def write(folder: Path, titles: dict[str, str]) -> None:
    types = {"item_id": "token", "title": "token_seq"}
    write_atomic(folder / "x.item", types, titles.items())
    write_atomic(folder / "x.inter", {"user_id": "token", "item_id": "token"}, (("u", item) for item in titles))


@pytest.fixture
def plain_argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x"])


@given(ITEMS)
@example([(text, text) for text in TRAPS])
@settings(derandomize=True, max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_ids_and_titles_come_back_from_both_readers_or_are_refused(tmp_path_factory, plain_argv, items):
    folder = tmp_path_factory.mktemp("rt") / "x"
    told = {item: id_problem(item) for item, _ in items}
    assert all(problem is None or problem.split()[0] in ("is", "holds", "starts", "has") for problem in told.values())
    titles = {item: clean(title) for item, title in items if told[item] is None} or {"1": "one"}
    write(folder, titles)
    ours = {row["item_id"]: row["title"] for row in read_atomic(folder / "x.item")}
    assert ours == titles
    assert titles_in_recbole(folder) == {item: title.split(" ") if title else [] for item, title in titles.items()}


def recbole_reads(folder: Path, item: str) -> bool:
    """Return whether RecBole gives `item` back, from a file that our writer did not check."""
    folder.mkdir()
    header = b"user_id:token\titem_id:token"
    raw = item.encode("utf-8", "surrogatepass")
    (folder / "x.inter").write_bytes(header + b"\nu\t" + raw + b"\nu\tz\n")
    (folder / "x.item").write_bytes(b"item_id:token\ttitle:token_seq\n" + raw + b"\tw\nz\tw\n")
    try:
        return list(recbole_dataset(folder).field2id_token["item_id"]) == ["[PAD]", item, "z"]
    except Exception:
        return False


# RecBole might keep those
STRICTER = ("white space", "control character", "more than 1,000", "NUL", "reserves", "byte order mark")


@pytest.mark.parametrize("item", [text for text in TRAPS if id_problem(text)])
def test_what_is_refused_as_an_id_would_not_have_come_back(tmp_path, plain_argv, item):
    assert any(word in str(id_problem(item)) for word in STRICTER) or not recbole_reads(tmp_path / "x", item)


@given(st.lists(st.lists(TEXT, min_size=2, max_size=2), max_size=6))
@settings(derandomize=True, max_examples=150, deadline=None)
def test_the_writer_refuses_with_a_line_or_the_reader_gives_back_the_same(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("w") / "x.item"
    try:
        count = write_atomic(path, {"item_id": "token", "title": "token_seq"}, rows)
    except UserError as error:
        assert f"{path}:" in str(error) and list(path.parent.iterdir()) == []
    else:
        assert not [value for row in rows for value in row if value_problem(value)]
        assert count == len(rows) and [list(row.values()) for row in read_atomic(path)] == rows


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_recbole_reads_past_a_mark_and_keeps_words_that_pandas_takes_for_missing(tmp_path, plain_argv, mark, end):
    from recbole.config import Config
    from recbole.data import create_dataset

    lines = ["user_id:token\titem_id:token\trating:float", "NA\tnull\t1", "nan\tNone\tNA", "u\ti\t3"]
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "x.inter").write_bytes((mark + end.join(lines) + end).encode())
    keys = {"data_path": str(tmp_path), "gpu_id": "", "load_col": {"inter": ["user_id", "item_id", "rating"]}}
    dataset = create_dataset(Config("BPR", "x", config_dict=keys))
    assert list(dataset.field2id_token["user_id"]) == ["[PAD]", "NA", "nan", "u"]
    assert list(dataset.field2id_token["item_id"]) == ["[PAD]", "null", "None", "i"]
    assert dataset.inter_feat["rating"].tolist() == [1, 2, 3], "a number that is missing is still the mean"


@pytest.mark.parametrize(
    "row", [('"1"', "a", "b"), ("1", '"a', "b"), ("1", "a", '"'), ("1", "\ud800", "b"), ("1", "a")]
)
def test_the_writer_names_the_column_at_fault_and_leaves_no_file(tmp_path, row):
    types = {"item_id": "token", "title": "token_seq", "image": "token"}
    told = r"x\.item:3: (item_id|title|image) (starts with a quote|holds a lone surrogate)|x\.item:3: 2 values for 3"
    with pytest.raises(UserError, match=told):
        write_atomic(tmp_path / "x.item", types, [("0", 'a "fine" one', ""), row])
    assert list(tmp_path.iterdir()) == []


def test_a_title_of_one_megabyte_passes_both_readers(tmp_path, plain_argv):
    from recbole.config import Config
    from recbole.data import create_dataset

    title = clean("word\t" * 200_000)
    folder = tmp_path / "x"
    write_atomic(folder / "x.item", {"item_id": "token", "title": "token_seq"}, [("1", title), ("2", "short")])
    assert [row["title"] for row in read_atomic(folder / "x.item")] == [title, "short"]
    (folder / "x.inter").write_text("user_id:token\titem_id:token\nu\t1\nv\t2\n")
    load = {"inter": ["user_id", "item_id"], "item": ["item_id", "title"]}
    keys = {"data_path": str(tmp_path), "gpu_id": "", "load_col": load}
    dataset = create_dataset(Config("BPR", "x", config_dict=keys))
    assert [len(words) for words in dataset.item_feat["title"]][-2:] == [200_000, 1]


def test_a_value_beyond_any_text_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"x\.item:2: title has 16,777,217 characters, more than the 16,777,216"):
        write_atomic(tmp_path / "x.item", {"item_id": "token", "title": "token_seq"}, [("1", "x" * (2**24 + 1))])


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_a_byte_order_mark_crlf_or_no_last_newline_change_nothing(tmp_path, mark, end, last):
    lines = [b"item_id:token\ttitle:token_seq", b"1\ta", b"", "2\té".encode()]
    (tmp_path / "x.item").write_bytes(mark + end.join(lines) + (end if last else b""))
    assert list(read_atomic(tmp_path / "x.item")) == [{"item_id": "1", "title": "a"}, {"item_id": "2", "title": "é"}]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", r"is empty"),
        (b"item_id\ttitle\n", r"x\.item:1: 'item_id' is no column"),
        (b"item_id:tokens\n", r"x\.item:1: 'item_id:tokens' is no column"),
        (b"item_id:token\titem_id:token\n", r"x\.item:1: two columns are called item_id"),
        (b"item_id:token\ttitle:token_seq\n1\ta\n2\n", r"x\.item:3: 1 values for 2 columns"),
        (b"item_id:token\ttitle:token_seq\n1\ta\n2\tb\tc\n", r"x\.item:3: 3 values for 2 columns"),
        (b"item_id:token\ttitle:token_seq\n1\ta\0\n", r"x\.item:2: a NUL byte"),
        (b"item_id:token\ttitle:token_seq\n1\ta\rb\n", r"x\.item:2: a carriage return"),
        (b"item_id:token\ttitle:token_seq\n1\ta\n2\tb\xff\n", r"x\.item:3: byte 4 is no UTF-8"),
        ("item_id:token\n1\n".encode("utf-16"), r"x\.item:1: byte 1 is no UTF-8"),
    ],
)
def test_a_broken_file_is_refused_with_file_line_and_reason(tmp_path, content, told):
    (tmp_path / "x.item").write_bytes(content)
    with pytest.raises(UserError, match=told):
        list(read_atomic(tmp_path / "x.item"))
