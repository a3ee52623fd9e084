"""Atomic files: what is cleaned survives both readers, a file is whole or absent."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from recbole_mllm.data.atomic import clean, read_atomic, whole_file, write_atomic
from recbole_mllm.data.images import find_image, inside, open_image
from recbole_mllm.data.texts import read_items
from recbole_mllm.errors import UserError


@given(st.lists(st.text(), max_size=5))
def test_cleaned_text_survives_the_round_trip(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("a") / "x.item"
    cleaned = [clean(text) for text in texts]
    write_atomic(path, {"item_id": "token", "title": "token_seq"}, [(str(n), t) for n, t in enumerate(cleaned)])
    assert [row["title"] for row in read_atomic(path)] == cleaned


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
        ("a \u200db\u200c c", "a b c"),
        ("\u202eevil\u202c", "evil"),
        ("שלום עולם", "שלום עולם"),
        ("\ud800x", "x"),
        ("\u3000全角\u3000空白", "全角 空白"),
        ("None", "None"),
    ],
)
def test_clean_keeps_words_and_drops_what_nobody_sees(text, cleaned):
    assert clean(text) == cleaned


@pytest.mark.parametrize(
    "text", ["\u200d" * 10**6, "\t" * 10**6, '"' * 10**6, "é \u200b\t" * 250_000, "word " * 200_000]
)
def test_a_megabyte_is_cleaned_in_no_time(text):
    start = time.perf_counter()
    assert len(clean(text)) <= 10**6
    assert time.perf_counter() - start < 5


def test_a_tab_in_a_value_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(UserError, match="tab or newline"):
        write_atomic(tmp_path / "x.item", {"item_id": "token", "title": "token_seq"}, [("1", "a\tb")])
    assert list(tmp_path.iterdir()) == []


def test_a_reader_names_file_and_line(tmp_path):
    (tmp_path / "x.item").write_text("item_id:token\ttitle:token_seq\n1\ta\n2\tb\tc\n")
    with pytest.raises(UserError, match=r"x\.item:3: 3 values for 2 columns"):
        list(read_atomic(tmp_path / "x.item"))


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as file:
        file.write("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_images_open_upright_and_rgb(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    Image.new("RGB", (40, 20), "red").save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.fromarray(np.full((4, 4), 65535, np.uint16)).save(tmp_path / "deep.png")
    assert open_image(tmp_path / "turned.jpg").size == (20, 40)
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert open_image(tmp_path / "deep.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\xff\xd8\xff\xe0 cut off"])
def test_an_unreadable_image_counts_as_missing_and_the_item_stays(tmp_path, content):
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "shop.item").write_text("item_id:token\ttitle:token_seq\timage:token\n1\ta mug\tm.jpg\n2\ta hat\t\n")
    (folder / "m.jpg").write_bytes(content)
    items = read_items(folder, None)
    assert items.title("1") == "a mug" and items.image("1") is None and items.images == {}


def test_images_that_cannot_be_used_are_one_line_and_no_file(tmp_path, caplog):
    folder = tmp_path / "shop"
    folder.mkdir()
    rows = "1\ta\tnone.png\n2\tb\t../x.png\n3\tc\tgood.png\n4\td\t\n"
    (folder / "shop.item").write_text("item_id:token\ttitle:token_seq\timage:token\n" + rows)
    Image.new("RGB", (2, 2)).save(folder / "good.png")
    assert set(read_items(folder, None).images) == {"3"}
    (line,) = caplog.messages
    assert line.startswith("2 of 3 images cannot be used") and "item 1: none.png does not exist" in line
    assert f"recbole-mllm inspect {folder}" in line and len(list(folder.iterdir())) == 2


def test_an_item_that_stands_twice_is_refused_with_both_lines(tmp_path):
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "shop.item").write_text("item_id:token\ttitle:token_seq\n1\ta\n2\tb\n\n1\tc\n")
    with pytest.raises(UserError, match=r"shop\.item:5: item 1 stands in line 2 already"):
        read_items(folder, None)


@pytest.mark.parametrize(
    ("item", "problem"),
    [("", "is empty"), ('"3"', "starts with a quote"), ("[PAD]", r"is \[PAD\]"), ("i" * 1001, "has 1,001")],
)
def test_an_id_that_recbole_would_not_know_is_refused_and_not_left_without_a_title(item, problem, tmp_path):
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "shop.item").write_text(f"item_id:token\ttitle:token_seq\n1\ta\n{item}\tb\n")
    with pytest.raises(UserError, match=rf"shop\.item:3: the item's id {problem}"):
        read_items(folder, None)


def test_no_path_leads_out_of_the_folder(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    assert inside(folder, "../secret.png") is None and inside(folder, "link.png") is None
    assert find_image(folder, "../secret") == (None, None)


def test_images_by_id_are_found_in_the_folder_or_its_images(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "images" / "7.jpg")
    assert find_image(tmp_path, "7") == (tmp_path / "images" / "7.jpg", None) and find_image(tmp_path, "8") == (
        None,
        None,
    )


def test_what_a_killed_process_had_begun_to_write_is_swept_away(tmp_path):
    path = tmp_path / "x.item"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / f".x.item.{ended.pid}.0a1b2c3d.tmp").write_text("half")
    others = [
        f".x.item.{os.getppid()}.0a1b2c3d.tmp",  # of a process that is still at it
        f".y.item.{ended.pid}.0a1b2c3d.tmp",  # of another file
        f".x.item.b.{ended.pid}.0a1b2c3d.tmp",
        f".x.item.{ended.pid}.tmp",  # of another make
        f".x.item.{ended.pid}.mine.tmp",
    ]
    for name in others:
        (tmp_path / name).write_text("stays")
    write_atomic(path, {"item_id": "token"}, [("1",)])
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*others, "x.item"])


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
