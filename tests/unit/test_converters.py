"""Raw dumps become atomic files: what each format holds arrives, in exact order, and nothing vanishes unnamed."""

import contextlib
import csv
import hashlib
import io
import json
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from raw_dumps import jsonl, product, review, write_microlens

from dataset_converters.amazon2023 import main_image
from dataset_converters.convert import Source, add_option
from dataset_converters.interactions import Row
from dataset_converters.item_rows import ItemRow
from dataset_converters.options import SOURCES
from dataset_converters.source import columns
from recbole_mllm.cli import main
from recbole_mllm.data.atomic import clean, id_problem, read_atomic


def convert(name: str, raw: Path, out: Path, *options: str) -> int:
    return main(["convert", name, "--raw", str(raw), "--out", str(out), *options])


def pairs(folder: Path) -> list[tuple[str, str, str]]:
    rows = read_atomic(folder / f"{folder.name}.inter")
    return [(row["user_id"], row["item_id"], row["timestamp"]) for row in rows]


def titles(folder: Path) -> dict[str, str]:
    return {row["item_id"]: row["title"] for row in read_atomic(folder / f"{folder.name}.item")}


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    assert code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in lines if line.startswith("recbole-mllm:")]) == 1
    return lines[-1]


def test_microlens_lists_keep_their_order_and_titles_their_commas(tmp_path):
    raw = write_microlens(tmp_path / "raw", {"7": ["3", "1", "2"], "8": ["2", "9"]}, {"1": "a, b", "2": 'the "best"'})
    assert convert("microlens", raw, tmp_path / "ml") == 0
    expected = [("7", "3", "1"), ("7", "1", "2"), ("7", "2", "3"), ("8", "2", "1"), ("8", "9", "2")]
    assert pairs(tmp_path / "ml") == expected
    assert titles(tmp_path / "ml") == {"1": "a, b", "2": 'the "best"', "3": "", "9": ""}


@pytest.mark.parametrize("header", ["", "user,item,timestamp\n"])
def test_microlens_pairs_with_times_are_sorted_by_time(tmp_path, header):
    raw = write_microlens(tmp_path / "raw", {"7": ["1", "2"]}, {"1": "one", "2": "two"})
    (raw / "MicroLens-made_pairs.csv").write_text(f"{header}7,2,1700000000900\n7,1,1600000000000\n8,2,1650000000000\n")
    assert convert("microlens", raw, tmp_path / "ml") == 0
    assert pairs(tmp_path / "ml") == [
        ("7", "1", "1600000000000"),
        ("8", "2", "1650000000000"),
        ("7", "2", "1700000000900"),
    ]
    assert "MicroLens-made_pairs.tsv was not" in (tmp_path / "ml" / "README.md").read_text()


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_amazon_reviews_are_told_apart_by_parent_asin_and_kept_once(tmp_path, suffix):
    raw = tmp_path / "raw"
    jsonl(
        raw / f"Toys.{suffix}",
        [review("A", "p1", 3_000_000_000_000), review("A", "p2", 2_000_000_000_000), review("B", "p3", 5, 1.0)]
        + [review("A", "p1", 1_000_000_000_000, 2.0)],
    )
    jsonl(
        raw / f"meta_Toys.{suffix}",
        [product("p1", 'Say "hi"\n\tnow', price=12.5), product("p2", None), product("p9", "x")],
    )
    assert convert("amazon2023", raw, tmp_path / "toys") == 0
    assert [row[:2] for row in pairs(tmp_path / "toys")] == [("B", "p3"), ("A", "p1"), ("A", "p2")]
    rows = {row["item_id"]: row for row in read_atomic(tmp_path / "toys" / "toys.item")}
    assert {item: row["title"] for item, row in rows.items()} == {"p1": 'Say "hi" now', "p2": "", "p3": ""}
    assert rows["p1"]["price"] == "12.5"
    assert rows["p1"]["categories"] == "Toys_&_Games Puzzles"
    steps = json.loads((tmp_path / "toys" / "manifest.json").read_text())["steps"]
    assert [step[1:] for step in steps] == [[2, 3, 4], [2, 3, 3]]


MAIN, OTHER, THUMB = "http://x/main", "http://x/other", "http://x/t"


@pytest.mark.parametrize(
    ("images", "main"),
    [
        ([{"thumb": THUMB, "large": OTHER, "variant": "PT01"}, {"large": MAIN, "variant": "MAIN"}], MAIN),
        ({"thumb": [THUMB, None], "large": [OTHER, MAIN], "variant": ["PT01", "MAIN"]}, MAIN),
        ([{"thumb": None, "large": None, "hi_res": MAIN, "variant": "MAIN"}, None], MAIN),
        ({"hi_res": [MAIN], "large": [None], "variant": ["MAIN"]}, MAIN),
        *((images, "") for images in (None, [], {}, [None], [{"large": "file:///etc/passwd"}], "x", {"large": None})),
    ],
)
def test_amazon_main_image_in_either_layout(images, main):
    assert main_image(images) == main


def test_movielens_100k_is_read_as_latin_1(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "u.data").write_text("196\t242\t3\t881250949\n186\t242\t5\t881250948\n")
    flags = "|".join("1" if n in (5, 8) else "0" for n in range(19))
    (raw / "u.item").write_bytes(f'242|Les Misérables "1995" (1995)|01-Jan-1995||http://x|{flags}\n'.encode("latin-1"))
    assert convert("movielens", raw, tmp_path / "m") == 0
    assert pairs(tmp_path / "m") == [("186", "242", "881250948"), ("196", "242", "881250949")]
    (row,) = read_atomic(tmp_path / "m" / "m.item")
    assert (row["title"], row["genres"]) == ('Les Misérables "1995" (1995)', "Comedy Drama")


def test_movielens_1m_and_25m(tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    for folder in (one, many):
        folder.mkdir()
    (one / "ratings.dat").write_text("1::1193::5::978300760\n1::661::3::978302109\n")
    (one / "movies.dat").write_bytes("1193::Café: One, Two (1975)::Drama|Children's\n".encode("latin-1"))
    (many / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,296,5.0,1147880044\n1,306,3.5,1147868817\n")
    (many / "movies.csv").write_text('movieId,title,genres\n296,"Pulp, Fiction (1994)",(no genres listed)\n')
    assert convert("movielens", one, tmp_path / "m1") == convert("movielens", many, tmp_path / "m25") == 0
    assert titles(tmp_path / "m1") == {"1193": "Café: One, Two (1975)", "661": ""}
    assert titles(tmp_path / "m25") == {"296": "Pulp, Fiction (1994)", "306": ""}
    assert [row[:2] for row in pairs(tmp_path / "m25")] == [("1", "306"), ("1", "296")]
    assert convert("movielens", many, tmp_path / "high", "--min-rating", "4") == 0
    assert pairs(tmp_path / "high") == [("1", "296", "1147880044")]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|", "::"])
def test_csv_with_usual_names_and_any_separator(tmp_path, separator):
    raw = tmp_path / "raw"
    raw.mkdir()
    rows = [["uid", "iid", "Date", "extra"], ["u 1", "NA", "2024-01-02", ""], ["u 1", "b", "2024-01-01T10:00:00", "x"]]
    (raw / "log.csv").write_text("\ufeff" + "\r\n".join(separator.join(row) for row in rows))
    (raw / "things.csv").write_text("id;title\nNA;null\nb;'None\n")
    assert convert("csv", raw, tmp_path / "c", "--interactions", "log.csv", "--items", "things.csv") == 0
    assert [row[:2] for row in pairs(tmp_path / "c")] == [("u 1", "b"), ("u 1", "NA")]
    assert titles(tmp_path / "c") == {"NA": "null", "b": "None"}


def test_a_link_that_leaves_the_raw_images_folder_brings_no_image(tmp_path):
    raw, photos = tmp_path / "raw", tmp_path / "photos"
    raw.mkdir()
    photos.mkdir()
    (raw / "images").symlink_to(photos)  # the folder itself may be elsewhere
    Image.new("RGB", (4, 4), "red").save(photos / "1.png")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "secret.png")
    (photos / "2.png").symlink_to(tmp_path / "secret.png")
    (photos / "3.png").symlink_to("1.png")
    (raw / "log.csv").write_text("user,item,time\nann,1,1\nann,2,2\nann,3,3\n")
    assert convert("csv", raw, tmp_path / "c") == 0
    found = {row["item_id"]: row["image"] for row in read_atomic(tmp_path / "c" / "c.item")}
    assert found == {"1": "images/1.png", "2": "", "3": "images/3.png"}
    assert sorted(path.name for path in (tmp_path / "c" / "images").iterdir()) == ["1.png", "3.png"]
    assert "2.png leads out of the folder" in (tmp_path / "c" / "missing_images.tsv").read_text()


def test_csv_with_named_columns_and_images_by_column(tmp_path):
    raw = tmp_path / "raw"
    (raw / "pics").mkdir(parents=True)
    Image.new("RGB", (4, 4), "red").save(raw / "pics" / "shoe one.png")
    (raw / "t.csv").write_text(
        "who,what,how,pic\nann,s1,Red shoe,shoe one.png\nann,s2,Boot,../../secret.png\nbob,s1,x,y\n"
    )
    (tmp_path / "secret.png").write_bytes((raw / "pics" / "shoe one.png").read_bytes())
    named = ["--user-column", "who", "--item_column", "what", "--title-column", "how", "--image-column", "pic"]
    assert convert("csv", raw, tmp_path / "c", *named, "--image-dir", str(raw / "pics")) == 0
    rows = list(read_atomic(tmp_path / "c" / "c.item"))
    assert [(row["item_id"], row["title"], row["image"]) for row in rows] == [
        ("s1", "Red shoe", "images/s1.png"),
        ("s2", "Boot", ""),
    ]
    missing = (tmp_path / "c" / "missing_images.tsv").read_text()
    assert "s2\t../../secret.png\t" in missing and "leads out of the folder" in missing
    with Image.open(tmp_path / "c" / "images" / "s1.png") as image:
        assert image.size == (4, 4)


def test_images_of_the_last_conversion_are_replaced_and_others_never(tmp_path, capsys):
    raw, made = tmp_path / "raw", tmp_path / "c" / "images"
    (raw / "pics").mkdir(parents=True)
    (raw / "t.csv").write_text("user,item\nann,s1\nann,s2\n")

    def paint(path: Path, colour: str) -> bytes:
        path.unlink(missing_ok=True)  # not through the link that the dataset may have of it
        Image.new("RGB", (4, 4), colour).save(path)
        return path.read_bytes()

    def again() -> int:
        return convert("csv", raw, tmp_path / "c", "--interactions", "t.csv", "--image-dir", str(raw / "pics"))

    paint(raw / "pics" / "s1.png", "red")
    assert again() == 0
    blue = paint(raw / "pics" / "s1.png", "blue")
    mine = paint(made / "s2.png", "green")
    assert again() == 0
    assert (made / "s1.png").read_bytes() == blue and (made / "s2.png").read_bytes() == mine
    paint(raw / "pics" / "s2.png", "white")
    assert f"{made / 's2.png'} is another image than" in refused(capsys, again())
    assert (made / "s2.png").read_bytes() == mine
    made.rename(tmp_path / "elsewhere")
    made.symlink_to(tmp_path / "elsewhere")
    assert "images in it is a link" in refused(capsys, again())


@pytest.mark.parametrize(("folder", "written"), [("img", "img/1.png"), ("images", "images/1.png"), ("images", "1.png")])
def test_an_images_folder_need_not_be_given_where_a_column_names_images(tmp_path, folder, written):
    raw = tmp_path / "raw"
    (raw / folder).mkdir(parents=True)
    Image.new("RGB", (4, 4), "red").save(raw / folder / "1.png")
    (raw / "log.csv").write_text("user,item\nann,s1\nann,s2\n")
    (raw / "items.csv").write_text(f"item,title,image\ns1,Red shoe,{written}\ns2,Boot,{folder}/2.png\n")
    assert convert("csv", raw, tmp_path / "c", "--interactions", "log.csv", "--items", "items.csv") == 0
    assert [row["image"] for row in read_atomic(tmp_path / "c" / "c.item")] == ["images/s1.png", ""]
    assert "2.png does not exist" in (tmp_path / "c" / "missing_images.tsv").read_text()


def test_every_drop_is_counted_and_the_core_is_the_fixed_point(tmp_path):
    lists = {str(u): [str((u * k + k * k) % 23) for k in range(2 + u % 7)] for u in range(90)}
    raw = write_microlens(tmp_path / "raw", lists, {})
    assert convert("microlens", raw, tmp_path / "core", "--k-core", "4,6", "--max-history", "5") == 0
    kept = [(u, i) for u, items in lists.items() for i in items]
    while True:
        users, items = Counter(u for u, _ in kept), Counter(i for _, i in kept)
        again = [(u, i) for u, i in kept if users[u] >= 4 and items[i] >= 6]
        if again == kept:
            break
        kept = again
    expected = [pair for u in dict.fromkeys(u for u, _ in kept) for pair in [p for p in kept if p[0] == u][-5:]]
    assert [row[:2] for row in pairs(tmp_path / "core")] == expected
    steps = json.loads((tmp_path / "core" / "manifest.json").read_text())["steps"]
    assert steps[0][3] == sum(map(len, lists.values()))
    assert steps[-1][1:] == [len({u for u, _ in expected}), len({i for _, i in expected}), len(expected)]
    readme = (tmp_path / "core" / "README.md").read_text()
    assert f"| --k-core 4,6 | {len({u for u, _ in kept})} | {len({i for _, i in kept})} | {len(kept)} |" in readme


def test_a_sample_of_users_keeps_each_whole_and_depends_on_the_seed_alone(tmp_path):
    lists = {str(u): [str(u), str(u + 1)] for u in range(40)}
    backwards = dict(reversed(lists.items()))
    one = write_microlens(tmp_path / "one", lists, {})
    two = write_microlens(tmp_path / "two", backwards, {})
    for raw, name in ((one, "a"), (two, "b")):
        assert convert("microlens", raw, tmp_path / name, "--limit-users", "7", "--seed", "3") == 0
    assert convert("microlens", one, tmp_path / "c", "--limit_users", "7", "--seed", "4") == 0
    a, b, c = (set(pairs(tmp_path / name)) for name in "abc")
    assert a == b != c
    assert len(a) == 14 and len({user for user, *_ in a}) == 7


def test_confusing_times_become_places_and_stay_readable(tmp_path):
    raw = tmp_path / "raw"
    jsonl(raw / "T.jsonl", [review("A", "late", 1_700_000_000_002), review("A", "soon", 1_700_000_000_001)])
    jsonl(raw / "meta_T.jsonl", [{"parent_asin": "late", "title": "One"}])
    assert convert("amazon2023", raw, tmp_path / "t") == 0
    rows = list(read_atomic(tmp_path / "t" / "t.inter"))
    assert [(r["item_id"], r["timestamp"], r["exact_time"]) for r in rows] == [
        ("soon", "1", "1700000000001"),
        ("late", "2", "1700000000002"),
    ]


def test_the_paper_protocol_splits_users_and_keeps_histories(tmp_path):
    lists = {f"u{u}": [f"i{(u + k) % 31}" for k in range(1 + u % 4)] for u in range(80)}
    raw = write_microlens(tmp_path / "raw", lists, {})
    assert convert("microlens", raw, tmp_path / "p", "--protocol", "paper") == 0
    parts = {part: list(read_atomic(tmp_path / "p" / f"p.{part}.inter")) for part in ("train", "valid", "test")}
    assert {part: len(rows) for part, rows in parts.items()} == {"train": 48, "valid": 6, "test": 6}
    seen = {row["user_id"]: [*row["item_id_list"].split(), row["item_id"]] for rows in parts.values() for row in rows}
    assert seen == {user: items for user, items in lists.items() if len(items) > 1}
    settings = yaml.safe_load((tmp_path / "p" / "dataset.yaml").read_text())
    assert settings["benchmark_filename"] == ["train", "valid", "test"]
    assert settings["alias_of_item_id"] == ["item_id_list"]
    assert settings["MAX_ITEM_LIST_LENGTH"] == 3
    assert "left out: 20 users" in (tmp_path / "p" / "README.md").read_text()


@pytest.mark.parametrize("protocol", ["loo", "paper"])
def test_the_same_input_gives_the_same_bytes_and_the_manifest_their_digests(tmp_path, protocol):
    raw = write_microlens(tmp_path / "raw", {str(u): ["1", "2", str(u)] for u in range(20)}, {"1": "one"})
    folders = [tmp_path / "x" / "d", tmp_path / "y" / "d"]
    for folder in (*folders, folders[0]):  # the last over itself
        assert convert("microlens", raw, folder, "--protocol", protocol) == 0
    contents = [{path.name: path.read_bytes() for path in sorted(folder.iterdir())} for folder in folders]
    assert contents[0] == contents[1]
    manifest = json.loads(contents[0]["manifest.json"])
    told = {entry["file"]: entry["sha256"] for entry in manifest["outputs"]}
    assert told == {n: hashlib.sha256(b).hexdigest() for n, b in contents[0].items() if n != "manifest.json"}
    for entry in manifest["inputs"]:
        assert entry["sha256"] == hashlib.sha256((raw / entry["file"]).read_bytes()).hexdigest()
    (folder / "d.mllm.sqlite").write_text("summaries cost days")
    assert convert("microlens", raw, folder) == 0  # no file of another protocol stays
    assert sorted(path.name for path in folder.glob("d.*")) == ["d.inter", "d.item", "d.mllm.sqlite"]


def test_a_download_cut_short_is_named(tmp_path, capsys):
    raw = tmp_path / "raw"
    path = jsonl(raw / "T.jsonl.gz", [review(f"A{n}", "p", n) for n in range(5000)])
    path.write_bytes(path.read_bytes()[:-500])
    jsonl(raw / "meta_T.jsonl.gz", [])
    assert "fetch the file again" in refused(capsys, convert("amazon2023", raw, tmp_path / "t"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["convert"], "NAME"),
        (["convert", "microlense", "--raw", ".", "--out", "x"], "microlense"),
        (["convert", "microlens", "--raw", "nowhere", "--out", "x"], "nowhere"),
        (["convert", "microlens", "--raw", ".", "--out", "x"], "_pairs.tsv"),
        (["convert", "amazon2023", "--raw", ".", "--out", "x"], "CATEGORY.jsonl"),
        (["convert", "movielens", "--raw", ".", "--out", "x"], "ratings.csv"),
        (["convert", "csv", "--raw", ".", "--out", "x"], "--interactions"),
        (["convert", "csv", "--raw", ".", "--out", "x", "--k-core", "0,5"], "whole number"),
        (["convert", "csv", "--raw", "t.csv", "--out", "o", "--rating-column", "starz"], "'starz'; it has user, item"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, words, told, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "t.csv" in words:
        Path("t.csv").write_text("user,item,stars\na,b,5\n")
    assert told.lower() in refused(capsys, main(words)).lower()


class Books(Source):
    """``ratings.csv`` and ``books.csv``, whose columns have names of their own."""

    name, example, item_kind, has_urls = "books", "books --raw books/ --out dataset/books", "product", True
    features, duplicates, recorded = {"authors": "token_seq"}, "first", ("long_titles",)

    @classmethod
    def add_options(cls, parser):
        add_option(parser, "--long-titles", action="store_true", default=None)

    @classmethod
    def from_options(cls, raw, images, options):
        source = cls(images)
        source.raw, source.title = raw, "original_title" if options.long_titles else "title"
        return source

    def interactions(self, intake):
        for user, item in columns(intake.table(self.raw / "ratings.csv", ","), intake, "user", "book_id"):
            yield Row(user, item)

    def items(self, intake):
        table = intake.table(self.raw / "books.csv", ",")
        for item, title, author, url in columns(table, intake, "book_id", self.title, "authors", "image_url"):
            yield ItemRow(item, title, "", (author,), url)


def test_a_new_format_is_one_class_and_its_entry(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(SOURCES, "books", Books)
    raw, out = tmp_path / "raw", tmp_path / "books"
    raw.mkdir()
    (raw / "ratings.csv").write_text("book_id,user_id,rating\n7,1,5\n9,1,4\n7,1,1\n")
    (raw / "books.csv").write_text(
        "book_id,authors,title,original_title,image_url\n7,A,S,Seven,http://x/7\n9,B,N,Nine,\n"
    )
    assert convert("books", raw, out, "--long-titles") == 0
    assert [pair[:2] for pair in pairs(out)] == [("1", "7"), ("1", "9")] and titles(out) == {"7": "Seven", "9": "Nine"}
    assert [row["authors"] for row in read_atomic(out / "books.item")] == ["A", "B"]
    assert json.loads((out / "manifest.json").read_text())["options"] == {"seed": 2024, "long_titles": True}
    with pytest.raises(SystemExit):
        main(["convert", "books", "--help"])
    assert "--download-images" in capsys.readouterr().out
    (raw / "ratings.csv").write_text("book,user_id,rating\n7,1,5\n")
    assert "name each of user, book_id once, as user_id, book_id" in refused(capsys, convert("books", raw, out))


def test_converters_load_neither_torch_nor_recbole_nor_pandas(tmp_path):
    raw = write_microlens(tmp_path / "raw", {"1": ["2", "3"]}, {})
    code = (
        "import sys; from recbole_mllm.cli import main; "
        f"assert main(['convert', 'microlens', '--raw', {str(raw)!r}, '--out', {str(tmp_path / 'd')!r}]) == 0; "
        "assert not {'torch', 'recbole', 'pandas', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    again = [sys.executable, "-m", "dataset_converters", "microlens", "--raw", str(raw), "--out", str(tmp_path / "e")]
    subprocess.run(again, check=True)
    assert pairs(tmp_path / "d") == pairs(tmp_path / "e")


CELLS = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ["NA", "null", "", " a", "[PAD]", '"x', "a\tb", "a\nb", "\x00", "\u200b", "مرحبا", "👩‍👩‍👧", "a b", "'til"]
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(st.tuples(CELLS, CELLS, CELLS, st.integers(0, 2**40)), min_size=1, max_size=6))
def test_whatever_a_table_holds_arrives_or_is_refused_with_its_line(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("any")
    with (folder / "t.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("user", "item", "title", "time"), *rows])
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = convert("csv", folder / "t.csv", folder / "d", "--multiline")
    refusals = [user for user, item, _, _ in rows if id_problem(user) or id_problem(item)]
    assert (code == 2) is bool(refusals)
    if code == 2:
        assert re.search(r"t\.csv:\d+: (user|item) id ", errors.getvalue())
        assert not (folder / "d").exists()
        return
    ordered = sorted(rows, key=lambda row: row[3])
    assert [row[:2] for row in pairs(folder / "d")] == [(user, item) for user, item, _, _ in ordered]
    first = {item: title for _, item, title, _ in reversed(rows)}
    assert titles(folder / "d") == {item: clean(title) for item, title in first.items()}


def test_a_misspelt_column_is_named_by_the_nearest_one_there_is(tmp_path, capsys):
    (tmp_path / "log.csv").write_text("reader,isbn\nu1,a\n")
    words = ["convert", "csv", "--raw", str(tmp_path), "--interactions", "log.csv", "--out", str(tmp_path / "o")]
    assert main([*words, "--user-column", "reeder", "--item-column", "isbm"]) == 2
    said = capsys.readouterr().err
    assert "--user-column=reader" in said and "--item-column=isbn" in said


def test_all_missing_columns_are_named_at_once_with_a_command_that_names_them(tmp_path, capsys):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "log.csv").write_text("member_id,stock,purchase_date\nu1,a,1\nu2,b,2\n")
    (raw / "it.csv").write_text("item,film title\na,x\nb,y\n")
    words = ["convert", "csv", "--raw", str(raw), "--interactions", "log.csv", "--items", "it.csv"]
    words += ["--out", str(tmp_path / "o"), "--time-column", "bought"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "log.csv has no user and item column under a usual name and no column 'bought'" in said
    assert "it has member_id, stock, purchase_date" in said and "it.csv has no title column" in said
    pasted = shlex.split(said.partition("nearest first: ")[2])
    assert pasted[: len(words) + 1] == ["recbole-mllm", *words]
    assert main(pasted[1:]) == 2  # no column is like `stock`, and none is made up
    assert "it.csv has no" not in (said := capsys.readouterr().err) and "no column 'NAME'" in said
    assert main([*pasted[1:], "--item-column=stock"]) == 0
    assert (tmp_path / "o" / "o.inter").read_text().splitlines()[1] == "u1\ta\t1"


def test_columns_that_are_not_read_are_named_and_what_both_tables_have_is_the_item(tmp_path, capsys):
    (tmp_path / "log.csv").write_text("user,thing,when,shop\nu1,a,1,s\nu1,b,2,s\n")
    (tmp_path / "it.csv").write_text("thing,title,price,item_group\na,x,1,g\nb,y,2,g\n")
    words = ["convert", "csv", "--raw", str(tmp_path), "--interactions", "log.csv", "--items", "it.csv"]
    words += ["--out", str(tmp_path / "o")]
    assert main(words) == 2 and "--item-column=thing\n" in capsys.readouterr().err
    assert main([*words, "--item-column=thing"]) == 0
    said = "Columns that are not read: log.csv: when, shop; it.csv: price, item_group (--time-column NAME"
    assert said in capsys.readouterr().out and said in (tmp_path / "o" / "README.md").read_text()
    assert main([*words, "--item-column=thing", "--time-column=when"]) == 0
    assert "not read: log.csv: shop; " in capsys.readouterr().out


def test_a_split_is_not_put_inside_what_is_split(tmp_path, capsys):
    raw = write_microlens(tmp_path / "raw", {str(u): ["1", "2", str(u)] for u in range(20)}, {"1": "one"})
    assert convert("microlens", raw, tmp_path / "m") == 0
    before = sorted((tmp_path / "m").iterdir())
    for out in ("later", "x/later", "../m/later"):
        assert main(["split", str(tmp_path / "m"), "--out", str(tmp_path / "m" / out)]) == 2
        assert "lies inside" in capsys.readouterr().err
    assert sorted((tmp_path / "m").iterdir()) == before
