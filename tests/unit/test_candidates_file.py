"""Candidates leave as a file and come back the same; a file that does not fit is refused with its line."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_world
import run_parts

from recbole_mllm.cli import main
from recbole_mllm.common.errors import UserError
from recbole_mllm.quick_start import make_config

LOO = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "uni5"}
SHARES = {"split": {"RS": [0.4, 0.3, 0.3]}, "order": "RO", "group_by": "user", "mode": "uni3"}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    random_world.write(tmp_path, "random", seed=11, users=50, items=60)
    return tmp_path


def prepared(home: Path, model: str = "BPR", **keys: Any) -> Any:
    settings = {
        "data_path": str(home), "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "eval_args": LOO,
        "frozen_candidates": True, "state": "ERROR", "worker": 0,
    }  # fmt: skip
    return run_parts.prepared(make_config(model, "random", [], settings | keys))


OWN = ["--load_col={inter: [user_id, item_id, timestamp]}"]


def export(home: Path, name: str, eval_args: Any = LOO) -> Path:
    words = [*OWN, f"--data_path={home}", f"--eval_args={json.dumps(eval_args)}"]
    assert main(["candidates", "export", "--dataset", "random", "--out", str(home / name), *words]) == 0
    return home / name


def test_what_a_dataset_says_of_its_evaluation_is_what_is_exported(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    words = ["candidates", "export", "--dataset", "random", f"--data_path={home}", *OWN, "--out"]
    for text, more, mode in (
        ("", [], "uni20"),
        ("{mode: uni5}", [], "uni5"),
        ("{mode: uni5}", ["{mode: uni7}"], "uni7"),
    ):
        (home / "random" / "dataset.yaml").write_text(f"eval_args: {text}\n" if text else "")
        assert main([*words, "x.jsonl", *(f"--eval_args={one}" for one in more)]) == 0
        told = capsys.readouterr().out
        assert f"leave-one-out (valid_and_test), order TO, candidates {mode} " in told
    (home / "random" / "dataset.yaml").unlink()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What an export writes, of the world that every `home` holds."""
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        random_world.write(folder, "random", seed=11, users=50, items=60)
        return export(folder, "a.jsonl").read_bytes()


@pytest.fixture
def path(home: Path, exported: bytes) -> Path:
    (home / "a.jsonl").write_bytes(exported)
    return home / "a.jsonl"


def met_by(home: Path, user: str) -> list[str]:
    rows = [line.split("\t") for line in (home / "random/random.inter").read_text().splitlines()[1:]]
    return [item for owner, item, *_ in rows if owner == user]


def another(home: Path, row: dict[str, Any]) -> str:
    """Return an item that could be a negative of the row's user and is none."""
    return next(f"i{n}" for n in range(60) if f"i{n}" not in (*met_by(home, row["user"]), *row["negatives"]))


def lines(path: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in text.decode().splitlines()]


def rewrite(path: Path, number: int, **changes: Any) -> Path:
    every = lines(path)
    every[number] |= changes
    path.write_text("".join(json.dumps(line) + "\n" for line in every))
    return path


def test_what_is_exported_is_what_models_meet_sorted_and_the_same_bytes_each_time(home):
    path = export(home, "a.jsonl.gz")
    header, *rows = lines(path)
    assert [(row["phase"], row["user"]) for row in rows] == sorted((row["phase"], row["user"]) for row in rows)
    dataset, (_, valid, test, candidates) = prepared(home, "SASRec")
    assert header["digest"] == candidates and header["dataset"] == "random" and header["seed"] == 2024
    users, items = (np.asarray(dataset.field2id_token[name]) for name in ("user_id", "item_id"))
    for phase, loader in (("valid", valid), ("test", test)):
        met = {str(users[u]): set() for u in loader.rows.users}
        for pairs, *_ in loader:
            for u, i, label in zip(pairs["user_id"], pairs["item_id"], pairs["label"], strict=True):
                met[str(users[u])].add((str(items[i]), bool(label)))
        own = [row for row in rows if row["phase"] == phase]
        assert {
            row["user"]: {(i, True) for i in row["targets"]} | {(i, False) for i in row["negatives"]} for row in own
        } == met
    assert export(home, "b.jsonl.gz").read_bytes() == path.read_bytes()
    assert lines(export(home, "plain.jsonl")) == [header, *rows]


def test_imported_candidates_have_the_same_digest_under_other_ids_and_another_seed(home, path):
    digest = lines(path)[0]["digest"]
    header, *rows = (home / "random/random.inter").read_text().splitlines()
    (home / "random/random.inter").write_text(
        "\n".join([header, *sorted(rows, key=lambda row: row.split("\t")[0])]) + "\n"
    )  # other internal ids
    for model in ("BPR", "SASRec"):
        assert prepared(home, model, candidates_file=str(path), candidate_seed=7)[1].candidates == digest
    assert prepared(home, candidate_seed=7)[1].candidates != digest


def test_users_with_several_targets_and_a_sample_of_users_come_back(home):
    path = export(home, "several.jsonl", SHARES)
    assert any(len(row["targets"]) > 1 for row in lines(path)[1:])
    for more in ({}, {"limit_users": 9}):
        digest = prepared(home, eval_args=SHARES, **more)[1].candidates
        assert prepared(home, eval_args=SHARES, candidates_file=str(path), **more)[1].candidates == digest


@pytest.mark.parametrize("mode", ["uni5", "pop5"])
@pytest.mark.parametrize("split", ["valid_and_test", "test_only"])  # valid_only leaves nothing to test on
def test_users_with_few_interactions_are_asked_about_by_all_models_or_none(home, mode, split):
    every = {"eval_args": LOO | {"mode": mode, "split": {"LS": split}}, "user_inter_num_interval": "[0,inf)"}
    general, sequential = (prepared(home, model, **every)[1] for model in ("BPR", "SASRec"))
    assert general.candidates == sequential.candidates


def test_the_order_within_a_line_does_not_matter(home, path):
    digest, rng = lines(path)[0]["digest"], np.random.default_rng(1)
    every = [line | {"negatives": rng.permutation(line["negatives"]).tolist()} for line in lines(path)[1:]]
    shuffled = [lines(path)[0], *(every[n] for n in rng.permutation(len(every)))]
    path.write_text("".join(json.dumps(line) + "\n" for line in shuffled))
    _, plain = prepared(home)
    for keys in ({}, {"candidate_seed": 7}):
        _, mine = prepared(home, candidates_file=str(path), **keys)
        assert mine.candidates == digest == plain.candidates
        assert np.array_equal(mine.test.negatives, plain.test.negatives)
    sample = prepared(home, limit_users=9)[1].candidates
    assert prepared(home, limit_users=9, candidates_file=str(path))[1].candidates == sample


FAULTS = [
    ({"user": "nobody"}, "user nobody is not in the dataset"),
    ({"user": "u0"}, r"user u0 is not evaluated in this phase \(test\)"),
    ({"targets": ["i0", "i1"]}, "the targets are i0, i1, the test split's"),
    ({"negatives": ["i0"]}, "1 negatives where eval_args.mode asks for 5"),
    ({"negatives": ["x1", "x2", "x3", "x4", "x5"]}, "x1, x2, x3, … is no item of the dataset"),
    ({"negatives": [1, 2]}, "negatives must be a list of raw item ids in quotes"),
    ({"phase": "train"}, "phase must be valid or test"),
]


def test_a_line_that_does_not_fit_is_named(home, path):
    text, row = path.read_text(), lines(path)[3]
    others = row["negatives"][1:]
    earlier = next(item for item in met_by(home, row["user"]) if item not in row["targets"])
    faults = FAULTS + [
        ({"negatives": [row["targets"][0], *others]}, f"{row['targets'][0]} is a target of the user"),
        ({"negatives": [others[0], *others]}, ".*stands twice"),
        ({"negatives": [earlier, *others]}, f"{earlier} is in the history of user {row['user']}"),
    ]
    for changes, words in faults:
        path.write_text(text)
        rewrite(path, 3, **changes)
        with pytest.raises(UserError, match=rf"a\.jsonl:4: {words}"):
            prepared(home, candidates_file=str(path))


def test_other_negatives_have_another_digest_and_a_file_that_was_edited_torn_or_is_anothers_is_refused(home, path):
    text, digest = path.read_text(), lines(path)[0]["digest"]
    torn = path.with_suffix(".jsonl.gz")
    packed = gzip.compress(text.encode())
    torn.write_bytes(packed[:-20])
    bad = path.with_name("bad.jsonl.gz")
    bad.write_bytes(packed[:60] + b"\xff" * 40 + packed[100:])
    row = lines(path)[1]
    rewrite(path, 1, negatives=[*row["negatives"][:-1], another(home, row)])
    edited = path.read_text()
    rewrite(path, 0, digest="")
    assert prepared(home, candidates_file=str(path))[1].candidates != digest
    faults = {
        rf"a\.jsonl:1: the header's digest is {digest}": edited,
        "no valid line for user": "".join(text.splitlines(keepends=True)[:-1]),
        rf"a\.jsonl:{text.count(chr(10))}: cannot be read": text[:-30],
        r"a\.jsonl:1: no header": "{}\n",
        r"a\.jsonl:1: cannot be read": "[" * 100_000,
        "is empty": "",
        "candidates of dataset 'others', and this is 'random'": text.replace(
            '"dataset": "random"', '"dataset": "others"'
        ),
    }
    for words, wrong in faults.items():
        path.write_text(wrong)
        with pytest.raises(UserError, match=words):
            prepared(home, candidates_file=str(path))
    path.write_text(text)
    for words, keys in {
        "does not exist": {"candidates_file": "none.jsonl"},
        "cannot be read": {"candidates_file": str(torn)},
        "bad.jsonl.gz:0: cannot be read": {"candidates_file": str(bad)},
        "full; use uniN": {"eval_args": {**LOO, "mode": {"valid": "uni5", "test": "full"}}},
    }.items():
        with pytest.raises(UserError, match=words):
            prepared(home, **{"candidates_file": str(path)} | keys)
