"""The docs' commands about the demo run as they stand, page after page, on a benchmark of a few users."""

import shutil
from pathlib import Path

import pytest

from recbole_mllm.cli import main
from tests.unit.test_docs import CALLS

_TRAINED = ("benchmark", "--model", "--seed", "--models")  # hours, and tested elsewhere
_NOT_HERE = ("qwen", "llava", "server:", "--push-to-hub", "full.yaml", "my-style.yaml")  # a hub, a server, own files


def commands() -> list[list[str]]:
    """Return what the docs show of the demo or of one of its runs, each once."""
    calls = [parameter.values[0] for parameter in CALLS]
    about = [
        words for words in calls if "RUN_ID" in " ".join(words) or "demo" in " ".join(words).replace("/", " ").split()
    ]
    fit = [
        words for words in about if words[0] not in _TRAINED and not any(part in " ".join(words) for part in _NOT_HERE)
    ]
    return [list(words) for words in dict.fromkeys(map(tuple, fit))]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_commands_about_the_demo_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", "--dataset", "demo", "--models", "Pop,MLLMMSR", "--limit_users", "6"]) == 0
    run = next(Path("results/demo/runs").glob("MLLMMSR*")).name
    shutil.copytree("results/demo", "results/mine")  # where some pages have a run of the reader's own
    assert main(["summarize", "--dataset", "demo"]) == 0
    tag = next(Path("dataset/demo").glob("demo.*.isum")).name.split(".")[1]
    shown = commands()
    assert len(shown) > 20
    wrong = []
    for words in shown:
        ready = [word.replace("RUN_ID", run).replace("TAG", tag) for word in words]
        if words[0] == "rerun":
            ready += ["--output_dir", "results/demo"]  # as the run is in two folders here
        capsys.readouterr()
        if code := main(ready):
            wrong.append((code, ready, capsys.readouterr().err))
    assert not wrong
