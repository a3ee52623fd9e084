"""The page of `inspect` in a real browser: nothing on the console, nothing wider than a phone."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from recbole_mllm.inspect.measure import measure
from recbole_mllm.inspect.health_page import health_page
from tests.contract.test_report_browser import CHROMIUM, browse
from tests.small_world import write

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = write(tmp_path_factory.mktemp("data"), images=False)
    path = folder / "inspect.html"
    path.write_text(health_page(measure(folder)), encoding="utf-8")
    return path


def test_it_renders_without_a_word_on_the_console(drawn):
    dom, console = browse(drawn, "--dump-dom")
    assert console == [] and "<title>steps: dataset health</title>" in dom and dom.count("<svg") >= 2


def test_it_is_no_wider_than_a_phone(drawn):
    phone = drawn.with_name("phone.html")
    content = base64.b64encode(drawn.read_bytes()).decode()
    phone.write_text(
        '<iframe id="f" style="width:390px;height:800px" srcdoc=""></iframe><p id="told"></p><script>'
        f"f.srcdoc = atob('{content}'); f.onload = () => {{ const d = f.contentDocument.documentElement;"
        "told.textContent = 'wide:' + (d.scrollWidth - d.clientWidth); }</script>"
    )
    dom, _ = browse(phone, "--dump-dom")
    assert "wide:0<" in dom
