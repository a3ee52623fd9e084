"""Kept scores: found again for the same state and prompt alone, bounded, and never a reason to stop."""

import sqlite3
import time

import pytest
import torch

from recbole_mllm.prompts import Prompt
from recbole_mllm.scorecache import ScoreCache, prompt_digest, state_digest


def _digests(count, start=0):
    return [prompt_digest(Prompt(f"question {n}")) for n in range(start, start + count)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.scores.sqlite"


def test_scores_come_back_bit_for_bit_for_their_own_model(path):
    cache, keys = ScoreCache(path, 8), _digests(1200)
    values = torch.randn(1200, generator=torch.Generator().manual_seed(1)).tolist()
    cache.add("one", dict(zip(keys, values, strict=True)))
    cache.close()
    found = ScoreCache(path, 8).get("one", [*keys, *_digests(5, 9000)])
    assert [found[key] for key in keys] == values and len(found) == 1200
    assert ScoreCache(path, 8).get("other", keys) == {}


def test_a_prompt_is_its_text_and_the_bytes_of_its_image(tmp_path):
    image = tmp_path / "a.png"
    image.write_bytes(b"one")
    same = Prompt("<image> like it?", (image,))
    before = prompt_digest(same)
    (tmp_path / "b.png").write_bytes(b"one")
    assert prompt_digest(Prompt("<image> like it?", (tmp_path / "b.png",))) == before
    assert prompt_digest(Prompt("<image> Like it?", (image,))) != before
    image.write_bytes(b"other")
    assert prompt_digest(same) != before


def test_a_state_is_its_names_settings_and_every_trained_bit():
    weights = {"a": torch.zeros(2, 2), "b": torch.ones(3, dtype=torch.bfloat16)}
    base = state_digest(["model#1", 8], weights)
    assert state_digest(["model#1", 8], dict(reversed(weights.items()))) == base
    others = [
        state_digest(["model#2", 8], weights),
        state_digest(["model#1", 16], weights),
        state_digest(["model#1", 8], {}),
        state_digest(["model#1", 8], weights | {"a": torch.tensor([[0.0, 0.0], [0.0, 1e-38]])}),
        state_digest(["model#1", 8], weights | {"a": torch.zeros(4)}),
        state_digest(["model#1", 8], weights | {"b": torch.ones(3)}),
    ]
    assert len({base, *others}) == 7


def test_models_used_longest_ago_make_room(path):
    cache = ScoreCache(path, 1)
    for number in range(4):
        for start in range(0, 12_000, 1000):
            cache.add(f"m{number}", dict.fromkeys(_digests(1000, start), float(number)))
        assert len(cache.get("m0", _digests(1))) == 1 if number < 2 else True  # m0 stays in use at first
    cache.close()
    assert path.stat().st_size < 1.5 * 2**20
    with sqlite3.connect(path) as db:
        kept = [name for (name,) in db.execute("SELECT digest FROM models ORDER BY used")]
    assert kept[-1] == "m3" and "m1" not in kept


def test_a_model_that_fills_the_file_alone_leaves_it_at_that(path):
    cache = ScoreCache(path, 1)
    for start in range(0, 60_000, 5000):
        cache.add("big", dict.fromkeys(_digests(5000, start), 1.0))
    cache.close()
    assert path.stat().st_size < 1.5 * 2**20
    assert len(ScoreCache(path, 1).get("big", _digests(5000))) == 5000


@pytest.mark.parametrize("damage", [b"no database at all " * 100, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_damaged_file_is_begun_anew_with_one_line(path, damage, caplog):
    path.write_bytes(damage)
    cache = ScoreCache(path, 8)
    cache.add("one", dict.fromkeys(_digests(3), 2.0))
    assert cache.get("one", _digests(3)) == dict.fromkeys(_digests(3), 2.0)
    assert [record.getMessage().count("begun anew") for record in caplog.records] == [1]
    assert path.with_name(path.name + ".corrupt-1").read_bytes() == damage


@pytest.mark.parametrize(
    "statement", ["CREATE TABLE songs (a)", "CREATE TABLE scores (a)", "CREATE VIEW models AS SELECT 1 AS a"]
)
def test_a_database_of_something_else_is_put_aside_whole(path, statement, caplog):
    with sqlite3.connect(path) as db:
        db.execute(statement)
    db.close()
    cache = ScoreCache(path, 8)
    cache.add("one", dict.fromkeys(_digests(3), 2.0))
    assert cache.get("one", _digests(3)) == dict.fromkeys(_digests(3), 2.0)
    assert len(caplog.records) == 1 and "kept as" in caplog.text
    with sqlite3.connect(path.with_name(path.name + ".corrupt-1")) as db:
        assert statement in [sql for (sql,) in db.execute("SELECT sql FROM sqlite_master")]
    db.close()


def test_a_file_damaged_within_costs_its_scores_and_nothing_else(path, caplog):
    cache = ScoreCache(path, 8)
    cache.add("one", dict.fromkeys(_digests(5000), 2.0))
    cache.close()
    data = bytearray(path.read_bytes())
    data[4096 * 2 :] = b"\x5a" * (len(data) - 4096 * 2)
    path.write_bytes(bytes(data))
    cache = ScoreCache(path, 8)
    assert set(cache.get("one", _digests(5000)).values()) <= {2.0}
    cache.add("one", dict.fromkeys(_digests(10, 7000), 3.0))
    assert len(cache.get("one", _digests(10, 7000))) == 10
    assert len(caplog.records) == 1


def test_a_file_that_cannot_be_made_is_done_without(tmp_path, caplog):
    cache = ScoreCache(tmp_path / "nowhere" / "x.sqlite", 8)
    cache.add("one", dict.fromkeys(_digests(3), 2.0))
    assert cache.get("one", _digests(3)) == {} and len(caplog.records) == 1
    assert "going on without" in caplog.text


def test_two_processes_worth_of_connections_share_the_file(path):
    one, two = ScoreCache(path, 8), ScoreCache(path, 8)
    one.add("m", dict.fromkeys(_digests(10), 1.0))
    two.add("m", dict.fromkeys(_digests(10, 5), 2.0))
    found = one.get("m", _digests(15))
    assert list(found.values()).count(1.0) == 10 and len(found) == 15  # what is known stays as it is


def test_a_demos_worth_of_pairs_is_looked_up_and_kept_in_a_fraction_of_a_second(path):
    cache, keys = ScoreCache(path, 8), _digests(8400)
    started = time.perf_counter()
    for start in range(0, 8400, 1024):
        part = keys[start : start + 1024]
        assert not cache.get("m", part)
        cache.add("m", dict.fromkeys(part, 1.0))
    assert len(cache.get("m", keys)) == 8400
    assert time.perf_counter() - started < 2  # measured: below 0.1
