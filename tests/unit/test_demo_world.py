"""The demo world holds what it promises, and the shipped tiny MLLM sees and judges it."""

import json
from functools import partial
from itertools import product
from pathlib import Path
from random import Random

import pytest
from PIL import Image
from stock_forward import CPU, SETTINGS, STYLE
from tiny_mllm import sentences as texts

from recbole_mllm.common.prompts import image_summary_prompt, recommend_prompt
from recbole_mllm.demo.attributes import FIELDS, VALUES, VISIBLE, Item, draw_item, is_reserved
from recbole_mllm.demo.builtin import ensure_builtin
from recbole_mllm.demo.render import render
from recbole_mllm.demo.world import World, demo_world, item_id, user_id, write_demo_dataset
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.interface import Batch, Decoding

ROOT = Path(__file__).parents[2]
SEED = 100


def items(count: int, *, reserved: bool = True) -> list[Item]:
    rng = Random(3)
    return [draw_item(rng, reserved=reserved) for _ in range(count)]


@pytest.fixture(scope="module")
def world() -> World:
    return demo_world(SEED)


# ---- attributes, texts and images


def test_a_title_holds_no_visual_attribute_and_no_reserved_look_is_drawn_for_training(world: World):
    visual = {value for field in VISIBLE for value in VALUES[field]}
    assert not any(visual & set(item.title.lower().split()) for item in world.items)
    looks = [dict(zip(VISIBLE, look, strict=True)) for look in product(*(VALUES[field] for field in VISIBLE))]
    assert 0.25 < sum(map(is_reserved, looks)) / len(looks) < 0.35
    assert not any(is_reserved(item.traits) for item in items(500, reserved=False))
    assert all(is_reserved(item.traits) for item in world.items)


def test_what_the_tiny_model_learns_to_say_is_read_back_and_nothing_else():
    for item in items(50):
        assert texts.parse_caption(texts.caption(item)) == {field: item.traits[field] for field in VISIBLE}
        assert texts.parse_caption(texts.caption(item)[:-1]) is None
        assert texts.known_traits(item, texts.caption(item)) == item.traits
        assert texts.known_traits(item, texts.text_summary(item)) == {"theme": item.theme}
        assert texts.parse_preference(texts.preference_text(item.traits)) == item.traits
    for wrong in ("", "red.", "sport theme, red colour.", "red size."):
        assert texts.parse_preference(f"The user prefers {wrong}" if wrong else "") is None


def test_summary_lets_the_later_of_two_win_and_two_beat_the_previous():
    red, blue = {"colour": "red"}, {"colour": "blue"}
    assert texts.summarize([red, blue]) == blue
    assert texts.summarize([blue], red) == red
    assert texts.summarize([blue, blue], red) == blue
    assert texts.summarize([red, blue, blue, red]) == red  # 1 + 1.6 against 1.2 + 1.4: a tie, and red was last


def test_the_look_and_the_seed_alone_decide_what_an_image_shows():
    first, second = items(2)
    other_title = Item("Alba", first.colour, first.pattern, first.kind, first.scene, "retro")
    drawn = [render(item, seed).tobytes() for item, seed in ((first, 7), (other_title, 7), (first, 8), (second, 7))]
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3
    values = [VALUES[field] for field in VISIBLE]
    looks = [tuple(of[n % len(of)] for of in values) for n in range(8)]  # every value once at least
    assert len({render(Item("Alba", *look, "retro"), 1).tobytes() for look in looks}) == 8


# ---- the world and its folder


def test_nobody_takes_an_item_twice_cold_ones_come_last_and_tastes_show_in_what_is_taken(world: World):
    assert len(world.items) == 600 and len(world.users) == 400 and len(world.cold) == 120
    assert not world.cold & {item for user in world.users for item in user.history[:-1]}
    assert 80 < sum(user.history[-1] in world.cold for user in world.users) < 200
    taken, any_item = [], []
    for user in world.users:
        assert len(set(user.history)) == len(user.history) >= 8
        taken.append(world.utility(user.taste, world.items[user.history[-1]]))
        any_item += [world.utility(user.taste, item) for item in world.items[:20]]
    assert sum(taken) / len(taken) > 2 * sum(any_item) / len(any_item)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> World:
    drawn = partial(demo_world, items=120, users=20, cold=30)
    monkeypatch.setattr("recbole_mllm.demo.world.demo_world", drawn)
    return drawn(SEED)


def table(path: Path) -> tuple[list[str], list[list[str]]]:
    header, *rows = path.read_text(encoding="utf-8").splitlines()
    return header.split("\t"), [row.split("\t") for row in rows]


def test_the_dataset_holds_the_world_with_the_truth_beside_it(tmp_path: Path, small: World):
    write_demo_dataset(folder := tmp_path / "toy", SEED)
    header, rows = table(folder / "toy.item")
    assert header == ["item_id:token", "title:token_seq", "image:token"]
    assert [row[:2] for row in rows] == [[item_id(n), item.title] for n, item in enumerate(small.items)]
    for _, _, image in rows[:20]:
        with Image.open(folder / image) as picture:
            assert picture.format == "PNG" and 64 <= picture.width <= 128
    header, rows = table(folder / "toy.inter")
    assert header == ["user_id:token", "item_id:token", "timestamp:float"]
    times = [int(row[2]) for row in rows]
    assert times == sorted(times) and times[-1] < 2**24
    for number, user in enumerate(small.users):
        own = [(int(time), item) for who, item, time in rows if who == user_id(number)]
        assert [item for _, item in own] == [item_id(n) for n in user.history]
        assert len({time for time, _ in own}) == len(own)
    truth = json.loads((folder / "truth.json").read_text(encoding="utf-8"))
    assert truth["tastes"][user_id(0)] == small.users[0].taste
    assert truth["items"]["i0001"] == {"brand": small.items[0].brand, **small.items[0].traits}
    assert set(truth["cold"]) == {item_id(n) for n in small.cold}
    with pytest.raises(FileExistsError, match="remove it"):  # never overwritten
        write_demo_dataset(folder, SEED)


@pytest.mark.usefixtures("small")
def test_a_world_depends_on_its_seed_alone_to_the_byte(tmp_path: Path):
    written = []
    for name in ("a/demo-100", "b/demo-100", "c/demo-101"):
        folder = tmp_path / name
        ensure_builtin(folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        written.append({path.relative_to(folder).name: path.read_bytes() for path in files})
    assert written[0] == written[1] and set(written[0].values()) != set(written[2].values())
    assert len(written[0]) == 120 + 5  # truth.json, dataset.yaml and the list of what was built beside the two tables


@pytest.mark.usefixtures("small")
def test_a_dataset_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("recbole_mllm.demo.world.write_text", full_disk)
    with pytest.raises(OSError, match="no space"):
        ensure_builtin(tmp_path / "demo-5")
    assert not list(tmp_path.iterdir())


# ---- the shipped model


@pytest.fixture(scope="module")
def tiny() -> HFModel:
    return HFModel(str(ROOT / "recbole_mllm" / "demo" / "tiny"), SETTINGS.mllm, CPU)


def drawn(folder: Path, shown: list[Item]) -> list[Path]:
    """Return images of the items, none of which the tiny model has seen."""
    paths = [folder / f"{n}.png" for n in range(len(shown))]
    for n, (item, path) in enumerate(zip(shown, paths, strict=True)):
        render(item, 500_000 + n).save(path)
    return paths


def test_every_value_is_one_token_and_belongs_to_one_field(tiny: HFModel):
    values = [value for field in FIELDS for value in VALUES[field]]
    assert len(values) == len(set(values))
    words = tiny.encoder.tokenizer
    assert all(len(words.encode(f" {value}", add_special_tokens=False)) == 1 for value in values)


def test_the_tiny_model_captions_looks_it_has_never_seen(tiny: HFModel, tmp_path: Path):
    shown = items(60)
    work = Batch([image_summary_prompt(STYLE, path) for path in drawn(tmp_path, shown)], Decoding(16))
    tiny.write(work)
    told = [texts.parse_caption(work.answers[n].text) or {} for n in range(len(shown))]
    for field in VISIBLE:
        hits = sum(told_of.get(field) == item.traits[field] for told_of, item in zip(told, shown, strict=True))
        assert hits >= 57, f"{field}: {hits} of 60"


@pytest.mark.parametrize("item_first", [True, False])
def test_the_tiny_model_says_yes_to_what_agrees(tiny: HFModel, tmp_path: Path, item_first: bool):
    shown, rng = items(40), Random(8)
    unlike = [{f: rng.choice([v for v in VALUES[f] if v != item.traits[f]]) for f in FIELDS} for item in shown]
    prompts = [
        recommend_prompt(STYLE, texts.preference_text(taste), item.title, path, item_first=item_first)
        for item, other, path in zip(shown, unlike, drawn(tmp_path, shown), strict=True)
        for taste in (item.traits, other)
    ]
    agreeing, disagreeing = tiny.yes_scores(prompts, tiny.answers(STYLE)).view(-1, 2).unbind(1)
    assert (agreeing > 0).float().mean() >= 0.95
    assert (disagreeing < 0).float().mean() >= 0.95
