"""Run records survive crashes, crowds and bad numbers."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from recbole_mllm.benchmark.records import (
    PAIR_COLUMNS,
    RunRecord,
    append,
    config_digest,
    read_arrays,
    read_records,
    said_anywhere,
    write_arrays,
)
from recbole_mllm.common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def record(run_id: str = "Pop-2024-00000000", **changes: object) -> RunRecord:
    values = {
        "run_id": run_id, "model": "Pop", "label": "Pop", "kind": "baseline", "seed": 2024, "dataset": "demo",
        "status": "ok", "started": "2026-01-01T10:00:00", "metrics": {"NDCG@10": 0.5},
    }  # fmt: skip
    return RunRecord(**(values | changes))  # type: ignore[arg-type]


def test_what_is_appended_is_read_back_also_what_json_cannot_hold(tmp_path):
    path = tmp_path / "new" / "runs.jsonl"
    assert read_records(path) == []
    told = record(config={"a": 1, "path": "x\ny", "né": None}, scores="runs/x/scores.npz", tokens=7)
    odd = {"path": Path("a/b"), "n": np.int64(3), "set": {2, 1}, "inf": float("inf"), "t": (np.float32(0.5),)}
    for one in (told, record("b", config=odd)):
        append(path, one)
    plain = {"path": "a/b", "n": 3, "set": ["1", "2"], "inf": "inf", "t": [0.5]}
    assert read_records(path) == [told, record("b", config=plain)] and path.read_bytes().count(b"\n") == 2
    line = json.dumps(json.loads(record().to_line()) | {"from_the_future": 1})
    assert RunRecord.from_line(line) == record()


@pytest.mark.parametrize("before", [["a"], []])
def test_a_torn_last_line_is_ignored_and_cut_off_by_the_next_writer(tmp_path, before):
    path, torn = tmp_path / "runs.jsonl", '{"run_id": "' + "x" * 200_000
    for name in before:
        append(path, record(name))
    with path.open("a") as file:
        file.write(torn)
    assert [read.run_id for read in read_records(path)] == before
    append(path, record("b"))
    assert [read.run_id for read in read_records(path)] == [*before, "b"]
    assert all(json.loads(line) for line in path.read_text().splitlines())


FOREIGN = {
    "a list": "[1, 2]",
    "no JSON": "hello",
    "odd types": json.dumps(json.loads(record("a").to_line()) | {"seed": "x"}),
    "deep": "[" * 100_000,
    "bytes": "\udcff\udcfe",
}  # fmt: skip


@pytest.mark.parametrize("line", FOREIGN.values(), ids=FOREIGN)
def test_a_line_that_is_no_record_costs_no_other_and_is_told_once(tmp_path, caplog, line):
    path = tmp_path / "runs.jsonl"
    append(path, record("a"))
    with path.open("ab") as file:
        file.write(line.encode(errors="surrogateescape") + b"\n")
    append(path, record("b"))
    for _ in range(2):
        assert [read.run_id for read in read_records(path)] == ["a", "b"]
    assert caplog.text.count(f"{path}:2: this line is no run record") == 1


def test_several_processes_write_whole_lines(tmp_path):
    path = tmp_path / "runs.jsonl"
    script = (
        "import sys; from pathlib import Path; from recbole_mllm.benchmark.records import RunRecord, append\n"
        "for i in range(25): append(Path(sys.argv[1]), RunRecord(run_id=f'{sys.argv[2]}-{i}', model='Pop', label='Pop',"
        " kind='baseline', seed=i, dataset='d', status='failed', started='', config={'long': 'x' * 20000}))"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, str(path), str(n)], cwd=ROOT) for n in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert {read.run_id for read in read_records(path)} == {f"{n}-{i}" for n in range(3) for i in range(25)}


@pytest.mark.parametrize("metrics", [{}, {"NDCG@10": float("nan")}, {"AUC": float("inf")}])
def test_a_success_without_finite_numbers_and_a_status_of_two_lines_are_refused(metrics):
    with pytest.raises(ValueError, match="no finite value"):
        record(metrics=metrics)
    with pytest.raises(ValueError, match="one line"):
        record(status="Traceback\n  File", metrics={})


def test_arrays_come_back_and_hold_no_pickles(tmp_path):
    pairs = {"user": np.array(["ü", "b"], dtype=object), "item": ["1", "2"], "label": [1, 0], "score": [0.5, 0.25]}
    write_arrays(tmp_path / "scores.npz", pairs)  # type: ignore[arg-type]
    read = read_arrays(tmp_path / "scores.npz", PAIR_COLUMNS)
    assert read["user"].tolist() == ["ü", "b"] and read["score"].tolist() == [0.5, 0.25]
    assert [path.name for path in tmp_path.iterdir()] == ["scores.npz"]


def test_however_arrays_are_damaged_one_line_says_so(tmp_path):
    rng, path = random.Random(0), tmp_path / "scores.npz"
    users, numbers = np.array([f"u{n * n}" for n in range(300)]), np.arange(300.0) ** 0.5
    write_arrays(path, {"user": users, "item": users, "label": numbers, "score": numbers})
    whole, refused = path.read_bytes(), 0
    for turn in range(100):
        low = rng.randrange(len(whole))
        path.write_bytes(whole[:low] + rng.randbytes(60) * (turn % 2) + whole[low + 60 :])
        try:
            read_arrays(path, PAIR_COLUMNS)
        except UserError as error:
            refused += "run that model again" in str(error)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="run that model again"):
        read_arrays(path, PAIR_COLUMNS)
    assert refused > 80


def test_unusable_arrays_say_what_to_do(tmp_path):
    path = tmp_path / "scores.npz"
    path.write_bytes(b"PK torn")
    with pytest.raises(UserError, match="run that model again"):
        read_arrays(path, PAIR_COLUMNS)
    for arrays, words in (
        ({"user": np.array(["a"])}, "lacks item, label, score"),
        ({"user": np.array(["a"]), "score": np.zeros(2)}, "different lengths"),
    ):
        write_arrays(path, arrays)
        with pytest.raises(UserError, match=words):
            read_arrays(path, ["user"] if "score" in arrays else PAIR_COLUMNS)


# Records mean the same on every machine: digests by content, and no folders in what is said


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
