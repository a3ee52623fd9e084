"""Records mean the same on every machine: digests by content, and no folders in what is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from recbole_mllm.benchmark.records import config_digest, said_anywhere


def settings(folder: Path, **more: object) -> dict[str, object]:
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "given.jsonl").write_text("the candidates")
    places = {"data_path": str(folder), "checkpoint_dir": str(folder / "saved"), "image_dir": str(folder / "images")}
    files = {"candidates_file": str(folder / "given.jsonl"), "mllm": str(folder / "model"), "prompt_style": "demo"}
    return places | files | {"epochs": 3} | more


def test_the_same_files_elsewhere_give_the_same_digest_and_other_contents_another(tmp_path):
    here, there = tmp_path / "a", tmp_path / "b" / "c"
    first = config_digest(settings(here))
    assert first == config_digest(settings(there)) and len(first) == 16
    renamed = there / "renamed.jsonl"
    renamed.write_text("the candidates")
    assert config_digest(settings(there, candidates_file=str(renamed))) == first
    assert config_digest(settings(there, epochs=4)) != first
    assert config_digest(settings(there, prompt_style="paper")) != first
    (there / "model" / "config.json").write_text("{ }")
    assert config_digest({**settings(here), "mllm": str(there / "model")}) != first
    renamed.write_text("other candidates")
    assert config_digest(settings(there, candidates_file=str(renamed))) != first


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("cannot read /home/bob/x.npz (torn); run it again", "cannot read …/x.npz (torn); run it again"),
        ("[Errno 2] No such file: '/data/raw/a.inter'", "[Errno 2] No such file: '…/a.inter'"),
        ("server http://127.0.0.1:8000/v1/models is gone", "server http://127.0.0.1:8000/v1/models is gone"),
        ("a share of 1/2, epochs/steps 3/4", "a share of 1/2, epochs/steps 3/4"),
        ("(log: runs/SASRec-1/log.txt)", "(log: runs/SASRec-1/log.txt)"),
    ],
)
def test_a_failure_names_no_folder_of_the_machine(said, kept):
    assert said_anywhere(said) == kept


def test_below_the_working_directory_a_path_stays_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said_anywhere(f"no {tmp_path}/dataset/x/x.inter there") == "no dataset/x/x.inter there"
