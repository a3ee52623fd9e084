"""A control changes what it names and nothing else: a history's order, an item's image, whose summary is read."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from planted_writers import Planted
from stock_forward import KEYS, STYLE

from recbole_mllm.benchmark.variants import resolve
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.settings import Settings, SummarySettings
from recbole_mllm.data.item_table import Items
from recbole_mllm.recommender import _MLLMRanker
from recbole_mllm.summaries.controls import controlled, other_images
from recbole_mllm.summaries.generator import CachedGenerator
from recbole_mllm.summaries.preferences import Preferences
from recbole_mllm.summaries.store import Decoding, Store
from recbole_mllm.summaries.user_summaries import SummaryRequests, preferences

BASE = SummarySettings.from_config(KEYS | {"item_summary": "none"})
LENGTHS = {"a": 9, "b": 6, "c": 6, "d\t1": 4, "e": 15}
HISTORIES = {name: [f"{name[0]}i{n}" for n in range(length)] for name, length in LENGTHS.items()}
REQUESTS = SummaryRequests(HISTORIES, {name: set(range(1, length)) for name, length in LENGTHS.items()})
ITEMS = Items({item: f"seen-{item}" for history in HISTORIES.values() for item in history}, {})
WAYS = [
    {"summary_mode": "recurrent"},
    {"summary_mode": "recurrent", "partial_block": False, "max_history": 5},
    {"summary_mode": "direct", "max_history": 4},
    {"summary_mode": "none", "history_titles": 3},
]


def read_by_rows(settings, folder, requests=REQUESTS):
    """Return the items each row's text has read, in order, and the prompts of all summaries: each echoes its items."""
    echo = Planted(lambda prompt: " ".join(f"seen-{item}" for item in seen_in(prompt.text)))
    plan = controlled(requests, settings)
    store = Store(folder / "store.sqlite")
    generator = CachedGenerator("user", lambda: echo, "echo", store, Decoding(9))
    texts = preferences(generator, STYLE, ITEMS, {}, plan, settings) if settings.summary_mode != "none" else {}
    store.close()
    known = Preferences(texts, plan, ITEMS, STYLE, settings)
    rows = [(name, place) for name, places in requests.positions.items() for place in sorted(places)]
    return {row: seen_in(known.of(*row)) for row in rows}, known, echo


def seen_in(text):
    return re.findall(r"seen-(\w+)", text)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(map(str, way.values())))
def test_a_shuffled_history_holds_what_the_row_may_read_in_another_order(way, tmp_path):
    settings = replace(BASE, **way)
    own, *_ = read_by_rows(settings, tmp_path)
    shuffled, *_ = read_by_rows(replace(settings, control="shuffled-history"), tmp_path)
    long = [row for row in own if len(own[row]) > 2]
    for row in own:
        assert sorted(shuffled[row]) == sorted(own[row]), "nothing at or after its position, and nothing less"
    assert sum(shuffled[row] != own[row] for row in long) > len(long) / 2
    assert any(shuffled[row][-1] != own[row][-1] for row in long), "what was recent is so no longer"
    again, *_ = read_by_rows(replace(settings, control="shuffled-history"), tmp_path / "again")
    assert again == shuffled
    other, *_ = read_by_rows(replace(settings, control="shuffled-history", summary_seed=7), tmp_path)
    assert other != shuffled


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(map(str, way.values())))
def test_a_wrong_summary_is_another_user_s_at_the_nearest_position(way, tmp_path):
    settings = replace(BASE, **way)
    own, *_ = read_by_rows(settings, tmp_path)
    wrong, known, echo = read_by_rows(replace(settings, control="wrong-summary"), tmp_path)
    assert not echo.asked, "no text is generated that the full model has not"
    for (name, place), items in wrong.items():
        other, there = known.place(name, place)
        assert other[0] != name[0] and items == own[other, there]
        nearest = min(abs(p - place) for user, ps in REQUESTS.positions.items() if user[0] != name[0] for p in ps)
        assert abs(there - place) == nearest
    assert {known.place("b", place)[0] for place in range(1, 6)} > {known.place("b", 3)[0]}, "not always the same one's"
    with pytest.raises(UserError, match="drawn for the rows of the dataset"):
        known.of("a", 99)
    with pytest.raises(UserError, match="two users"):
        controlled(REQUESTS.of({"a"}), replace(settings, control="wrong-summary"))


def test_a_wrong_image_is_another_item_s_and_each_image_stands_once():
    images = {f"i{n}": Path(f"{n}.png") for n in range(40)}
    found = other_images(images, 2024)
    assert found.keys() == images.keys() and sorted(found.values()) == sorted(images.values())
    assert all(found[item] != image for item, image in images.items())
    assert found == other_images(dict(reversed(images.items())), 2024) != other_images(images, 2025)
    with pytest.raises(UserError, match="two items with images"):
        other_images({"i0": Path("0.png")}, 2024)


def test_without_a_history_every_row_is_asked_as_a_new_user_s(tmp_path):
    settings = SummarySettings.from_config(KEYS | resolve("MLLMMSR:no-history").overrides)
    _, known, echo = read_by_rows(settings, tmp_path)
    assert not echo.asked and {known.of(*row) for row in [("a", 1), ("a", 8), ("e", 14)]} == {STYLE.cold}


def test_nobody_is_recommended_anything_by_a_control():
    with pytest.raises(UserError, match="recommend from the full model's"):
        _MLLMRanker({"config": KEYS | {"control": "shuffled-history"}}, "", torch.device("cpu"))


@pytest.mark.parametrize(
    "keys",
    [
        {"control": "wrong-image", "use_image": False, "item_summary": "text"},
        {"control": "wrong-image", "use_image": False, "summary_mode": "none"},
        {"control": "shuffled-history", "summary_mode": "none", "history_titles": 0},
        {"control": "shuffled-history", "summary_mode": "none", "history_titles": 1},
        {"control": "wrong-summary", "summary_mode": "none", "history_titles": 0},
    ],
    ids=lambda keys: " ".join(map(str, keys.values())),
)
def test_a_control_that_would_change_nothing_is_refused(keys):
    with pytest.raises(UserError, match="would change nothing"):
        Settings.from_config(KEYS | keys)
