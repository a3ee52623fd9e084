"""Atomic files: what is cleaned survives RecBole's reader and ours, or is refused; a file is whole or absent."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from recbole_mllm.common.errors import UserError
from recbole_mllm.data.atomic import clean, id_problem, impossible_times, read_atomic, value_problem, write_atomic

TRAPS = [
    "NA", "null", "nan", "None", "N/A", "", " ", "a b", "a  b", " a", "a ", '"', '"a', '"a"', 'a"', 'say "yes"', "'til",
    "a\tb", "a\nb", "a\r\nb", "a\rb", "\0", "a\0", "\ufeffa", "a\u200bb", "\u200d", "👩\u200d🚀", "🏴", "❤\ufe0f",
    "שלום", "می\u200cخواهم", "\u202eabc\u202c", "a\x0bb", "a\x85b", "a\u2028b", "\ud800", "[PAD]", "0", "1e5", "#", "-",
    "é", "e\u0301", "\u00ad", "\ue000", "item_id:token", "é" * 400, "\uffff", "\U0001f468\u200d\U0001f469",
]  # fmt: skip
NASTY = st.sampled_from("\t\n\r\0\"' \u200b\u200d\u200c\u202e\ufeff\u00a0\u2028\x85\x1f#,:[]aAé한🙂\ud800\ue000")
TEXT = st.one_of(st.sampled_from(TRAPS), st.text(NASTY, max_size=8), st.text(max_size=12))
ITEMS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=40)
ITEM = {"item_id": "token", "title": "token_seq"}
DAY, NOW = 86_400, time.time()


@given(st.text())
def test_clean_is_one_line_without_controls_and_stays_so(text):
    once = clean(text)
    assert clean(once) == once and not set(once) & set("\t\n\r\x00\u200b") and not once.startswith(('"', "'"))


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  two\twords \r\n", "two words"),
        ('"Heroes"', "Heroes"),
        ('"Heroes" by Bowie', 'Heroes" by Bowie'),
        ('say "yes"', 'say "yes"'),
        ("a\0b\u200bc\ufeff", "abc"),
        ("👩\u200d🚀 and ❤\ufe0f", "👩\u200d🚀 and ❤\ufe0f"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("\u200d \u200c", ""),
        ("\u202eevil\u202c", "evil"),
        ("\ud800x", "x"),
        ("\u3000全角\u3000空白", "全角 空白"),
    ],
)
def test_clean_keeps_words_and_drops_what_nobody_sees(text, cleaned):
    assert clean(text) == cleaned


def recbole_dataset(folder: Path, **load):
    """Read `folder` as stock RecBole does, titles included."""
    from recbole.config import Config
    from recbole.data import create_dataset

    load = {"inter": ["user_id", "item_id"], "item": ["item_id", "title"], **load}
    keys = {"data_path": str(folder.parent), "load_col": load, "gpu_id": "", "checkpoint_dir": str(folder / "none")}
    return create_dataset(Config("BPR", folder.name, config_dict=keys))


def titles_in_recbole(folder: Path) -> dict[str, list[str]]:
    """Return each item's title as RecBole knows it: the words between spaces."""
    dataset = recbole_dataset(folder)
    words, ids = dataset.field2id_token["title"], dataset.field2id_token["item_id"]
    rows = dataset.item_feat["title"].tolist()
    return {str(ids[n]): [str(words[word]) for word in row if word] for n, row in enumerate(rows) if n}


def write(folder: Path, titles: dict[str, str]) -> None:
    write_atomic(folder / "x.item", ITEM, titles.items())
    write_atomic(folder / "x.inter", {"user_id": "token", "item_id": "token"}, (("u", item) for item in titles))


@given(ITEMS)
@example([(text, text) for text in TRAPS])
@settings(derandomize=True, max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_ids_and_titles_come_back_from_both_readers_or_are_refused(tmp_path_factory, items):
    folder = tmp_path_factory.mktemp("rt") / "x"
    told = {item: id_problem(item) for item, _ in items}
    assert all(problem is None or problem.split()[0] in ("is", "holds", "starts", "has") for problem in told.values())
    titles = {item: clean(title) for item, title in items if told[item] is None} or {"1": "one"}
    write(folder, titles)
    ours = {row["item_id"]: row["title"] for row in read_atomic(folder / "x.item")}
    assert ours == titles
    assert titles_in_recbole(folder) == {item: title.split(" ") if title else [] for item, title in titles.items()}


@given(st.lists(st.lists(TEXT, min_size=2, max_size=2), max_size=6))
@settings(derandomize=True, max_examples=150, deadline=None)
def test_the_writer_refuses_with_a_line_or_the_reader_gives_back_the_same(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("w") / "x.item"
    try:
        count = write_atomic(path, ITEM, rows)
    except UserError as error:
        assert f"{path}:" in str(error) and list(path.parent.iterdir()) == []
    else:
        assert not [value for row in rows for value in row if value_problem(value)]
        assert count == len(rows) and [list(row.values()) for row in read_atomic(path)] == rows


@pytest.mark.parametrize(("mark", "end"), [("", "\n"), ("\ufeff", "\r\n")])
def test_recbole_reads_past_a_mark_and_keeps_words_that_pandas_takes_for_missing(tmp_path, mark, end):
    lines = ["user_id:token\titem_id:token\trating:float", "NA\tnull\t1", "nan\tNone\tNA", "u\ti\t3"]
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "x.inter").write_bytes((mark + end.join(lines) + end).encode())
    dataset = recbole_dataset(tmp_path / "x", inter=["user_id", "item_id", "rating"], item=[])
    assert list(dataset.field2id_token["user_id"]) == ["[PAD]", "NA", "nan", "u"]
    assert list(dataset.field2id_token["item_id"]) == ["[PAD]", "null", "None", "i"]
    assert dataset.inter_feat["rating"].tolist() == [1, 2, 3], "a number that is missing is still the mean"


@pytest.mark.parametrize(
    "row", [('"1"', "a", "b"), ("1", '"a', "b"), ("1", "a", '"'), ("1", "\ud800", "b"), ("1", "a"), ("1", "a\tb", "c")]
)
def test_the_writer_names_the_column_at_fault_and_leaves_no_file(tmp_path, row):
    types = {"item_id": "token", "title": "token_seq", "image": "token"}
    problem = "(item_id|title|image) (starts with a quote|holds a lone surrogate|holds a tab or newline)"
    told = rf"x\.item:3: ({problem}|2 values for 3)"
    with pytest.raises(UserError, match=told):
        write_atomic(tmp_path / "x.item", types, [("0", 'a "fine" one', ""), row])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_byte_order_mark_crlf_or_no_last_newline_change_nothing(tmp_path, mark, end):
    lines = [b"item_id:token\ttitle:token_seq", b"1\ta", b"", "2\té".encode()]
    for last in (end, b""):
        (tmp_path / "x.item").write_bytes(mark + end.join(lines) + last)
        rows = [{"item_id": "1", "title": "a"}, {"item_id": "2", "title": "é"}]
        assert list(read_atomic(tmp_path / "x.item")) == rows


def test_a_full_disk_is_one_line_and_the_earlier_file_stays(tmp_path):
    path = tmp_path / "d.item"
    write_atomic(path, {"item_id": "token"}, [("i1",)])
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from recbole_mllm.data.atomic import write_atomic\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"  # as a full disk, for files beyond it
        "write_atomic(Path(sys.argv[1]), {'item_id': 'token'}, [(f'i{n}',) for n in range(99_999)])\n"
    )
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)
    line = done.stderr.splitlines()[-1]
    assert "UserError" in line and f"{path} cannot be written (File too large); make room on the disk" in line
    assert path.read_text() == "item_id:token\ni1\n" and [p.name for p in tmp_path.iterdir()] == ["d.item"]


@pytest.mark.parametrize("unit", [1, 10**3, 10**6, 10**9])
def test_times_before_1970_and_after_tomorrow_are_counted_in_any_unit(unit):
    fine = [int((NOW - days * DAY) * unit) for days in range(0, 9000, 100)]
    today, in_a_week = int((NOW + DAY / 2) * unit), int((NOW + 7 * DAY) * unit)
    assert impossible_times([*fine, today]) == (0, 0)
    assert impossible_times([0, -1, *fine, today, in_a_week, -5 * unit]) == (3, 1)


@pytest.mark.parametrize(
    ("times", "told"),
    [
        ([1.5e9] * 5 + [1.5e12], (0, 1)),
        ([0, 1, 2, 0, 1], (0, 0)),  # places in an order are no dates
        ([0, 0, 0], (3, 0)),
        ([-1, 1, 2], (1, 0)),
        ([float("nan"), 1.6e9], (0, 0)),
        ([float("inf"), float("-inf"), 1.6e9, 1.6e9], (1, 1)),
    ],
)
def test_impossible_times_are_counted_and_places_in_an_order_left_alone(times, told):
    assert impossible_times(times) == told
