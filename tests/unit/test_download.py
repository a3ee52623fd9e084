"""Images are fetched from a real server that misbehaves: again after a failure, never twice, and nothing but images."""

import io
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import ClassVar

import pytest
from PIL import Image
from planned_server import listening
from raw_dumps import jsonl, product, review

from dataset_converters.item_rows import Downloader
from recbole_mllm.cli import main
from recbole_mllm.data.atomic import read_atomic


def picture() -> bytes:
    out = io.BytesIO()
    Image.effect_noise((64, 64), 90).convert("RGB").save(out, "JPEG")
    return out.getvalue()


class Shop(BaseHTTPRequestHandler):
    """Answers by path; ``/flaky`` fails twice before it serves."""

    asked: ClassVar[Counter[str]] = Counter()
    image: ClassVar[bytes] = picture()

    def do_GET(self) -> None:
        type(self).asked[self.path] += 1
        page, name = b"<html>sold out</html>", self.path.strip("/")
        if name == "gone" or (name == "flaky" and self.asked[self.path] < 3):
            self.send_error(404 if name == "gone" else 503)
        elif name == "elsewhere":
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname")
            self.end_headers()
        elif name in ("page", "lie"):
            self._send(page, "text/html" if name == "page" else "image/jpeg")
        elif name == "short":
            self._send(self.image[:500], "image/jpeg", len(self.image))
        else:
            self._send(self.image + bytes(300_000 if name == "huge" else 0), "image/jpeg")

    def _send(self, body: bytes, kind: str, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def shop() -> Iterator[str]:
    Shop.asked.clear()
    with listening(Shop) as url:
        yield url


FETCH = Downloader(tries=3, wait_s=0.01, max_bytes=200_000, timeout_s=5)


@pytest.mark.parametrize(
    ("name", "asked", "why"),
    [
        ("gone", 1, "404"),
        ("page", 1, "text/html"),
        ("lie", 1, "HTML"),
        ("huge", 1, "200,000 bytes"),
        ("short", 3, "after 3 attempts"),
        ("elsewhere", 1, ""),
    ],
)
def test_what_is_no_image_is_refused_with_the_reason(shop, tmp_path, name, asked, why):
    path, reason = FETCH(f"{shop}/{name}", tmp_path / "x")
    assert path is None and why in reason and reason
    assert Shop.asked[f"/{name}"] == asked
    assert not list(tmp_path.iterdir())


def test_a_failing_server_is_asked_again_and_an_image_never_twice(shop, tmp_path):
    path, reason = FETCH(f"{shop}/flaky", tmp_path / "x")
    assert (path, reason) == (tmp_path / "x.jpg", "")
    assert path.read_bytes() == Shop.image
    assert FETCH(f"{shop}/flaky", tmp_path / "x") == (path, "")
    assert Shop.asked["/flaky"] == 3
    path.write_bytes(Shop.image[:100])  # a torn file is fetched again
    assert FETCH(f"{shop}/flaky", tmp_path / "x") == (path, "")
    assert path.read_bytes() == Shop.image


@pytest.mark.parametrize(
    ("url", "why"),
    [
        *((url, "no http") for url in ("file:///etc/hostname", "ftp://127.0.0.1/x", "data:image/png;base64,AA", "")),
        ("http://127.0.0.1:9/x.jpg", "after 3 attempts"),
    ],
)
def test_only_http_is_spoken_and_an_unreachable_server_given_up(url, why, tmp_path):
    path, reason = FETCH(url, tmp_path / "x")
    assert path is None and why in reason


def test_amazon_images_stay_in_the_folder_and_failures_are_reported(shop, tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "toys"
    items = ["p1", "../../evil", "p3", "p4"]
    jsonl(raw / "T.jsonl", [review("A", item, n) for n, item in enumerate(items)])
    urls = [f"{shop}/ok", f"{shop}/flaky", f"{shop}/gone", None]
    metas = [product(i, "t", [{"large": u, "variant": "MAIN"}]) for i, u in zip(items, urls, strict=True)]
    jsonl(raw / "meta_T.jsonl", metas)
    words = ["convert", "amazon2023", "--raw", str(raw), "--out", str(out), "--download-images"]
    assert main(words) == 0
    rows = {row["item_id"]: row["image"] for row in read_atomic(out / "toys.item")}
    assert rows["p1"] == "images/p1.jpg" and rows["p3"] == rows["p4"] == ""
    evil = out / rows["../../evil"]
    assert evil.resolve().parent == (out / "images").resolve() and evil.read_bytes() == Shop.image
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "toys"]
    assert "p3" in (out / "missing_images.tsv").read_text() and "404" in (out / "missing_images.tsv").read_text()
    assert (out / "image_urls.tsv").read_text().count("\n") == 4
    asked = Shop.asked["/ok"]
    assert main(words) == 0
    assert Shop.asked["/ok"] == asked == 1
