"""Case studies: who is shown is settled before anybody knows how it came out, and what is shown is what was kept."""

import base64
import io
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from recbole_mllm.benchmark.cases import (
    BUDGET,
    SHOWN,
    Candidate,
    CaseStudies,
    Piece,
    case_of,
    choose,
    drawn,
    read_cases,
    thumbnails,
    word_changes,
)
from recbole_mllm.benchmark.html import page
from recbole_mllm.benchmark.ranking import build
from recbole_mllm.benchmark.records import append, read_arrays
from recbole_mllm.data.item_table import Items
from recbole_mllm.summaries.chains import State
from recbole_mllm.summaries.preferences import Preferences
from recbole_mllm.summaries.user_summaries import SummaryRequests
from tests.planted_runs import TEXTS, plant_cases, plant_images, plant_run


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    """Four finished runs, of which the MLLM's has stored cases, and their leaderboard."""
    results = tmp_path_factory.mktemp("results")
    config = {"data_path": str(results / "data")}
    planted = [("Pop", 0.2, "baseline"), ("ItemKNN", 1.5, "baseline"), ("SASRec", 0.8, "baseline")]
    runs = [plant_run(results, label, power, kind) for label, power, kind in planted]  # type: ignore[arg-type]
    runs.append(plant_run(results, "MLLMMSR", 2.5, "mllm", config=config))
    plant_cases(results, runs[-1])
    plant_images(results / "data", ["h0", "h1", "i0", "i1"])
    for record in runs:
        append(results / "runs.jsonl", record)
    return SimpleNamespace(results=results, runs=runs, board=build(runs, results))


@pytest.fixture
def copied(world, tmp_path) -> SimpleNamespace:
    """The same in a folder of the test's own."""
    shutil.copytree(world.results, tmp_path, dirs_exist_ok=True)
    return SimpleNamespace(results=tmp_path, runs=world.runs, board=world.board)


def book_of(world, board=None, **options) -> CaseStudies:
    book = read_cases(board or world.board, world.results, **options)
    assert book is not None
    return book


def without(board, *models):
    return replace(board, rows=tuple(row for row in board.rows if row.model not in models))


def test_the_first_drawn_are_shown_whatever_came_of_them(world):
    book = book_of(world)
    assert [case.user for case in book.cases[:SHOWN]] == [f"u{n}" for n in range(SHOWN)]
    assert all("drawn by seed" in case.why for case in book.cases[:SHOWN])
    assert len(book.cases) <= SHOWN + 2 and all("disagreement" in case.why for case in book.cases[SHOWN:])


def test_which_models_are_shown(copied):
    """SASRec beside, even where another baseline is best; MLLMMSR itself, before a variant that did better."""
    assert copied.board.best_baseline == "ItemKNN" and book_of(copied).beside == "SASRec"
    assert book_of(copied, without(copied.board, "SASRec")).beside == "ItemKNN"
    assert read_cases(without(copied.board, "MLLMMSR"), copied.results) is None
    better = plant_run(copied.results, "MLLMMSR:direct", 9.0, "mllm")
    plant_cases(copied.results, better)
    board = build([*copied.runs, better], copied.results)
    assert board.rows[0].model == "MLLMMSR:direct"
    assert book_of(copied, board).model == "MLLMMSR"
    assert book_of(copied, without(board, "MLLMMSR")).model == "MLLMMSR:direct"


def test_rankings_recomputed_from_the_scores(copied):
    mine, theirs = (read_arrays(copied.results / str(copied.runs[n].scores), []) for n in (3, 2))
    for case in book_of(copied).cases:
        for ranked, arrays in ((case.mine, mine), (case.theirs, theirs)):
            own = arrays["user"] == case.user
            order = np.argsort(-arrays["score"][own])
            assert [one.item for one in ranked] == arrays["item"][own][order].tolist()
            assert [one.rank for one in ranked] == list(range(1, 22))
            assert [one.hit for one in ranked] == (arrays["label"][own][order] > 0).tolist()
        assert [one.p for one in case.mine] == pytest.approx([1 / (1 + np.exp(-one.score)) for one in case.mine])
        assert all(one.p is None for one in case.theirs)
    place = np.random.default_rng(3).permuted(np.tile(np.arange(21), (120, 1)), axis=1).ravel()
    tied = mine | {"score": np.zeros(len(place)), "place": place}
    np.savez(copied.results / str(copied.runs[3].scores), **tied)
    case = book_of(copied).cases[0]
    own = mine["user"] == case.user
    assert [one.item for one in case.mine] == mine["item"][own][np.argsort(-place[own])].tolist()


def test_the_two_chosen_are_the_furthest_apart_one_each_way():
    def order(rank):
        return [Candidate(f"i{place}", 0.0, place == rank, place, 21, None) for place in range(1, 22)]

    names = [f"u{n}" for n in range(SHOWN + 4)]
    mine = {name: order(rank) for name, rank in zip(names, [21] * SHOWN + [1, 2, 9, 5], strict=True)}
    theirs = {name: order(rank) for name, rank in zip(names, [1] * SHOWN + [4, 20, 3, 5], strict=True)}
    book = CaseStudies("MLLMMSR", "SASRec", 2024)
    chosen = choose(names, mine, theirs, book)
    assert list(chosen) == [*names[:SHOWN], names[SHOWN + 1], names[SHOWN + 2]]
    assert "MLLMMSR ranks the hit furthest above SASRec" in chosen[names[SHOWN + 1]]
    assert "SASRec ranks the hit furthest above MLLMMSR" in chosen[names[SHOWN + 2]]
    assert list(choose(names, mine, {}, book)) == names[:SHOWN]
    assert list(choose(names, mine, mine, book)) == names[:SHOWN]


def test_who_is_drawn_depends_on_names_alone():
    first = drawn({f"u{n}": "won" for n in range(50)}, 10)
    assert first == drawn({f"u{n}": "lost" for n in reversed(range(50))}, 10)
    assert len(set(first)) == 10 and first != sorted(first) and len(drawn({"a": 0, "b": 0}, 10)) == 2


@pytest.mark.parametrize(
    ("rows", "history"), [(None, ["a", "b"]), ({("u", 2): ("v", 1)}, ["c"])], ids=["own", "control"]
)
def test_a_case_holds_nothing_at_or_after_the_target(rows, history):
    """Nor under a control, where what is shown is what was read in its place."""
    requests = SummaryRequests({"u": ["a", "b", "a", "c"], "v": ["c", "b"]}, {"u": {1, 2}, "v": {1}}, rows)
    settings = SimpleNamespace(summary_mode="recurrent", block_size=1, max_history=None, partial_block=True, control="")
    items = dict(requests.histories)
    texts = {
        (name, State(0, seen - 1, seen)): f"likes {' '.join(items[name][:seen])}" for name in items for seen in (1, 2)
    }
    case = case_of(Preferences(texts, requests, Items({}, {}), None, settings), "u", 2, "a")
    assert (case["user"], case["target"]) == ("u", "a")
    assert (case["history"], case["position"]) == (history, len(history))
    assert case["read"] == case["steps"][-1]["text"] == f"likes {' '.join(history)}"
    assert [(step["since"], step["seen"]) for step in case["steps"]] == [(n, n + 1) for n in range(len(history))]


def test_texts_are_shown_after_their_blocks_with_what_changed(copied):
    first, second = book_of(copied).cases[0].blocks
    assert list(first.shown) == ["h0", "h1", "h2"] and (second.first, second.last) == (4, 6)
    assert first.text == [Piece("same", TEXTS[0])]
    assert second.text is not None and Piece("gone", "red") in second.text and Piece("new", "green") in second.text
    path = (copied.results / str(copied.runs[3].per_user)).with_name("cases.json")
    kept = json.loads(path.read_text())
    for case in kept["users"]:
        case["steps"] = []  # a model without a chain shows what it read once
    path.write_text(json.dumps(kept))
    (block,) = book_of(copied).cases[0].blocks
    assert len(block.shown) == 6 and block.text == [Piece("same", TEXTS[-1])]
    for damage in ('{"users": [{}]', "[" * 100_000):  # a damaged file costs the case studies alone
        path.write_text(damage)
        text = page(copied.board, book_of(copied))
        assert "cases.json of run MLLMMSR-2024-0a1b2c3d cannot be shown" in text and "--force" in text


def test_thumbnails_are_small_and_missing_images_leave_a_blank(world):
    book = book_of(world)
    shown = [book.show(item) for item in book.cases[0].blocks[0].shown]
    assert [bool(one.image) for one in shown] == [True, True, False]
    picture = Image.open(io.BytesIO(base64.b64decode(shown[0].image.partition(",")[2])))
    assert picture.size == (96, 48)
    with_images, without_images = page(world.board, book), page(world.board, book_of(world, embed_images=False))
    assert len(with_images) < 2_000_000 and "data:image/jpeg" in with_images and "copyright holders" in with_images
    assert "data:image/jpeg" not in without_images and "--embed_images off" in without_images


def test_which_images_are_embedded(tmp_path):
    """None from outside the dataset's folder, and as many and as large as the budget allows."""
    plant_images(tmp_path / "data", ["a"])
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    (tmp_path / "data" / "images" / "b.png").write_text("no image")
    given = ["images/a.png", "../secret.png", "images/b.png", ""]
    assert list(thumbnails(given, [tmp_path / "data"])) == ["images/a.png"]
    rng = np.random.default_rng(1)
    names = [f"{n}.png" for n in range(30)]
    for name in names:
        Image.fromarray(rng.integers(0, 255, (96, 96, 3), np.uint8)).save(tmp_path / name)
    made = thumbnails(names * 20, [tmp_path])
    assert len(made) == 30 and sum(len(uri) * 20 for uri in made.values()) <= BUDGET
    assert Image.open(io.BytesIO(base64.b64decode(made[names[0]].partition(",")[2]))).width < 96
    assert 0 < len(thumbnails(names * 300, [tmp_path])) < 30


WORDS = st.lists(
    st.sampled_from(["the", "user", "likes", "red", "green", "lamps", "maps", "and", "old"]), max_size=15
).map(" ".join)


@given(WORDS, WORDS)
def test_both_texts_can_be_read_off_the_pieces(before, after):
    pieces = word_changes(before, after)
    assert " ".join(piece.text for piece in pieces if piece.change != "gone") == after
    assert " ".join(piece.text for piece in pieces if piece.change != "new") == before
    assert before != after or all(piece.change == "same" for piece in pieces)
