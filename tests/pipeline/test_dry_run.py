"""``summarize --dry-run`` says what summarising would take, writes nothing, and is right about the prompts."""

import hashlib
import re
import socket
import sqlite3
from contextlib import closing

import pytest
import small_world

from recbole_mllm.cli import main


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Run in a folder with the dataset, whose own one is given."""
    monkeypatch.chdir(tmp_path)
    return small_world.write(tmp_path / "dataset")


def test_a_dry_run_counts_what_the_run_then_does(folder, capsys, caplog):
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
    capsys.readouterr()
    assert main([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("nothing to write") == 2


def _answers(path, query="SELECT COUNT(*) FROM answers"):
    with closing(sqlite3.connect(path)) as db:
        return db.execute(query).fetchone()[0]


def _digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def test_what_the_store_has_counts_as_written_and_stays_as_it_is(folder, capsys):
    words = ["summarize", "--dataset", "steps", "--mllm=tiny", "--limit_users=6"]
    words += ["--item_summary_tokens=4", "--user_summary_tokens=4"]
    assert main(words) == 0
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
