"""``summarize --dry-run`` says what summarising would take, writes nothing, and is right about the prompts."""

import re

import small_world

from recbole_mllm.cli import main


def test_a_dry_run_counts_what_the_run_then_does(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["x"])
    small_world.write(tmp_path / "dataset")
    words = [
        "summarize",
        "--dataset",
        "steps",
        "--limit_users",
        "8",
        "--block_size=2",
        "--item_summary_tokens=6",
        "--user_summary_tokens=8",
    ]
    before = sorted(path.name for path in (tmp_path / "dataset" / "steps").iterdir())
    assert main([*words, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "dataset" / "steps").iterdir()) == before
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
