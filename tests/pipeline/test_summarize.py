"""``summarize --dry-run`` says what summarising would take and writes nothing; ``--since`` writes for the active."""

import hashlib
import re
import socket
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import small_world
from planned_server import Planned, serving
from small_world import write

from recbole_mllm.cli import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Run in a folder with the dataset, whose own one is given."""
    monkeypatch.chdir(tmp_path)
    return small_world.write(tmp_path / "dataset")


def test_a_dry_run_counts_what_the_run_then_does_and_what_the_store_has_as_written(folder, capsys, caplog):
    words = ["summarize", "--dataset", "steps", "--mllm=tiny", "--limit_users=8", "--block_size=2"]
    words += ["--item_summary_tokens=6", "--user_summary_tokens=8"]
    before = _digests(folder)
    assert main([*words, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert _digests(folder) == before
    planned = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) to write:", told)]
    tokens = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) tokens to read", told)]
    assert len(planned) == 2 and "probe: 16 prompts" in told
    assert main(words) == 0
    written = [int(n) for n in re.findall(r"(\d+) written", caplog.text)]
    # equal prompts are written once: a placeholder may make two prompts differ that the real answer makes equal
    assert written[0] == planned[0] and 0.8 * planned[1] <= written[1] <= planned[1] * 1.2
    assert all(count > 10 for count in tokens)
    before = _digests(folder)
    capsys.readouterr()
    assert main([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("nothing to write") == 2
    with closing(sqlite3.connect(folder / "steps.mllm.sqlite")) as db:
        db.execute("DELETE FROM answers WHERE unicode(substr(key, 64)) % 2 = 1")
        db.commit()
    half = _digests(folder)
    assert main([*words, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert told.count(" to write: about") == 2 and " 0 known" not in told
    assert _digests(folder) == half and half.keys() == before.keys()


def test_a_higher_limit_writes_again_what_was_shortened_and_nothing_else(folder, caplog):
    """The remedy that the log advises; each limit has its own tag, and its own texts in it."""
    words = ["summarize", "--dataset", "steps", "--mllm=tiny", "--limit_users=8", "--block_size=2"]
    words += ["--item_summary_tokens=6", "--user_summary_tokens=20", "--prompt_style=demo"]

    def texts(limit):
        caplog.clear()
        assert main([*words, f"--max_text_tokens={limit}"]) == 0
        path = max(folder.glob("*.usum"), key=lambda path: path.stat().st_mtime_ns)
        return [int(n) for n in re.findall(r"(\d+) written", caplog.text)], path.read_text()

    _, short = texts(40)
    shortened = int(re.search(r"prompt shortened\s+(\d+) of", caplog.text)[1])
    (_, again), raised = texts(400)
    assert again >= shortened > 0 and raised != short and "prompt shortened" not in caplog.text
    assert texts(400) == ([0, 0], raised) and texts(40) == ([0, 0], short)
    for path in folder.glob("steps.mllm.sqlite*"):
        path.unlink()
    assert texts(400)[1] == raised, "as if the lower limit had never been"


def _answers(path, query="SELECT COUNT(*) FROM answers"):
    with closing(sqlite3.connect(path)) as db:
        return db.execute(query).fetchone()[0]


def _digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def test_neither_a_dry_run_nor_a_plan_sends_anything_to_a_server(folder, capsys):
    few = ["--dataset", "steps", "--limit_users=6", "--block_size=2"]
    few += ["--item_summary_tokens=4", "--user_summary_tokens=4"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        name = f"server:dear/model@http://127.0.0.1:{server.getsockname()[1]}/v1"
        served = [f"--{key}={name}" for key in ("mllm", "item_summarizer", "user_summarizer")] + ["--finetune=none"]
        assert main(["summarize", *few, *served, "--dry-run"]) == 0
        told = capsys.readouterr().out
        assert main(["plan", *few, *served]) == 0
        capsys.readouterr()
        assert main(["summarize", *few, "--mllm=tiny", f"--user_summarizer={name}", "--dry-run"]) == 0
        mixed = capsys.readouterr().out.splitlines()
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()  # nobody has connected
    counted = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) to write, by server:dear/model", told)]
    assert told.count("a dry run sends nothing to a server") == 2 and "probe" not in told
    assert "probe: " in mixed[0] and "sends nothing to a server" in mixed[1]
    assert main(["summarize", *few, "--mllm=tiny"]) == 0
    assert counted[0] == _answers(folder / "steps.mllm.sqlite", "SELECT COUNT(*) FROM answers WHERE kind = 'item'")


# ``--since`` on a dataset whose .inter grows, with a server that writes


DAY = 86_400
START = 1_767_225_600  # 2026-01-01, UTC


def grown(folder: Path, users: range, day: int) -> None:
    """Let each of `users` take one item more on that day."""
    rows = "".join(f"u{u:02d}\ti{(3 * u + day) % 60:02d}\t{START + day * DAY + u}\n" for u in users)
    with (folder / "steps.inter").open("a") as file:
        file.write(rows)


@pytest.fixture
def steps(tmp_path, monkeypatch):
    """A dataset with a row a day; `summarize` with the given words, through a server that counts."""
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "dataset", images=False)
    lines = (folder / "steps.inter").read_text().splitlines()
    dated = [f"{u}\t{i}\t{START + int(t) * DAY}" for u, i, t in (line.split("\t") for line in lines[1:])]
    (folder / "steps.inter").write_text("\n".join([lines[0], *dated]) + "\n")
    with serving(Planned()) as planned:

        def summarize(*words):
            before = len(planned.bodies)
            who = f"server:m@{planned.url}"
            keys = [f"--item_summarizer={who}", f"--user_summarizer={who}", "--item_summary=text", "--use_image=false"]
            keys.append("--prompt_style=demo")  # its prompts are short enough to be echoed
            return main(["summarize", "--dataset", "steps", *keys, *words]), len(planned.bodies) - before

        yield folder, summarize


def export(folder: Path) -> bytes:
    [path] = folder.glob("*.usum")
    return path.read_bytes()


def test_only_those_active_since_are_written_and_the_rest_is_named(steps, capsys):
    folder, summarize = steps
    code, first = summarize()
    assert code == 0 and first > 100
    grown(folder, range(0, 4), 20)
    grown(folder, range(4, 6), 30)
    assert summarize("--since", "2026-01-29") == (0, 2)
    told = capsys.readouterr().out
    assert "4 users have summaries to write from before --since 2026-01-29 (u00, u01, u02, u03)" in told
    assert summarize("--since", str(START + 15 * DAY)) == (0, 4)
    assert "users have summaries to write" not in capsys.readouterr().out
    assert summarize() == (0, 0)
    refreshed = export(folder)
    for path in (*folder.glob("*sum"), *folder.glob("*.sqlite*")):
        path.unlink()
    assert summarize()[0] == 0 and export(folder) == refreshed


def test_a_since_that_cannot_be_meant_is_one_line_and_ranks_are_no_dates(steps, capsys):
    folder, summarize = steps
    for word, told in (("lately", "neither a number nor a date"), ("2030-01-01", "the latest is at")):
        assert summarize("--since", word) == (2, 0)
        assert told in capsys.readouterr().err
    lines = (folder / "steps.inter").read_text().splitlines()
    ranked = [f"{u}\t{i}\t{n + 1}" for n, (u, i, _) in enumerate(line.split("\t") for line in lines[1:])]
    (folder / "steps.inter").write_text("\n".join([lines[0], *ranked]) + "\n")
    assert summarize("--since", "2026-01-05") == (2, 0)
    assert "no moments but ranks, up to 210" in capsys.readouterr().err
    assert summarize("--since", "209")[0] == 0
