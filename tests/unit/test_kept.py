"""A retriever that runs share is made once, waited for, and made anew after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from recbole_mllm.common.files import made_once

ROOT = Path(__file__).resolve().parents[2]
MAKER = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from recbole_mllm.common.files import made_once
path, pause = Path(sys.argv[1]), float(sys.argv[2])
def make(scratch):
    with (path.parent / "made.txt").open("a") as file:
        file.write("x")
    scratch.write_text("half")
    time.sleep(pause)
    scratch.write_text("whole")
made_once(path, make)
print(path.read_text())
"""


def start(path: Path, pause: float) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", MAKER, str(path), str(pause)], stdout=subprocess.PIPE, text=True)


def test_many_at_once_make_it_once_and_all_read_the_whole(tmp_path):
    makers = [start(tmp_path / "retriever-x.pth", 0.5) for _ in range(4)]
    assert [maker.communicate(timeout=60)[0].strip() for maker in makers] == ["whole"] * 4
    assert (tmp_path / "made.txt").read_text() == "x"


def test_after_kill_9_the_next_one_makes_it_and_clears_up(tmp_path):
    path = tmp_path / "retriever-x.pth"
    maker = start(path, 60)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".retriever-x.pth.*.tmp/*/retriever-x.pth")):
        assert time.monotonic() < deadline and maker.poll() is None
        time.sleep(0.02)
    os.kill(maker.pid, signal.SIGKILL)
    maker.wait()
    assert not path.exists()
    assert made_once(path, lambda scratch: scratch.write_text("whole") and None)
    assert path.read_text() == "whole"
    assert sorted(left.name for left in tmp_path.iterdir()) == [".retriever-x.pth.lock", "made.txt", path.name]
    assert not made_once(path, lambda scratch: scratch.unlink())


def test_one_that_fails_leaves_nothing_that_counts(tmp_path):
    path = tmp_path / "deep" / "retriever-x.pth"

    def fail(scratch: Path) -> None:
        scratch.write_text("half")
        raise ValueError("the loss is no number")

    for _ in range(2):
        try:
            made_once(path, fail)
        except ValueError:
            assert not path.exists()
    assert made_once(path, lambda scratch: scratch.write_text("whole") and None)


def test_what_a_killed_one_left_is_removed_and_another_files_scratch_is_not(tmp_path):
    mark = '{"written_by": "recbole-mllm", "folder": "x.tag-a"}'
    for name, content in (("x.tag-a", mark), ("x.tag-ab", mark.replace("tag-a", "tag-ab")), ("x.tag-a.mine", "{}")):
        (tmp_path / f".{name}.0.tmp" / name).mkdir(parents=True)
        (tmp_path / f".{name}.0.tmp" / "staged.json").write_text(content)
    (tmp_path / "x.part-99.tag-a").write_text("of the user")
    assert made_once(tmp_path / "x.tag-a", lambda scratch: scratch.write_text("whole") and None)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"x.tag-a", ".x.tag-a.lock", ".x.tag-ab.0.tmp", ".x.tag-a.mine.0.tmp", "x.part-99.tag-a"}
