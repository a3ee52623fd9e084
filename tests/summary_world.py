"""A planted world whose histories, titles and images change, in a folder; and what its writers are asked."""

import hashlib
from collections import namedtuple
from dataclasses import replace

from PIL import Image
from planted_writers import Planted
from stock_forward import SETTINGS, STYLE

from recbole_mllm.data.atomic import write_atomic
from recbole_mllm.data.item_table import Items
from recbole_mllm.data.schema import ITEM_TYPES, item_file, usum_file
from recbole_mllm.summaries.generator import Summarizer, SummarySetup
from recbole_mllm.summaries.preferences import refresh
from recbole_mllm.summaries.summary_files import read_rows
from recbole_mllm.summaries.user_summaries import SummaryRequests

BASE = replace(SETTINGS.summary, item_summary="text")


Row = namedtuple("Row", "history text")


class World:
    """Histories that change, in a folder; writers whose answers depend on the whole prompt, and count."""

    def __init__(self, folder, histories, settings=BASE, last_k=None, titles=None):
        self.folder, self.settings, self.last_k = folder / "grown", settings, last_k
        self.folder.mkdir(parents=True)
        self.histories = {user: list(items) for user, items in histories.items()}
        self.titles, self.images, self.style, self.identity = titles or {}, {}, STYLE, "m"

    def paint(self, item, colour):
        self.images[item] = self.folder / f"{item}.png"
        Image.new("RGB", (5, 5), colour).save(self.images[item])

    def plan(self):
        """Rows as leave-one-out has them: test, validation, and the latest `last_k` training positions."""
        places = {u: set(range(1, len(h))) for u, h in self.histories.items()}
        if self.last_k is not None:
            first = {u: len(h) - 2 - self.last_k for u, h in self.histories.items()}
            places = {u: {p for p in found if p >= first[u]} for u, found in places.items()}
        return SummaryRequests(self.histories, {u: found for u, found in places.items() if found})

    def stage(self, settings=None):
        def caption(prompt):
            pixels = [Image.open(path).getpixel((0, 0)) for path in prompt.images]
            return f"it is {_digest(prompt.text + str(pixels))}"

        items = {item for history in self.histories.values() for item in history}
        self.item, self.user = Planted(caption), Planted(lambda prompt: f"likes {_digest(prompt.text)}")
        titles = {item: self.titles.get(item, f"title of {item}") for item in sorted(items)}
        write_atomic(item_file(self.folder), ITEM_TYPES, ((item, title, "") for item, title in titles.items()))
        who = {
            "item": Summarizer(self.identity, lambda: self.item),
            "user": Summarizer(self.identity, lambda: self.user),
        }
        return SummarySetup(self.folder, "t", self.style, Items(titles, self.images), settings or self.settings, who)

    def refresh(self, users=None):
        """Return how many item and user prompts were generated, and who is left."""
        _, left = refresh(self.stage(), self.plan(), users)
        return self.item.asked, self.user.asked, left

    def known(self, settings=None):
        return refresh(self.stage(settings), self.plan())[0]

    def rows(self):
        rows = read_rows(usum_file(self.folder, "t"), "user")
        return {(place.owner, place.seen): Row(place.history, text) for place, (_, text) in rows}

    def file(self):
        path = usum_file(self.folder, "t")
        return path.read_bytes() if path.is_file() else None

    def scratch(self, folder):
        other = World(folder, self.histories, self.settings, self.last_k, self.titles)
        other.known()
        return other


def _digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def random_histories(rng, users, least, most, items=300):
    return {f"u{n}": [f"i{rng.randrange(items)}" for _ in range(rng.randint(least, most))] for n in range(users)}
