"""The demo world: users whose taste is mostly in what they see, and products whose looks no text tells.

A world is planted: every user's taste and every product's attributes are known, so tests and measurements can ask how
much of the truth a model has found. Models see images, titles and interactions only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

from recbole_mllm.common.files import write_text
from recbole_mllm.demo.attributes import FIELDS, VALUES, Item, Traits, draw_item
from recbole_mllm.demo.render import render

ITEMS, COLD_ITEMS, USERS = 600, 120, 400
# How much a field counts, before each world changes it a little. They differ, so that counting agreeing fields, which
# the tiny MLLM does untrained, is not the best one can do; the theme, all a title tells, counts least.
_WEIGHTS: Mapping[str, float] = {"colour": 1.8, "pattern": 0.9, "kind": 1.5, "scene": 0.8, "theme": 0.75}
_DECISIVENESS = 3.2  # of a choice: 0 takes any item, infinity the best
_TREND = 1.0  # exponent of the values' popularity among tastes
_POPULARITY = 0.4  # standard deviation of what makes an item sell whatever its attributes
_CONSIDERED = 300  # items a user looks at before choosing one
_COLD_SHARE = 0.35  # of the users whose last item is one nobody had before


@dataclass(frozen=True, slots=True)
class User:
    """One user: item numbers oldest first, of which the last is the test target, and the taste at the end."""

    history: tuple[int, ...]
    taste: Traits


@dataclass(frozen=True, slots=True)
class World:
    """Items, users, and the truth behind them."""

    seed: int
    items: tuple[Item, ...]
    users: tuple[User, ...]
    cold: frozenset[int]
    """Items that occur as a user's last interaction or not at all."""
    weights: Mapping[str, float]

    def utility(self, taste: Traits, item: Item) -> float:
        """Return how well `item` suits `taste`: what an oracle ranks by."""
        return sum(weight for field, weight in self.weights.items() if getattr(item, field) == taste[field])

    def image_seed(self, number: int) -> int:
        """Return the seed the image of item `number` is drawn with."""
        return 10_000 * self.seed + number


def demo_world(seed: int, items: int = ITEMS, users: int = USERS, cold: int = COLD_ITEMS) -> World:
    """Draw a world; the same seed gives the same one.

    Tastes follow a trend of this world, so that some values are common; each user redraws two fields of the taste once.
    Nobody takes an item twice, and the `cold` items are taken last or never.
    """
    rng = Random(f"demo world {seed}")
    products = tuple(draw_item(rng, reserved=True) for _ in range(items))
    weights = {field: weight * rng.uniform(0.85, 1.15) for field, weight in _WEIGHTS.items()}
    trend = {field: _trend(len(values), rng) for field, values in VALUES.items()}
    rare = frozenset(rng.sample(range(items), cold))
    shop = World(seed, products, (), rare, weights)
    popularity = [rng.gauss(0, _POPULARITY) for _ in products]  # what makes items sell whatever their attributes
    shelves = {is_cold: [n for n in range(items) if (n in rare) == is_cold] for is_cold in (False, True)}

    def appeal(taste: Traits) -> list[float]:
        """Return how likely, up to a factor, a user of this taste takes each item."""
        pairs = zip(products, popularity, strict=True)
        return [math.exp(_DECISIVENESS * shop.utility(taste, item) + extra) for item, extra in pairs]

    def user() -> User:
        """Draw a user's taste and let it choose item after item."""
        taste = {field: rng.choices(VALUES[field], trend[field])[0] for field in FIELDS}
        length = rng.randint(8, 20)
        turn = rng.randint(length // 4, length // 2)
        liking, history = appeal(taste), list[int]()
        for step in range(length):
            if step == turn:
                taste |= {field: rng.choices(VALUES[field], trend[field])[0] for field in rng.sample(FIELDS, 2)}
                liking = appeal(taste)
            shelf = shelves[step == length - 1 and rng.random() < _COLD_SHARE]
            offer = [n for n in rng.sample(shelf, min(len(shelf), _CONSIDERED)) if n not in history]
            history.append(rng.choices(offer, [liking[n] for n in offer])[0])
        return User(tuple(history), taste)

    return World(seed, products, tuple(user() for _ in range(users)), rare, weights)


def _trend(count: int, rng: Random) -> list[float]:
    weights = [(rank + 1) ** -_TREND for rank in range(count)]
    rng.shuffle(weights)
    return weights


def item_id(number: int) -> str:
    """Return the raw id of item `number`."""
    return f"i{number + 1:04d}"


def user_id(number: int) -> str:
    """Return the raw id of user `number`."""
    return f"u{number + 1:04d}"


def write_demo_dataset(folder: Path, seed: int) -> None:
    """Write the world of `seed` as the RecBole dataset `folder`, a new or an empty one.

    Beside the atomic files and images stands ``truth.json``, the hidden attributes and tastes: for tests, never for
    models.

    Raises:
        FileExistsError: `folder` is there already, and not empty.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists; remove it to have the demo dataset built again")
    world, name = demo_world(seed), folder.name
    (folder / "images").mkdir(parents=True)
    for number, item in enumerate(world.items):
        render(item, world.image_seed(number)).save(folder / _image(number))
    items = [f"{item_id(n)}\t{item.title}\t{_image(n)}" for n, item in enumerate(world.items)]
    rows = [f"{user_id(u)}\t{item_id(n)}\t{time}" for time, u, n in _interactions(world)]
    write_text(folder / f"{name}.item", "\n".join(["item_id:token\ttitle:token_seq\timage:token", *items, ""]))
    write_text(folder / f"{name}.inter", "\n".join(["user_id:token\titem_id:token\ttimestamp:float", *rows, ""]))
    write_text(folder / "truth.json", json.dumps(_truth(world), indent=1) + "\n")


def _image(number: int) -> str:
    return f"images/{item_id(number)}.png"


def _interactions(world: World) -> list[tuple[int, int, int]]:
    """Return (time, user, item) in the order of time: whole numbers, a few apart for each user."""
    rng = Random(f"times {world.seed}")
    rows = []
    for number, user in enumerate(world.users):
        time = rng.randint(0, 200)
        for item in user.history:
            time += rng.randint(1, 20)
            rows.append((time, number, item))
    return sorted(rows)


def _truth(world: World) -> dict[str, object]:
    return {
        "seed": world.seed,
        "weights": dict(world.weights),
        "items": {item_id(n): {"brand": item.brand, **item.traits} for n, item in enumerate(world.items)},
        "cold": [item_id(n) for n in sorted(world.cold)],
        "tastes": {user_id(n): dict(user.taste) for n, user in enumerate(world.users)},
    }
