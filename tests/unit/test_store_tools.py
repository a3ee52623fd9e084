"""``store stats|prune|export|import``: what people do to the store, and what a wrong file does not do to it."""

import gzip
import json
import os
import subprocess
import sys

import pytest
from planted_writers import Planted

from recbole_mllm.cli import main
from recbole_mllm.common.prompts import Prompt
from recbole_mllm.data.schema import store_file
from recbole_mllm.mllm.interface import Decoding
from recbole_mllm.summaries.generator import CachedGenerator
from recbole_mllm.summaries.store import Store

PROMPTS = [Prompt(f"p{n}") for n in range(5)]


class Counting(Planted):
    identity = "counting"

    def __init__(self):
        super().__init__(lambda prompt: f"ünïcode {prompt.text} 🎬 <b> \\n", 2)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make(name, prompts=PROMPTS, identity="counting"):
    """Write a dataset folder with a store; return it and how many prompts the writer was asked."""
    folder = os.path.join("dataset", name)
    os.makedirs(folder, exist_ok=True)
    store, writer = open_store(name), Counting()
    texts = CachedGenerator("item", lambda: writer, identity, store, Decoding(9)).answer(prompts)
    store.close()
    return texts, writer.asked


def open_store(name):
    from pathlib import Path

    return Store(store_file(Path("dataset").resolve() / name))


def rows(name):
    store = open_store(name)
    with store.transaction() as db:
        found = db.execute("SELECT * FROM answers ORDER BY key").fetchall()
    store.close()
    return found


@pytest.mark.parametrize("file", ["out.jsonl", "out.jsonl.gz"])
def test_what_was_exported_and_imported_is_never_asked_again(file, capsys):
    texts, asked = make("a")
    os.makedirs("dataset/b")
    for _ in range(2):  # the second time over its own file
        assert main(["store", "export", "a", "--out", file]) == 0
    assert main(["store", "import", "b", file, "--origin", "Smith et al. 2026"]) == 0
    assert "5 answers added, 0 known" in capsys.readouterr().out
    assert (make("b"), asked) == ((texts, 0), 5)
    originals, copies = rows("a"), rows("b")
    assert [r[:8] for r in copies] == [r[:8] for r in originals]
    assert {r[8] for r in originals} == {""} and {r[8] for r in copies} == {"Smith et al. 2026"}


def test_an_export_says_what_it_holds_and_is_ordered_by_key():
    make("a")
    assert main(["store", "export", "dataset/a", "--out", "1.jsonl.gz"]) == 0
    with gzip.open("1.jsonl.gz", "rt", encoding="utf-8") as file:
        head, *answers = map(json.loads, file)
    assert (head["dataset"], head["answers"], head["models"]) == ("a", 5, {"counting": 5})
    assert [a["key"] for a in answers] == sorted(a["key"] for a in answers)


def test_known_answers_are_kept_and_counted_and_origins_travel_on(capsys):
    make("a")
    make("b", PROMPTS[:2])
    main(["store", "export", "a", "--out", "a.jsonl"])
    main(["store", "import", "b", "a.jsonl"])
    assert "3 answers added, 2 known already" in capsys.readouterr().out
    main(["store", "export", "b", "--out", "b.jsonl"])
    os.makedirs("dataset/c")
    main(["store", "import", "c", "b.jsonl"])
    assert sorted(r[8] for r in rows("c")) == ["a.jsonl", "a.jsonl", "a.jsonl", "b.jsonl", "b.jsonl"]


def spoil(line, **changes):
    answer = json.loads(line) | changes
    return json.dumps({k: v for k, v in answer.items() if v != "absent"}) + "\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines[:3], "{not json\n", *lines[4:]], "x.jsonl:4: no JSON object"),
        (lambda lines: lines[:5], "4 answers where its first line says 5"),
        (lambda lines: lines[1:], "x.jsonl:1: this is no file `store export` wrote"),
        (lambda lines: [spoil(lines[0], version=9), *lines[1:]], "x.jsonl:1: format version 9"),
        *(
            (lambda lines, changes=changes: [*lines[:5], spoil(lines[5], **changes)], f"x.jsonl:6: {message}")
            for changes, message in (
                ({"key": "k1"}, "key is not 64 hexadecimal digits"),
                ({"text": "a\tb"}, "text holds tabs"),
                ({"text": None}, "text is not a text"),
                ({"new_tokens": True}, "new_tokens is not a whole number"),
                ({"seconds": float("nan")}, "seconds is not a number"),
                ({"model": ""}, "kind or model is empty"),
                ({"model": "\ud800"}, "model holds half a surrogate pair"),
                ({"created": 10**400}, "created is not a number"),
                ({"origin": "absent"}, "missing or unknown: origin"),
            )
        ),
    ],
)
def test_a_malformed_file_is_refused_by_line_and_changes_nothing(change, message, capsys):
    make("a")
    main(["store", "export", "a", "--out", "x.jsonl"])
    make("b", [Prompt("other")])
    before = rows("b")
    with open("x.jsonl", encoding="utf-8") as file:
        lines = file.readlines()
    with open("x.jsonl", "w", encoding="utf-8") as file:
        file.writelines(change(lines))
    assert main(["store", "import", "b", "x.jsonl"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert rows("b") == before


@pytest.mark.parametrize("cut", [10, -20])
def test_a_cut_or_foreign_compressed_file_is_one_line(cut, capsys):
    make("a")
    main(["store", "export", "a", "--out", "x.jsonl.gz"])
    with open("x.jsonl.gz", "rb") as file:
        data = file.read()
    for bad in (data[:cut], b"not gzip at all", data[:40] + b"\xff" * 30 + data[70:]):
        with open("x.jsonl.gz", "wb") as file:
            file.write(bad)
        assert main(["store", "import", "a", "x.jsonl.gz"]) == 2
        error = capsys.readouterr().err
        assert "x.jsonl.gz" in error and error.count("\n") == 1


def test_stats_count_by_model_kind_and_origin(capsys):
    make("a")
    make("a", PROMPTS[:2], "server:m")
    assert main(["store", "stats", "a"]) == 0
    first, head, one, two = capsys.readouterr().out.splitlines()
    assert "7 answers" in first and head.split()[:4] == ["model", "kind", "origin", "answers"]
    assert one.split()[:6] == ["counting", "item", "-", "5", "15", "10"]
    assert two.split()[:6] == ["server:m", "item", "-", "2", "6", "4"]


def test_prune_deletes_what_was_asked_and_shrinks_the_file(capsys):
    make("a", [Prompt(f"{n} " + "word " * 300) for n in range(400)])
    make("a", PROMPTS, "server:m")
    store = open_store("a")
    with store.transaction(write=True) as db:
        db.execute("UPDATE answers SET created = created - 86400 * 10 WHERE model = 'counting'")
    store.close()
    file = "dataset/a/a.mllm.sqlite"
    before = os.path.getsize(file)
    assert main(["store", "prune", "a", "--older-than", "9", "--dry-run"]) == 0
    assert "400 in all, 5 would stay; nothing was changed" in capsys.readouterr().out
    assert len(rows("a")) == 405
    assert main(["store", "prune", "a", "--older-than", "9", "--model", "server:*"]) == 0
    assert len(rows("a")) == 405
    assert main(["store", "prune", "a", "--older-than", "9"]) == 0
    assert "counting: 400 answers deleted" in capsys.readouterr().out
    assert {r[3] for r in rows("a")} == {"server:m"} and os.path.getsize(file) < before / 4
    assert main(["store", "prune", "a", "--model", "server:*"]) == 0 and rows("a") == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("store stats nowhere", "no dataset 'nowhere'"),
        ("store stats empty", "holds no summary store yet"),
        ("store prune a", "say what to prune"),
        ("store export a --out missing/../a/x --model none", "no answer of a model like none"),
        ("store export a --out /proc/nowhere/x.jsonl", "cannot be written"),
        ("store import a absent.jsonl", "absent.jsonl does not exist"),
        ("store stats a --epochs=3", "store stats takes no '--epochs=3'"),
    ],
)
def test_a_mistake_is_one_line(words, message, capsys):
    make("a", PROMPTS[:1])
    os.makedirs("dataset/empty")
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_no_store_command_waits_for_torch():
    make("a")
    code = (
        "import sys; from recbole_mllm.cli import main; sys.argv = ['x']; import os; os.makedirs('dataset/b');"
        "codes = [main(w.split()) for w in ('store stats a', 'store export a --out x.jsonl', 'store import b x.jsonl',"
        "'store prune b --model none')]; heavy = {'torch', 'recbole', 'transformers', 'pandas'} & set(sys.modules);"
        "print(codes, heavy)"
    )
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 0] set()", done.stderr
