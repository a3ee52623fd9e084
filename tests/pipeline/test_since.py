"""``summarize --since`` from the command line, on a dataset whose .inter grows, with a server that writes."""

from pathlib import Path

import pytest
from planned_server import Planned, serving
from small_world import write

from recbole_mllm.cli import main

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
