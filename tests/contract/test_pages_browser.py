"""The pages of the report and of `inspect` in a real browser: they render, sort, filter, and log no error."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from recbole_mllm.benchmark.records import append
from recbole_mllm.benchmark.report import render
from recbole_mllm.inspect.health_page import health_page
from recbole_mllm.inspect.measure import measure
from tests.planted_cases import plant_cases, plant_images
from tests.planted_runs import plant_run
from tests.small_world import write

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine (Debian: apt-get install chromium)"
)

OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage",
    "--enable-logging=stderr", "--virtual-time-budget=3000", "--hide-scrollbars",
)  # fmt: skip
HANDLER = "\"><img src=x onerror=\"document.title = 'owned'; console.error('owned')\">"
EVIL = "<script>document.title = 'owned'; console.error('owned')</script>"


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    results = tmp_path_factory.mktemp("results")
    runs = [("Pop", 0.1, "baseline"), (EVIL, 0.6, "baseline"), ("SASRec", 1.0, "baseline"), ("MLLMMSR", 2.0, "mllm")]
    for number, (label, power, kind) in enumerate(runs):
        config = {"data_path": str(results / "data")}
        record = plant_run(results, label, power, kind, run_id=f"run-{number}", config=config)  # type: ignore[arg-type]
        append(results / "runs.jsonl", record)
    titles, texts = {"i0": EVIL, "h0": EVIL, "h1": HANDLER}, (f"likes {EVIL}", f"{HANDLER} now")
    plant_cases(results, record, titles=titles, texts=texts)
    plant_images(results / "data", ["h0", "h1", "i0"])
    render(results)
    return results / "leaderboard.html"


@pytest.fixture(scope="module")
def inspected(tmp_path_factory) -> Path:
    folder = write(tmp_path_factory.mktemp("data"), images=False)
    path = folder / "inspect.html"
    path.write_text(health_page(measure(folder)), encoding="utf-8")
    return path


def browse(page: Path, *options: str) -> tuple[str, list[str]]:
    """Return the page's DOM once its scripts have run, and what it wrote on the console."""
    command = [str(CHROMIUM), *OPTIONS, f"--user-data-dir={page.parent / 'profile'}", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, re.findall(r".*:CONSOLE[:(].*", done.stderr)


def with_script(page: Path, name: str, script: str) -> Path:
    """Copy the page with a script at its end, which does what a reader's hand would."""
    copy = page.with_name(name)
    copy.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    return copy


def models(dom: str) -> list[str]:
    body = re.search(r'id="board".*?<tbody>(.*?)</tbody>', dom, re.S)
    assert body is not None
    return re.findall(r'class="model">(.*?)</span>', body[1])


def cuts_shown(dom: str) -> set[str]:
    return {cut for cut, rest in re.findall(r'<th scope="col" data-cut="(\d*)"([^>]*)>', dom) if "hidden" not in rest}


def test_the_report_renders_and_the_console_stays_empty_but_for_what_is_wrong(page):
    dom, console = browse(page, "--dump-dom")
    order = models(dom)
    assert console == [] and "<title>demo: leaderboard</title>" in dom
    assert order[0] == "MLLMMSR" and order[-1] == "Pop" and order[2].startswith("&lt;script&gt;")
    assert cuts_shown(dom) == {"10", ""}
    charts = re.findall(r'<svg viewBox[^>]*aria-labelledby="(curve|group)-\d-t [^>]*>\s*<title[^>]*>(.*?)</title>', dom)
    assert [title for kind, title in charts if kind == "curve"] == ["NDCG@k", "Hit@k", "MRR@k"]
    assert len(charts) >= 5 and dom.count('<polyline class="curve"') == 3 * 4
    _, console = browse(with_script(page, "loud.html", "console.error('heard'); undefinedFunction()"), "--dump-dom")
    assert len(console) == 2


def test_titles_and_texts_of_the_case_studies_are_only_text(page):
    count = (
        "const out = document.createElement('p'); document.body.append(out);"
        "const all = (what) => document.querySelectorAll('.cases ' + what).length;"
        "const images = [...document.querySelectorAll('.cases img')];"
        "const sides = images.map((i) => Math.max(i.naturalWidth, i.naturalHeight));"
        "out.textContent = ['scripts', all('script'), 'handlers', all('[onerror]'), 'images', images.length,"
        "'largest', Math.max(...sides), 'smallest', Math.min(...sides), 'users', all('article'),"
        "'hits', all('.hit'), 'changes', all('article ins') + all('article del')].join(' ');"
        "const title = document.querySelector('.cases .strip figcaption').textContent;"
        "out.textContent += ' title ' + (title === " + json.dumps(EVIL).replace("</", "<\\/") + ");"
    )
    dom, console = browse(with_script(page, "cases.html", count), "--dump-dom")
    assert console == [] and "<title>demo: leaderboard</title>" in dom
    found = re.search(
        r"scripts 0 handlers 0 images (\d+) largest 96 smallest 96 users (\d+) hits (\d+) changes (\d+)", dom
    )
    assert found is not None and "title true" in dom
    images, users, hits, changes = map(int, found.groups())
    assert users >= 6 and hits == 2 * users and changes >= 2 * users
    assert images == 2 * users + 1, "two pictures of the history for each user, and one candidate's"


def test_it_can_be_printed(page):
    paper = page.with_name("page.pdf")
    browse(page, f"--print-to-pdf={paper}")
    assert paper.read_bytes().startswith(b"%PDF") and paper.stat().st_size > 20_000


def test_a_click_on_a_head_sorts_and_a_second_turns_it_round(page):
    click = "document.querySelectorAll('#board thead button')[{}].click();"
    falling, _ = browse(with_script(page, "sorted.html", click.format(2)), "--dump-dom")
    rising, _ = browse(with_script(page, "turned.html", click.format(2) * 2), "--dump-dom")
    assert models(falling)[0] == "MLLMMSR" and models(falling) == models(rising)[::-1]
    assert re.search(r'<th[^>]*aria-sort="ascending"[^>]*><button type="button">Hit@10', rising)
    cost = "document.querySelectorAll('#board thead th.cost button')[0].click();"
    for times in (1, 2):
        dom, _ = browse(with_script(page, f"cost-{times}.html", cost * times), "--dump-dom")
        assert models(dom)[0] == "MLLMMSR", "only MLLMMSR has summarised, so only it has a value"


def test_the_cut_off_buttons_choose_the_metrics(page):
    click = "document.querySelector('.cuts [data-cut=\"5\"]').click();"
    dom, _ = browse(with_script(page, "cut.html", click), "--dump-dom")
    assert cuts_shown(dom) == {"5", ""}


def test_the_page_of_inspect_renders(inspected):
    dom, console = browse(inspected, "--dump-dom")
    assert console == [] and "<title>steps: dataset health</title>" in dom and dom.count("<svg") >= 2


@pytest.mark.parametrize("which", ["page", "inspected"])
def test_nothing_but_the_tables_scrolls_sideways_on_a_phone(which, request):
    """Chromium's own window is never narrower than 500 pixels, so the phone is a frame."""
    page = request.getfixturevalue(which)
    content = base64.b64encode(page.read_bytes()).decode()
    phone = page.with_name("phone.html")
    phone.write_text(
        '<iframe id="f" style="width:360px;height:800px" srcdoc=""></iframe><p id="out"></p><script>'
        f"f.srcdoc = atob('{content}'); f.onload = () => {{ const d = f.contentDocument.documentElement;"
        "out.textContent = 'wide:' + (d.scrollWidth - d.clientWidth); }</script>"
    )
    dom, _ = browse(phone, "--dump-dom")
    assert "wide:0<" in dom


@pytest.mark.parametrize(("width", "cut"), [(1280, False), (390, True)])
def test_what_a_window_cuts_off_is_named_above_the_table(page, width, cut):
    """Measured by the script of a reader: which heads of the board end beyond the window's table."""
    script = """
      const board = document.querySelector("#board"), region = board.parentElement;
      const edge = region.getBoundingClientRect().right + 1, heads = [...board.tHead.rows[0].cells];
      const beyond = heads.filter(h => !h.hidden && h.getBoundingClientRect().right > edge);
      document.body.dataset.beyond = beyond.map(h => h.textContent.trim()).join(", ");
    """
    dom, console = browse(with_script(page, f"cut-{width}.html", script), "--dump-dom", f"--window-size={width},900")
    beyond = html.unescape(re.search(r'data-beyond="([^"]*)"', dom)[1])  # type: ignore[index]
    said = re.search(r'<p class="more"([^>]*)>([^<]*)</p>\s*<div class="scroll"[^>]*aria-label="Leaderboard', dom)
    assert said and not console
    assert bool(beyond) == ("hidden" not in said[1])
    assert not beyond or said[2] == f"More to the right: {beyond} →"
    assert beyond or not cut
