"""The pages of the report and of `inspect` in a real browser: they render, sort, filter, and log no error."""

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
from tests.planted_runs import plant_cases, plant_images, plant_run
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


def test_the_report_renders_and_the_console_stays_empty(page):
    dom, console = browse(page, "--dump-dom")
    order = models(dom)
    assert console == [] and "<title>demo: leaderboard</title>" in dom
    assert order[0] == "MLLMMSR" and order[-1] == "Pop" and order[2].startswith("&lt;script&gt;")
    charts = re.findall(r'<svg viewBox[^>]*aria-labelledby="(curve|group)-\d-t [^>]*>\s*<title[^>]*>(.*?)</title>', dom)
    assert [title for kind, title in charts if kind == "curve"] == ["NDCG@k", "Hit@k", "MRR@k"]
    assert len(charts) >= 5 and dom.count('<polyline class="curve"') == 3 * 4


HAND = """
  const board = document.querySelector("#board"), told = {}, all = (what) => [...document.querySelectorAll(what)];
  const models = () => all("#board .model").map((one) => one.textContent), head = (n) => all("#board thead button")[n];
  const shown = () => all("#board th[data-cut]").filter((one) => !one.hidden).map((one) => one.dataset.cut);
  told.cuts = shown();
  head(2).click(); told.falling = models(); head(2).click(); told.rising = models();
  told.sorted = all("#board th[aria-sort]").map((one) => one.ariaSort + " " + one.textContent.trim());
  const cost = document.querySelector("#board th.cost button");
  told.costs = [1, 2].map(() => (cost.click(), models()[0]));
  document.querySelector(".cuts [data-cut='5']").click(); told.five = shown();
  const sides = all(".cases img").map((one) => Math.max(one.naturalWidth, one.naturalHeight));
  told.cases = {sides: [...new Set(sides)], images: sides.length, users: all(".cases article").length,
    hits: all(".cases .hit").length, changes: all(".cases ins, .cases del").length,
    alive: all(".cases script, .cases [onerror]").length,
    title: document.querySelector(".cases .strip figcaption").textContent};
  const out = document.createElement("p"); out.id = "told"; out.textContent = JSON.stringify(told);
  document.body.append(out); console.error("heard");
"""


def test_what_a_readers_hand_does(page):
    """A click on a head sorts, a second turns it round; buttons choose the cut-off; titles and texts are only text."""
    dom, console = browse(with_script(page, "hand.html", HAND), "--dump-dom")
    assert len(console) == 1 and "heard" in console[0] and "<title>demo: leaderboard</title>" in dom
    told = json.loads(html.unescape(re.search(r'<p id="told">(.*?)</p>', dom)[1]))  # type: ignore[index]
    assert set(told["cuts"]) == {"10", ""} and set(told["five"]) == {"5", ""}
    assert told["falling"][0] == "MLLMMSR" and told["falling"] == told["rising"][::-1]
    assert told["sorted"] == ["ascending Hit@10"]
    assert told["costs"] == ["MLLMMSR"] * 2, "only MLLMMSR has summarised, so only it has a value"
    cases = told["cases"]
    assert cases["title"] == EVIL and cases["alive"] == 0 and cases["sides"] == [96] and cases["users"] >= 6
    assert cases["hits"] == 2 * cases["users"] and cases["changes"] > 2 * cases["users"]
    assert cases["images"] == 2 * cases["users"] + 1, "two pictures of the history for each user, and one candidate's"


def test_nothing_but_the_tables_scrolls_sideways_on_a_phone(page, inspected):
    """Chromium's own window is never narrower than 500 pixels, so the phone is a frame."""
    frames, script = "", ""
    for number, path in enumerate((page, inspected)):
        content = base64.b64encode(path.read_bytes()).decode()
        frames += f'<iframe id="f{number}" style="width:360px;height:800px"></iframe><p id="out{number}"></p>'
        script += (
            f"f{number}.srcdoc = atob('{content}'); f{number}.onload = () => {{ const d = f{number}.contentDocument;"
            f"out{number}.textContent = d.title + ' wide:' + (d.documentElement.scrollWidth - "
            f"d.documentElement.clientWidth) + ' charts:' + d.querySelectorAll('svg').length; }};"
        )
    phone = page.with_name("phone.html")
    phone.write_text(f"{frames}<script>{script}</script>")
    dom, console = browse(phone, "--dump-dom")
    assert re.search(r"demo: leaderboard wide:0 charts:\d", dom) and console == []
    assert re.search(r"steps: dataset health wide:0 charts:[2-9]", dom)


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
