"""Damaged raw files: one good line and nothing written, or a ledger in which every line of the file is found again."""

import contextlib
import csv
import io
import json
import os
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from raw_dumps import jsonl, product, review, write_microlens

from dataset_converters.source import Intake
from recbole_mllm.cli import main
from recbole_mllm.common.errors import UserError
from recbole_mllm.data.atomic import read_atomic
from recbole_mllm.inspect.findings import findings
from recbole_mllm.inspect.measure import measure

DAY = 86_400
LOG = "user_id,item_id,timestamp,title\n" + "".join(
    f"u{user},i{item},{1000 + 10 * user + item},Title {item}\n" for user in range(5) for item in range(6)
)


def run(*words: str | Path) -> tuple[int, str]:
    """Convert, with warnings as errors; return the exit code and what stood on stderr."""
    errors = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("error")
        code = main(["convert", *map(str, words)])
    return code, errors.getvalue()


def refused(*words: str | Path, out: Path) -> str:
    """Return the one line with which a conversion stops; nothing is written."""
    code, errors = run(*words, "--out", out)
    assert code == 2 and errors.count("\n") == 1 and errors.startswith("recbole-mllm: "), errors
    assert not out.exists()
    return errors


def pairs(folder: Path) -> list[tuple[str, str]]:
    return [(row["user_id"], row["item_id"]) for row in read_atomic(folder / f"{folder.name}.inter")]


def rejects(folder: Path) -> list[tuple[str, int]]:
    path = folder / "rejected.tsv"
    lines = path.read_text(encoding="utf-8").split("\n")[1:-1] if path.exists() else []
    return [(file, int(line)) for file, line, _ in (row.split("\t") for row in lines)]


def check_ledger(raw: Path, folder: Path) -> None:
    """Count the raw lines again, and find each in what was written, left out or named."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    left_out = Counter(file for file, _ in rejects(folder))
    for entry in manifest["inputs"]:
        content = (raw / entry["file"]).read_bytes()
        assert entry["lines"] == content.count(b"\n") + (not content.endswith(b"\n") and bool(content))
        assert entry.get("left_out", 0) == left_out[entry["file"]]
        named = sum(entry.get(what, 0) for what in ("header", "blank", "continued", "left_out"))
        assert entry["rows"] + named == entry["lines"] or entry["file"].endswith("_pairs.tsv")
    assert manifest["steps"][0][3] == manifest["inputs"][0]["rows"]
    assert manifest["steps"][-1][3] == len(pairs(folder))
    assert manifest["rejected_rows"] == sum(left_out.values())
    assert f"{manifest['inputs'][0]['lines']:,} lines" in (folder / "README.md").read_text(encoding="utf-8")


def table(folder: Path, text: str | bytes, name: str = "log.csv") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def damaged(number: int, change: Callable[[str], str], text: str = LOG) -> str:
    lines = text.split("\n")
    lines[number - 1] = change(lines[number - 1])
    return "\n".join(lines)


CELLS = {
    "open quote in front": (lambda line: '"' + line, "quoted field does not end"),
    "open quote before the title": (lambda line: line.replace("Title", '"Title'), "quoted field does not end"),
    "a carriage return": (lambda line: line.replace("i", "i\r", 1), "carriage return"),
    "a NUL in an id": (lambda line: line.replace("i", "i\0", 1), "NUL"),
    "a byte order mark": (lambda line: "\ufeff" + line, "byte order mark"),
    "a cell too many": (lambda line: line + ",x", "5 values"),
    "blanks": (lambda line: "  ", "1 values"),
    **{
        number[:9]: (lambda line, number=number: re.sub("1[0-9]{3}", number, line), f"'{number[:4]}")
        for number in ("nan", "-inf", "1e300", "0x10", "1_000", "1" * 5000, "١٢٣")
    },
}


@pytest.mark.parametrize("what", CELLS)
def test_a_bad_line_is_named_and_costs_nothing_but_itself(tmp_path, what):
    change, told = CELLS[what]
    raw, out = table(tmp_path / "raw", damaged(8, change)), tmp_path / "d"
    more = ["--multiline"] if "quote" in what else []
    line = refused("csv", "--raw", raw, *more, out=out)
    assert "log.csv:8: " in line and told in line and "--skip-bad-rows" in line
    assert run("csv", "--raw", raw, *more, "--skip-bad-rows", "--out", out)[0] == 0
    assert rejects(out) == [("log.csv", 8)]
    everything = {(f"u{user}", f"i{item}") for user in range(5) for item in range(6)}
    assert set(pairs(out)) == everything - {("u1", "i0")} and len(pairs(out)) == 29
    check_ledger(raw, out)


def test_fields_over_several_lines_are_read_on_request_and_line_numbers_stay_those_of_the_file(tmp_path):
    text = damaged(3, lambda line: line.replace("Title 1", '"A ""title""\n\nof three\r\nlines"'))
    raw = table(tmp_path / "raw", damaged(12, lambda line: line + ",x", text))
    assert "log.csv:3: " in (line := refused("csv", "--raw", raw, out=tmp_path / "d")) and "--multiline" in line
    assert "log.csv:12: 5 values" in refused("csv", "--raw", raw, "--multiline", out=tmp_path / "d")
    assert run("csv", "--raw", raw, "--multiline", "--skip-bad-rows", "--out", tmp_path / "d")[0] == 0
    titles = {row["item_id"]: row["title"] for row in read_atomic(tmp_path / "d" / "d.item")}
    assert titles["i1"] == 'A "title" of three lines'
    assert len(pairs(tmp_path / "d")) == 29 and rejects(tmp_path / "d") == [("log.csv", 12)]
    check_ledger(raw, tmp_path / "d")
    # a stray quote that finds a partner in another row swallows nothing
    text = damaged(4, lambda line: line.replace("Title", '"Title'))
    raw = table(tmp_path / "stray", damaged(20, lambda line: line.replace("Title 0", '"Title, 0"'), text))
    assert run("csv", "--raw", raw, "--multiline", "--skip-bad-rows", "--out", tmp_path / "e")[0] == 0
    assert rejects(tmp_path / "e") == [("log.csv", 4)] and len(pairs(tmp_path / "e")) == 29


def test_a_header_that_cannot_be_read_is_not_replaced_by_the_first_row(tmp_path):
    raw = table(tmp_path / "raw", damaged(1, lambda line: line.replace("item_id", '"item_id')))
    assert "log.csv:1: " in refused("csv", "--raw", raw, "--skip-bad-rows", out=tmp_path / "d")
    movies = movielens(tmp_path / "ml", 'userId,"movieId,rating,timestamp\n1,2,3,4\n')
    assert "ratings.csv:1: " in refused("movielens", "--raw", movies, "--skip-bad-rows", out=tmp_path / "d")


def movielens(folder: Path, ratings: str, movies: str = "movieId,title,genres\n2,Two,Drama\n") -> Path:
    table(folder, ratings, "ratings.csv")
    return table(folder, movies, "movies.csv")


@pytest.mark.parametrize(
    ("ratings", "expected"),
    [
        ("movieId,userId,rating,timestamp\n2,1,5,1011\n3,1,4,1012\n", [("1", "2"), ("1", "3")]),
        ("timestamp,extra,rating,MOVIEID,userId\n1011,x,5,2,1\n", [("1", "2")]),
        ("1,2,5,1011\n1,3,4,1012\n", [("1", "2"), ("1", "3")]),
        ("\n\nuserId,movieId,rating,timestamp\n1,2,5,1011\n\n", [("1", "2")]),
    ],
)
def test_a_movielens_header_is_read_and_a_first_row_is_none(tmp_path, ratings, expected):
    raw = movielens(tmp_path / "raw", ratings, "title,genres,movieId\nTwo,Drama,2\n")
    assert run("movielens", "--raw", raw, "--out", tmp_path / "d")[0] == 0
    assert pairs(tmp_path / "d") == expected
    assert next(iter(read_atomic(tmp_path / "d" / "d.item")))["title"] == "Two"
    check_ledger(raw, tmp_path / "d")


@pytest.mark.parametrize(
    ("first", "told"),
    [
        ("userId,film,rating,timestamp", "ratings.csv:1: is this a header?"),
        ("userId,movieId,movieId,timestamp", "ratings.csv:1: is this a header?"),
        ("userId,movieId,rating", "ratings.csv:1: is this a header?"),
        ("a,b,c,d", "ratings.csv:1: rating 'c' is no decimal number"),
        ("1,2,5", "ratings.csv:1: 3 values where user, item, rating, time are expected"),
    ],
)
def test_a_first_line_that_is_neither_header_nor_row_is_named(tmp_path, first, told):
    raw = movielens(tmp_path / "raw", f"{first}\n1,2,5,1011\n")
    assert told in refused("movielens", "--raw", raw, out=tmp_path / "d")


def test_a_microlens_row_with_a_bad_time_is_no_header_and_a_list_may_have_one(tmp_path):
    raw = table(tmp_path / "raw", "u1,i1,oops\nu1,i2,2\nu1,i3,3\n", "X_pairs.csv")
    table(raw, "i1,title\ni2,B\ni3,C\n", "X_titles.csv")
    assert "X_pairs.csv:1: timestamp 'oops'" in refused("microlens", "--raw", raw, out=tmp_path / "d")
    assert run("microlens", "--raw", raw, "--skip-bad-rows", "--out", tmp_path / "d")[0] == 0
    assert pairs(tmp_path / "d") == [("u1", "i2"), ("u1", "i3")]
    check_ledger(raw, tmp_path / "d")
    raw = write_microlens(tmp_path / "lists", {"user": ["items"], "7": ["1\u00a0a", "2"]}, {})  # cut at spaces alone
    assert run("microlens", "--raw", raw, "--out", tmp_path / "e")[0] == 0
    assert pairs(tmp_path / "e") == [("7", "1\u00a0a"), ("7", "2")]
    check_ledger(raw, tmp_path / "e")


@pytest.mark.parametrize("header", ["items\tuser", "user_id\titem_seq", "User\tClicks", "u\titem"])
def test_a_list_file_with_another_header_is_named_and_commas_separate_no_items(tmp_path, header):
    raw = write_microlens(tmp_path / "raw", {"7": ["1", "2"]}, {})
    lists = next(raw.glob("*_pairs.tsv"))
    lists.write_text(f"{header}\n{lists.read_text()}")
    assert f"{lists.name}:1: is this a header? name the columns user and items" in refused(
        "microlens", "--raw", raw, out=tmp_path / "d"
    )
    lists.write_text("7\t1,2\n")
    assert "expected a user, a tab, and items separated by spaces" in refused(
        "microlens", "--raw", raw, out=tmp_path / "d"
    )


def test_of_one_table_an_item_has_the_first_title_that_there_is(tmp_path):
    rows = "u1,a,1,,\nu2,a,2,Real,\nu3,a,3,Other,x.png\nu1,b,4,B,\n"
    raw = table(tmp_path / "raw", f"user_id,item_id,timestamp,title,image\n{rows}", "log.csv")
    Image.new("RGB", (8, 8)).save(raw / "x.png")
    assert run("csv", "--raw", raw, "--out", tmp_path / "d")[0] == 0
    found = {row["item_id"]: (row["title"], bool(row["image"])) for row in read_atomic(tmp_path / "d" / "d.item")}
    assert found == {"a": ("Real", True), "b": ("B", False)}


def test_a_link_that_leads_to_itself_is_a_missing_image(tmp_path):
    raw = table(tmp_path / "raw", "user_id,item_id,timestamp\nu,a,1\nu,b,2\n", "log.csv")
    (raw / "images").mkdir()
    Image.new("RGB", (8, 8)).save(raw / "images" / "a.png")
    (raw / "images" / "b.jpg").symlink_to("b.jpg")
    assert run("csv", "--raw", raw, "--interactions", "log.csv", "--out", tmp_path / "d")[0] == 0
    assert "b.jpg" in (tmp_path / "d" / "missing_images.tsv").read_text()


def test_names_of_columns_that_mean_the_same_are_not_chosen_between(tmp_path):
    raw = table(tmp_path / "raw", "user_id,userId,item\na,b,c\n")
    assert "user_id and userId; choose one with --user-column" in refused("csv", "--raw", raw, out=tmp_path / "d")
    assert run("csv", "--raw", raw, "--user-column", "userId", "--out", tmp_path / "d")[0] == 0
    assert pairs(tmp_path / "d") == [("b", "c")]


def amazon(folder: Path, *lines: str) -> Path:
    jsonl(folder / "Toys.jsonl", [review("A", f"p{n}", 1_600_000_000_000 + n) for n in range(4)])
    with (folder / "Toys.jsonl").open("a") as file:
        file.writelines(line + "\n" for line in lines)
    jsonl(folder / "meta_Toys.jsonl", [product("p0", "one")])
    return folder


RECORD = '{"user_id": "A", "parent_asin": "p9", "timestamp": %s, "rating": %s}'
RECORDS = {
    "rating NaN": RECORD % ("1", "NaN"),
    "rating 10**400": RECORD % ("1", "1" + "0" * 400),
    "rating true": RECORD % ("1", "true"),
    "time 1e400": RECORD % ("1e400", "1"),
    "time 10**30": RECORD % ("1" + "0" * 30, "1"),
    "time null": RECORD % ("null", "1"),
    "a text": RECORD % ('"soon"', '"5"'),
    "brackets": "[" * 200_000 + "]" * 200_000,
    "inner brackets": RECORD % ("[" * 200_000 + "]" * 200_000, "1"),
    "a key twice": '{"user_id": "A", "parent_asin": "p9", "timestamp": 1, "rating": 1, "rating": 5}',
    "no user": '{"user_id": null, "parent_asin": "p", "timestamp": 1, "rating": 1}',
    "a NUL": '{"user_id": "A\\u0000", "parent_asin": "p", "timestamp": 1, "rating": 1}',
    "no object": "5",
    "no JSON": "{'user_id': 'A'}",
}
PRODUCTS = {
    "product brackets": "[" * 200_000,
    "product id": '{"parent_asin": 5}',
    "product key twice": '{"parent_asin": "p1", "title": "a", "title": "b"}',
    "product null": "null",
    "product twice": '{"parent_asin": "p0", "title": "another"}',
}


@pytest.mark.parametrize("what", [*RECORDS, *PRODUCTS])
def test_a_bad_review_or_product_is_named_or_left_out(tmp_path, what):
    raw, out = amazon(tmp_path / "raw", *([RECORDS[what], "  "] if what in RECORDS else [])), tmp_path / "d"
    if what in PRODUCTS:
        (raw / "meta_Toys.jsonl").open("a").write(PRODUCTS[what] + "\n")
    place = ("Toys.jsonl", 5) if what in RECORDS else ("meta_Toys.jsonl", 2)
    line = refused("amazon2023", "--raw", raw, out=out)
    assert f"{place[0]}:{place[1]}: " in line and "--skip-bad-rows" in line and len(line) < 400
    assert run("amazon2023", "--raw", raw, "--skip-bad-rows", "--out", out)[0] == 0
    assert rejects(out) == [place] and len(pairs(out)) == 4
    check_ledger(raw, out)


def test_odd_values_that_nothing_hangs_on_are_no_reason_to_stop(tmp_path):
    raw = amazon(tmp_path / "raw")
    odd = product("p1", "t\ud800", [{"large": "http://x/\ud800"}, {"large": "http://x/a b"}], price=float("nan"))
    jsonl(raw / "meta_Toys.jsonl", [odd | {"categories": [None, 1, ["a"], "B c"], "store": 5}])
    assert run("amazon2023", "--raw", raw, "--out", tmp_path / "d")[0] == 0
    (row,) = [row for row in read_atomic(tmp_path / "d" / "d.item") if row["item_id"] == "p1"]
    assert (row["title"], row["price"], row["categories"], row["store"]) == ("t", "", "1 B_c", "")
    table(tmp_path / "csv", "user,item,image\na,b,x\0.png\na,c," + "y" * 5000 + "\n")
    assert run("csv", "--raw", tmp_path / "csv", "--out", tmp_path / "e")[0] == 0
    assert [row["image"] for row in read_atomic(tmp_path / "e" / "e.item")] == ["", ""]


EMPTY = {
    "empty": ("csv", {"log.csv": ""}),
    "a header alone": ("csv", {"log.csv": "user,item,time\n"}),
    "blank lines": ("csv", {"log.csv": "user,item\n\n\n"}),
    "MovieLens header": ("movielens", {"ratings.csv": "userId,movieId,rating,timestamp\n", "movies.csv": ""}),
    "MovieLens empty": ("movielens", {"u.data": "", "u.item": ""}),
    "MicroLens pairs": ("microlens", {"X_pairs.csv": "user,item,timestamp\n", "X_titles.csv": ""}),
    "MicroLens lists": ("microlens", {"X_pairs.tsv": "\n", "X_titles.csv": ""}),
    "Amazon": ("amazon2023", {"C.jsonl": "\n", "meta_C.jsonl": ""}),
    "all bad": ("csv", {"log.csv": "user,item\n,x\n,y\n"}),
    # of no byte at all, as a download that failed leaves it; every title would be missing
    "movies": ("movielens", {"movies.csv": "", "ratings.csv": "1,2,3,1000\n"}),
    "titles": ("microlens", {"X_titles.csv": "", "X_pairs.csv": "1,2,1000\n"}),
    "products": ("amazon2023", {"meta_C.jsonl": "", "C.jsonl": RECORD % (1, 3)}),
}


@pytest.mark.parametrize("what", EMPTY)
def test_no_interaction_is_no_dataset(tmp_path, what):
    name, files = EMPTY[what]
    for file, text in files.items():
        table(tmp_path / "raw", text, file)
    line = refused(name, "--raw", tmp_path / "raw", "--skip-bad-rows", out=tmp_path / "d")
    assert next(iter(files)) in line and ("no interaction" in line or "is empty" in line)
    raw = movielens(tmp_path / "low", "1,2,3,1000\n1,3,3,1001\n")
    assert "nothing is left" in refused("movielens", "--raw", raw, "--min-rating", "4", out=tmp_path / "d")


NAME = "user,item,title\nann,s1,Café\n"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_another_encoding_is_named_with_the_flag_that_reads_it(tmp_path, encoding):
    raw = table(tmp_path / "raw", NAME.encode(encoding))
    flag = "latin-1 or cp1252" if encoding == "latin-1" else "utf-16 (without a byte order mark utf-16-le or"
    assert f"--encoding {flag}" in refused("csv", "--raw", raw, out=tmp_path / "d")
    assert run("csv", "--raw", raw, "--encoding", encoding, "--out", tmp_path / "d")[0] == 0
    assert [row["title"] for row in read_atomic(tmp_path / "d" / "d.item")] == ["Café"]
    if encoding == "utf-16-le":
        assert "give its own --encoding" in refused("csv", "--raw", raw, "--encoding", "utf-16", out=tmp_path / "e")


@pytest.mark.parametrize("option", [
    *(f"--encoding={name}" for name in ("klingon", "base64", "", "undefined", "x\0")),
    *(f"--separator={separator}" for separator in ("", '"', "\n", "a\n")),
])  # fmt: skip
def test_what_is_no_encoding_or_cannot_separate_is_a_line(tmp_path, option):
    name = option.partition("=")[0]
    assert name in refused("csv", "--raw", table(tmp_path / "raw", LOG), option, out=tmp_path / "d")
    if name == "--encoding":
        assert name in refused("amazon2023", "--raw", tmp_path, option, out=tmp_path / "d")


def test_two_files_for_one_table_are_both_named(tmp_path):
    raw = movielens(tmp_path / "ml", "1,2,3,4\n")
    table(raw, "1::2::3::4\n", "ratings.dat")
    assert "ratings.dat and ratings.csv" in refused("movielens", "--raw", raw, out=tmp_path / "d")
    for twin in ("Toys.jsonl", "meta_Toys.jsonl"):
        raw = amazon(tmp_path / twin)
        table(raw, b"", f"{twin}.gz")
        assert f"{twin} and {twin}.gz" in refused("amazon2023", "--raw", raw, out=tmp_path / "d")


def test_what_is_no_readable_file_is_named(tmp_path):
    raw = movielens(tmp_path / "ml", "1,2,3,4\n")
    (raw / "movies.csv").unlink()
    os.mkfifo(raw / "movies.csv")  # opening it would wait for ever
    assert "movies.csv is no ordinary file" in refused("movielens", "--raw", raw, out=tmp_path / "d")
    (raw / "ratings.csv").unlink()
    (raw / "ratings.csv").mkdir()
    assert "ratings.csv is a folder" in refused("movielens", "--raw", raw, out=tmp_path / "d")
    raw = amazon(tmp_path / "amazon")
    (raw / "Toys.jsonl").unlink()
    (raw / "Toys.jsonl").symlink_to("nowhere")
    assert "Toys.jsonl does not exist" in refused("amazon2023", "--raw", raw, out=tmp_path / "d")
    (raw / "Toys.jsonl").unlink()
    (raw / "Toys.jsonl").touch(0)
    user = os.geteuid()
    os.seteuid(user or 65_534)  # root may read anything
    try:
        with pytest.raises(UserError, match="Toys.jsonl cannot be read: Permission denied"):
            next(Intake().lines(raw / "Toys.jsonl"))
    finally:
        os.seteuid(user)
    assert "log.csv does not exist" in refused("csv", "--raw", raw, "--interactions", "log.csv", out=tmp_path / "d")
    for content, told in ((b"\x1f\x8b\x08\0", "packed with gzip"), (b"PK\x03\x04", "zip archive")):
        assert told in refused("csv", "--raw", table(tmp_path / "packed", content), out=tmp_path / "d")
    table(tmp_path / "damaged", b"\x1f\x8b\x08\0\0\0\0\0\0\3" + b"\xff" * 50, "log.csv.gz")
    assert "cannot be read on" in refused("csv", "--raw", tmp_path / "damaged", out=tmp_path / "d")


def test_impossible_times_are_told_and_are_never_the_earliest_copy(tmp_path):
    good, ahead = 1_600_000_000_000, int((time.time() + 9 * DAY) * 1000)
    raw = tmp_path / "raw"
    rows = [review("A", "p1", 0), review("A", "p1", good + 5), review("A", "p1", good + 9), review("A", "p2", good + 1)]
    jsonl(raw / "T.jsonl", [*rows, review("B", "p1", -3), review("B", "p2", good), review("B", "p3", ahead)])
    jsonl(raw / "meta_T.jsonl", [{"parent_asin": "p1", "title": "One"}])
    out = tmp_path / "d"
    assert run("amazon2023", "--raw", raw, "--out", out)[0] == 0
    assert [(*pair, row["exact_time"]) for pair, row in zip(pairs(out), read_atomic(out / "d.inter"), strict=True)] == [
        ("B", "p1", "-3"),
        ("B", "p2", f"{good}"),
        ("A", "p2", f"{good + 1}"),
        ("A", "p1", f"{good + 5}"),
        ("B", "p3", f"{ahead}"),
    ]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["impossible_times"] == {"read": [2, 1], "written": [1, 1]}
    told = "Impossible times: 2 at or before 1970-01-01 and 1 after tomorrow were read; 2 such interactions are written"
    assert told in (out / "README.md").read_text()
    found = " ".join(finding.what for finding in findings(measure(out)))
    assert "1 time lies at or before 1970-01-01" in found and "1 time lies after tomorrow" in found


# ---- whatever bytes a file holds

PIECES = [
    b'"', b'""', b"\r", b"\n", b"\r\n", b"\0", b"\xff", b"\xc3", b",", b"\t", b"::", b"|", b" ", b"-", b"nan", b"[PAD]",
    b"1e999", b"0x1", b"1_0", b"9" * 30, b"[", b"{", b"}", b":", b"\\", b"user,item", b"\xef\xbb\xbf", b"\xe2\x80\xa8",
]  # fmt: skip


def base(name: str) -> dict[str, bytes]:
    """Return small sound files of each format."""
    rng = Random(5)
    rows = [(f"u{user}", f"i{item}", 1000 + rng.randrange(900)) for user in range(4) for item in range(3)]
    titles = "".join(f'i{item},"T, ""{item}"""\n' for item in range(3))
    if name == "csv":
        log = "".join(f'{u},{i},{t},"A, ""b"" {i}"\n' for u, i, t in rows)
        return {"log.csv": f"user,item,time,title\n{log}".encode()}
    if name == "items":
        log = "".join(f"{t};{i};{u}\r\n" for u, i, t in rows)
        items = "item\ttitle\n" + titles.replace(",", "\t")
        return {"log.csv": f"time;item;user\r\n{log}".encode(), "items.tsv": items.encode()}
    if name == "movielens":
        log = "".join(f"{u},{i},3.5,{t}\n" for u, i, t in rows)
        movies = "".join(f'i{item},"T, {item}",A|B\n' for item in range(3))
        return {"ratings.csv": b"userId,movieId,rating,timestamp\n" + log.encode(), "movies.csv": movies.encode()}
    if name == "::":
        log = "".join(f"{u}::{i}::3::{t}\n" for u, i, t in rows)
        return {"ratings.dat": log.encode(), "movies.dat": b"i0::T\xe9::A|B\ni1::U::A\n"}
    if name == "pairs":
        log = "".join(f"{u},{i},{t}\n" for u, i, t in rows)
        return {"X_pairs.csv": log.encode(), "X_titles.csv": b"item,title\n" + titles.encode()}
    if name == "lists":
        return {"X_pairs.tsv": b"u1\ti1 i2\nu2\ti2 i3 i1\nu3\ti2\n", "X_titles.csv": titles.encode()}
    reviews = "".join(json.dumps(review(u, i, t * 10**9)) + "\n" for u, i, t in rows)
    meta = "".join(json.dumps(product(f"i{item}", "T")) + "\n" for item in range(3))
    return {"C.jsonl": reviews.encode(), "meta_C.jsonl": meta.encode()}


CONVERTERS = {"items": "csv", "::": "movielens", "pairs": "microlens", "lists": "microlens"}
FORMATS = ["csv", "items", "movielens", "::", "pairs", "lists", "amazon2023"]
CHANGES = st.lists(
    st.tuples(st.integers(0, 2**16), st.sampled_from(PIECES) | st.binary(max_size=3), st.integers(0, 6)),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(changes=CHANGES, options=st.sampled_from([[], ["--skip-bad-rows"], ["--skip-bad-rows", "--multiline"]]))
def test_damaged_bytes_give_one_line_or_a_ledger_that_holds(tmp_path_factory, name, changes, options):
    folder = tmp_path_factory.mktemp("damaged")
    raw, out = folder / "raw", folder / "d"
    files = base(name)
    for place, piece, length in changes:
        file = sorted(files)[place % len(files)]
        at = place % (len(files[file]) + 1)
        files[file] = files[file][:at] + piece + files[file][at + length :]
    for file, content in files.items():
        table(raw, content, file)
    named = ["--interactions", "log.csv", "--items", "items.tsv"] if name == "items" else []
    code, errors = run(CONVERTERS.get(name, name), "--raw", raw, "--out", out, *named, *options)
    if code:
        assert code == 2 and errors.count("\n") == 1 and errors.startswith("recbole-mllm: "), errors
        assert not out.exists()
        return
    assert errors == ""
    check_ledger(raw, out)
    if name == "csv" and "--multiline" not in options:
        left = {line for _, line in rejects(out)}
        lines = [line.rstrip(b"\r") for line in files["log.csv"].removeprefix(b"\xef\xbb\xbf").split(b"\n")]
        there = [line.decode() for number, line in enumerate(lines, 1) if line and number not in left]
        if there[0] == "user,item,time,title":  # else a damaged header may call another column so
            kept = [next(csv.reader([line])) for line in there[1:]]
            assert Counter(pairs(out)) == Counter((row[0], row[1]) for row in kept)
