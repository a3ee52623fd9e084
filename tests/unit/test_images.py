"""Every kind of image a folder may hold: valid ones open as upright RGB, the others say why they cannot."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recbole_mllm.common.errors import UserError
from recbole_mllm.data.images import (
    ItemImages,
    Missing,
    check_images,
    find_image,
    open_image,
    problem,
    resolve,
    write_report,
)
from recbole_mllm.data.item_table import read_items

RED = (255, 0, 0)


def grey(dtype: str, value: float) -> Image.Image:
    return Image.fromarray(np.full((4, 4), value, dtype))


def palette_with_alpha() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.info["transparency"] = 1
    return image


GOOD = {
    "plain.jpg": (Image.new("RGB", (8, 8), RED), {}, RED),
    "adobe-cmyk.jpg": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), {}, RED),  # Pillow writes it inverted, as Adobe
    "cmyk.tif": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), {}, RED),
    "palette.png": (palette_with_alpha(), {}, RED),
    "clear.png": (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), {}, (255, 255, 255)),
    "half.png": (Image.new("LA", (4, 4), (0, 128)), {}, (127, 127, 127)),
    "deep.png": (grey("uint16", 32_768), {}, (128, 128, 128)),
    "deeper.tif": (grey("int32", 65_535), {}, (255, 255, 255)),
    "floating.tif": (grey("float32", 0.5), {}, (128, 128, 128)),
    "bit.png": (Image.new("1", (4, 4), 1), {}, (255, 255, 255)),
    "moving.gif": (Image.new("RGB", (4, 4), RED), {"append_images": [Image.new("RGB", (4, 4), "blue")]}, RED),
    "moving.webp": (Image.new("RGB", (4, 4), RED), {"append_images": [Image.new("RGB", (4, 4))], "lossless": 1}, RED),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_valid_image_opens_as_rgb(tmp_path, name):
    image, options, colour = GOOD[name]
    image.save(tmp_path / name, save_all="append_images" in options, **options)
    opened = open_image(tmp_path / name)
    assert problem(tmp_path / name) is None
    assert opened.mode == "RGB" and opened.size == image.size
    assert np.abs(np.subtract(opened.getpixel((0, 0)), colour)).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_stands_upright(tmp_path, orientation):
    upright = Image.new("RGB", (40, 20), "white")
    upright.paste(RED, (0, 0, 10, 10))  # the corner that must stay upper left
    undo = [None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_90, Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_270][orientation - 1]  # fmt: skip
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(open_image(tmp_path / "turned.png"), upright)


def png_header(width: int, height: int) -> bytes:
    """Return a PNG of that size whose pixels are a few compressed zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(9999))) + chunk(b"IEND", b"")
    )


BAD = {
    "empty.jpg": (b"", "is empty"),
    "page.jpg": (b"\n<!DOCTYPE html><html>not found</html>", "is no image (HTML page)"),
    "drawing.svg": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "(SVG drawing)"),
    "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no image"),
    "noise.png": (bytes(range(200)), "is no image"),
    "bomb.png": (png_header(20_000, 20_000), "has 400,000,000 pixels, more than 50,000,000"),
    "large.png": (png_header(10_000, 6_000), "has 60,000,000 pixels, more than 50,000,000"),
    "short.png": (png_header(500, 500), "is truncated"),
    "head.jpg": (b"\xff\xd8\xff\xe0 cut off", "is truncated"),
}


def refused(path: Path) -> str:
    told = problem(path)
    with pytest.raises(OSError) as caught:
        open_image(path)
    assert told is not None and str(caught.value) == f"{path}: {told}"
    return told


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_image_says_why(tmp_path, name):
    content, told = BAD[name]
    (tmp_path / name).write_bytes(content)
    assert told in refused(tmp_path / name)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_an_image_cut_short_is_truncated(tmp_path, kind):
    noise = np.random.default_rng(0).integers(0, 255, (80, 60, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole", format=kind)
    whole = (tmp_path / "whole").read_bytes()
    for share in (0.1, 0.5, 0.97):
        (tmp_path / "cut").write_bytes(whole[: int(len(whole) * share)])
        assert "truncated" in refused(tmp_path / "cut")


def test_no_file_and_one_without_permission_say_so(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    assert refused(tmp_path) == refused(tmp_path / "pipe.jpg") == "is no file"
    assert refused(tmp_path / "none.jpg") == "does not exist"
    Image.new("RGB", (2, 2)).save(tmp_path / "mine.png")
    (tmp_path / "mine.png").chmod(0)
    user = os.geteuid()
    os.seteuid(user or 65_534)  # root may read everything
    try:
        assert refused(tmp_path / "mine.png") == "may not be read"
    finally:
        os.seteuid(user)


def test_damaged_exif_does_not_hide_the_picture(tmp_path):
    Image.new("RGB", (4, 4), RED).save(tmp_path / "odd.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff damaged")
    assert problem(tmp_path / "odd.jpg") is None and open_image(tmp_path / "odd.jpg").size == (4, 4)


def shop(tmp_path: Path) -> Path:
    """Return a dataset folder with one image in it, and one outside that links inside lead to."""
    folder = tmp_path / "shop"
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (2, 2)).save(folder / "images" / "1.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "secret.png")
    (folder / "images" / "2.png").symlink_to(tmp_path / "secret.png")
    (folder / "images" / "3.png").symlink_to("1.png")
    (folder / "images" / "loop.png").symlink_to("loop.png")
    return folder


@pytest.mark.parametrize(
    ("relative", "reason"),
    [
        ("images/1.png", None),
        ("images/3.png", None),
        ("images/2.png", "leads out of the folder"),
        ("../secret.png", "leads out of the folder"),
        ("/etc/hostname", "leads out of the folder"),
        ("images/9.png", "does not exist"),
        ("images", "is no file"),
        ("", "no path is given"),
        ("images/\0.png", "cannot be a file"),
        ("x" * 5_000, "cannot be a file"),
        ("images/loop.png", "is a link to itself"),
    ],
)
def test_a_path_leads_to_a_file_in_the_folder_or_says_why_not(tmp_path, relative, reason):
    folder = shop(tmp_path)
    path, told = resolve(folder, relative)
    assert (path == folder / relative and told is None) if reason is None else (path is None and reason in str(told))


def test_an_image_by_id_stays_in_the_folder_which_may_itself_be_a_link(tmp_path):
    folder = shop(tmp_path)
    (tmp_path / "link").symlink_to(folder)
    (folder / "images" / "9.JPG").write_bytes(b"\xff\xd8")
    for parent in (folder, tmp_path / "link", folder / "images"):
        for item in "13":
            path, why = find_image(parent, item)
            assert path is not None and path.is_file() and why is None
        assert find_image(parent, "9")[0] is not None
        none, reason = find_image(parent, "2")
        assert none is None and str(reason).endswith("2.png leads out of the folder")
        assert find_image(parent, "loop")[0] is None
    assert find_image(folder / "images", "../../secret") == (None, None)


def test_the_images_folder_of_a_dataset_may_be_a_link_out_of_which_none_leads(tmp_path):
    photos = shop(tmp_path) / "images"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "images").symlink_to(photos)
    for name in ("1.png", "3.png"):
        assert resolve(tmp_path / "other", f"images/{name}") == (tmp_path / "other/images" / name, None)
    for name in ("2.png", "../../secret.png"):
        assert resolve(tmp_path / "other", f"images/{name}") == (None, "leads out of the folder")


def test_each_item_without_an_image_is_in_the_report(tmp_path):
    folder, images = shop(tmp_path), ItemImages()
    (folder / "images" / "4.png").write_bytes(b"")
    named = {"a": "images/1.png", "b": "../x.png", "c": "images/4.png", "d": "", "2": "", "3": "no.png"}
    for item, relative in named.items():
        images.add(folder, item, relative, folder / "images")
    images.check()
    assert set(images.found) == {"a", "3"}, "where the path is wrong, the image of that id counts"
    assert images.missing == [
        Missing("b", "../x.png", "leads out of the folder"),
        Missing("2", str(folder / "images"), "2.png leads out of the folder"),
        Missing("c", str(folder / "images/4.png"), "is empty"),
    ]
    assert [lost.item for lost in images.absent] == ["d"]
    assert write_report(tmp_path / "missing_images.tsv", images.missing) == 3
    lines = (tmp_path / "missing_images.tsv").read_text().splitlines()
    assert lines[:2] == ["item_id\tpath\treason", "b\t../x.png\tleads out of the folder"]


def test_odd_sizes_are_found(tmp_path):
    sizes = {"ordinary": (300, 200), "long": (2, 300), "small": (3, 3), "tall poster": (100, 900)}
    for name, size in sizes.items():
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    found = check_images({name: tmp_path / f"{name}.png" for name in sizes})
    assert found == ({}, {"long": (2, 300), "small": (3, 3)})


@pytest.fixture
def items_file(tmp_path):
    """Return a function that writes the items file of a dataset and returns its folder."""
    (tmp_path / "shop").mkdir()

    def written(rows, header="item_id:token\ttitle:token_seq"):
        (tmp_path / "shop" / "shop.item").write_text(f"{header}\n{rows}")
        return tmp_path / "shop"

    return written


def test_images_that_cannot_be_used_are_one_line_and_no_file(items_file, caplog):
    rows = "1\ta\tnone.png\n2\tb\t../x.png\n3\tc\tgood.png\n4\td\t\n"
    folder = items_file(rows, "item_id:token\ttitle:token_seq\timage:token")
    Image.new("RGB", (2, 2)).save(folder / "good.png")
    items = read_items(folder, None)
    assert set(items.images) == {"3"} and items.title("1") == "a" and items.image("1") is None
    (line,) = caplog.messages
    assert line.startswith("2 of 3 images cannot be used") and "item 1: none.png does not exist" in line
    assert f"recbole-mllm inspect {folder}" in line and len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ("1\ta\n2\tb\n\n1\tc\n", "5: item 1 is already in line 2"),
        ("1\ta\n\tb\n", "3: the item's id is empty"),
        ('1\ta\n"3"\tb\n', "3: the item's id starts with a quote"),
        ("1\ta\n[PAD]\tb\n", r"3: the item's id is \[PAD\]"),
        (f"1\ta\n{'i' * 1001}\tb\n", "3: the item's id has 1,001"),
    ],
)
def test_an_id_that_stands_twice_or_that_recbole_would_not_know_is_refused(items_file, rows, problem):
    with pytest.raises(UserError, match=rf"shop\.item:{problem}"):
        read_items(items_file(rows), None)
