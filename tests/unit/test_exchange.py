"""Candidates leave as a file and come back the same; a file that does not fit is refused with its line."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_world
from recbole.data import create_dataset, data_preparation
from recbole.utils import init_seed

from recbole_mllm.cli import main
from recbole_mllm.errors import UserError
from recbole_mllm.quick_start import make_config

LOO = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "uni5"}
SHARES = {"split": {"RS": [0.4, 0.3, 0.3]}, "order": "RO", "group_by": "user", "mode": "uni3"}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    random_world.write(tmp_path, "random", seed=11, users=50, items=60)
    return tmp_path


def prepared(home: Path, model: str = "BPR", **keys: Any) -> Any:
    settings = {
        "data_path": str(home), "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "eval_args": LOO,
        "frozen_candidates": True, "state": "ERROR", "worker": 0,
    }  # fmt: skip
    config = make_config(model, "random", [], settings | keys)
    init_seed(config["seed"], True)
    dataset = create_dataset(config)
    return dataset, data_preparation(config, dataset)


def export(home: Path, name: str, *words: str, mode: str = "uni5") -> Path:
    options = {
        "data_path": home,
        "load_col": "{inter: [user_id, item_id, timestamp]}",
        "eval_args": {**LOO, "mode": mode},
    }
    given = [
        f"--{key}={value if isinstance(value, str) else json.dumps(value, default=str)}"
        for key, value in options.items()
    ]
    assert main(["candidates", "export", "--dataset", "random", "--out", str(home / name), *given, *words]) == 0
    return home / name


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
    dataset, (_, valid, test) = prepared(home, "SASRec")
    assert header["digest"] == dataset.candidates_digest and header["dataset"] == "random" and header["seed"] == 2024
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


def test_imported_candidates_have_the_same_digest_under_other_ids_and_another_seed(home):
    path = export(home, "a.jsonl")
    digest = lines(path)[0]["digest"]
    header, *rows = (home / "random/random.inter").read_text().splitlines()
    (home / "random/random.inter").write_text(
        "\n".join([header, *sorted(rows, key=lambda row: row.split("\t")[0])]) + "\n"
    )  # other internal ids
    for model in ("BPR", "SASRec"):
        assert prepared(home, model, candidates_file=str(path), candidate_seed=7)[0].candidates_digest == digest
    assert prepared(home, candidate_seed=7)[0].candidates_digest != digest


def test_another_choice_of_negatives_is_taken_and_has_another_digest(home):
    path = export(home, "a.jsonl")
    dataset, (_, _, test) = prepared(home)
    header, *rows = lines(path)
    row = rows[0]
    other = next(f"i{n}" for n in range(60) if f"i{n}" not in (*row["negatives"], *row["targets"]))
    rewrite(path, 1, negatives=[*row["negatives"][:-1], other])
    with pytest.raises(UserError, match=rf"a\.jsonl:1: the header's digest is {header['digest']}"):
        prepared(home, candidates_file=str(path))
    rewrite(path, 0, digest="")
    taken, (_, _, mine) = prepared(home, candidates_file=str(path))
    assert taken.candidates_digest != dataset.candidates_digest
    assert (mine.negatives != test.negatives).sum() == 1


def test_users_with_several_targets_and_a_sample_of_users_come_back(home):
    path = home / "several.jsonl"
    words = [
        f"--data_path={home}",
        "--load_col={inter: [user_id, item_id, timestamp]}",
        f"--eval_args={json.dumps(SHARES)}",
    ]
    assert main(["candidates", "export", "--dataset", "random", "--out", str(path), *words]) == 0
    assert any(len(row["targets"]) > 1 for row in lines(path)[1:])
    whole = prepared(home, eval_args=SHARES)[0].candidates_digest
    assert prepared(home, eval_args=SHARES, candidates_file=str(path))[0].candidates_digest == whole
    sample = prepared(home, eval_args=SHARES, limit_users=9)[0].candidates_digest
    assert prepared(home, eval_args=SHARES, limit_users=9, candidates_file=str(path))[0].candidates_digest == sample


@pytest.mark.parametrize("mode", ["uni5", "pop5"])
@pytest.mark.parametrize("split", ["valid_and_test", "test_only"])  # valid_only leaves nothing to test on
def test_users_with_few_interactions_are_asked_about_by_all_models_or_none(home, mode, split):
    kept = {"eval_args": LOO | {"mode": mode, "split": {"LS": split}}, "user_inter_num_interval": "[0,inf)"}
    general, sequential = (prepared(home, model, **kept)[0] for model in ("BPR", "SASRec"))
    assert general.candidates_digest == sequential.candidates_digest


FAULTS = [
    ({"user": "nobody"}, "user nobody is not in the dataset"),
    ({"user": "u0"}, r"user u0 is not evaluated in this phase \(test\)"),
    ({"targets": ["i0", "i1"]}, "the targets are i0, i1, the test split's"),
    ({"negatives": ["i0"]}, "1 negatives where eval_args.mode asks for 5"),
    ({"negatives": ["x1", "x2", "x3", "x4", "x5"]}, "x1, x2, x3, … is no item of the dataset"),
    ({"negatives": [1, 2]}, "negatives must be a list of raw item ids in quotes"),
    ({"phase": "train"}, "phase must be valid or test"),
]


@pytest.mark.parametrize(("changes", "words"), FAULTS)
def test_a_line_that_does_not_fit_is_named(home, changes, words):
    path = rewrite(export(home, "a.jsonl"), 3, **changes)
    with pytest.raises(UserError, match=rf"a\.jsonl:4: {words}"):
        prepared(home, candidates_file=str(path))


def test_a_positive_or_a_repeated_item_is_no_negative(home):
    row = lines(export(home, "a.jsonl"))[3]
    bad = {"is a target of the user": row["targets"][0], "stands twice": row["negatives"][1]}
    for words, item in bad.items():
        path = rewrite(export(home, "a.jsonl"), 3, negatives=[item, *row["negatives"][1:]])
        with pytest.raises(UserError, match=rf"a\.jsonl:4: .*{words}"):
            prepared(home, candidates_file=str(path))


def test_missing_users_torn_files_and_full_ranking_are_refused(home):
    path = export(home, "a.jsonl")
    text = path.read_text()
    path.write_text("".join(text.splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="no valid line for user"):
        prepared(home, candidates_file=str(path))
    path.write_text(text[:-30])
    with pytest.raises(UserError, match=rf"a\.jsonl:{text.count(chr(10))}: cannot be read"):
        prepared(home, candidates_file=str(path))
    path.write_text("{}\n")
    with pytest.raises(UserError, match=r"a\.jsonl:1: no header"):
        prepared(home, candidates_file=str(path))
    with pytest.raises(UserError, match="does not exist"):
        prepared(home, candidates_file=str(home / "none.jsonl"))
    path.write_text(text)
    with pytest.raises(UserError, match="full; use uniN"):
        prepared(home, candidates_file=str(path), eval_args={**LOO, "mode": {"valid": "uni5", "test": "full"}})
    compressed = export(home, "a.jsonl.gz")
    compressed.write_bytes(compressed.read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot be read"):
        prepared(home, candidates_file=str(compressed))


def test_the_order_within_a_line_does_not_matter(home):
    path = export(home, "a.jsonl")
    digest, rng = lines(path)[0]["digest"], np.random.default_rng(1)
    every = [line | {"negatives": rng.permutation(line["negatives"]).tolist()} for line in lines(path)[1:]]
    shuffled = [lines(path)[0], *(every[n] for n in rng.permutation(len(every)))]
    path.write_text("".join(json.dumps(line) + "\n" for line in shuffled))
    plain, (_, _, test) = prepared(home)
    for keys in ({}, {"candidate_seed": 7}):
        dataset, (_, _, mine) = prepared(home, candidates_file=str(path), **keys)
        assert dataset.candidates_digest == digest == plain.candidates_digest
        assert np.array_equal(mine.negatives, test.negatives)
    sample = prepared(home, limit_users=9)[0].candidates_digest
    assert prepared(home, limit_users=9, candidates_file=str(path))[0].candidates_digest == sample
    # another choice, which no seed has drawn, in any order too
    own = shuffled[1]["user"], shuffled[1]["phase"]
    own_items = {
        line.split("\t")[1]
        for line in (home / "random/random.inter").read_text().splitlines()
        if line.startswith(f"{own[0]}\t")
    }
    other = next(f"i{n}" for n in range(60) if f"i{n}" not in own_items and f"i{n}" not in shuffled[1]["negatives"])
    found = set()
    for negatives in ([other, *shuffled[1]["negatives"][1:]], [*shuffled[1]["negatives"][:0:-1], other]):
        rewrite(rewrite(path, 0, digest=""), 1, negatives=negatives)
        found.add(prepared(home, candidates_file=str(path))[0].candidates_digest)
    assert len(found) == 1 and found != {digest}


@pytest.mark.parametrize("users", [None, 3])
def test_an_edited_file_is_refused_whoever_is_evaluated(home, users):
    path = export(home, "a.jsonl")
    kept = set()
    if users:
        dataset, (_, _, test) = prepared(home, limit_users=users)
        kept = set(dataset.id2token("user_id", test.rows.users).tolist())
    place = next(n for n, row in enumerate(lines(path)) if n and row["user"] not in kept)  # not even looked at
    row = lines(path)[place]
    met = {
        line.split("\t")[1]
        for line in (home / "random/random.inter").read_text().splitlines()
        if line.startswith(f"{row['user']}\t")
    }
    other = next(f"i{n}" for n in range(60) if f"i{n}" not in met and f"i{n}" not in row["negatives"])
    rewrite(path, place, negatives=[other, *row["negatives"][1:]])
    with pytest.raises(UserError, match=r"a\.jsonl:1: the header's digest is"):
        prepared(home, candidates_file=str(path), limit_users=users)


def test_an_item_of_the_users_own_history_is_no_negative_and_another_dataset_is_refused(home):
    path = export(home, "a.jsonl")
    row = next(row for row in lines(path) if row.get("phase") == "test")
    place = lines(path).index(row)
    rows = [line.split("\t") for line in (home / "random/random.inter").read_text().splitlines()[1:]]
    earlier = next(item for user, item, *_ in rows if user == row["user"] and item not in row["targets"])
    text = path.read_text()
    rewrite(path, place, negatives=[earlier, *row["negatives"][1:]])
    with pytest.raises(UserError, match=rf"a\.jsonl:{place + 1}: {earlier} is in the history of user {row['user']}"):
        prepared(home, candidates_file=str(path))
    path.write_text(text)
    rewrite(path, 0, dataset="others")
    with pytest.raises(UserError, match=r"a\.jsonl:1: these are candidates of dataset 'others', and this is 'random'"):
        prepared(home, candidates_file=str(path))
