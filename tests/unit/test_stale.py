"""What changed is made anew, and nothing else: one image, one title, one history, the wording, the model."""

from dataclasses import replace

import pytest
import yaml
from PIL import Image
from planted_writers import Planted

from recbole_mllm.common.settings import SummarySettings
from recbole_mllm.common.yaml_files import PROPERTIES
from recbole_mllm.data.texts import Items, read_user_summaries
from recbole_mllm.errors import UserError
from recbole_mllm.prompts import Style
from recbole_mllm.summaries.chains import history_digest
from recbole_mllm.summaries.generator import Stage, Summarizers
from recbole_mllm.summaries.preferences import make_preferences
from recbole_mllm.summaries.user_summaries import Plan

STYLE = Style.from_mapping("demo", yaml.safe_load((PROPERTIES / "prompt" / "demo.yaml").read_text()))
BASE = SummarySettings.from_config(yaml.safe_load((PROPERTIES / "model" / "MLLMMSR.yaml").read_text()))
SETTINGS = replace(BASE, block_size=2, item_summary="image", max_history=None)
HISTORIES = {"u1": ["a", "b", "c"], "u2": ["c", "d"], "u3": ["d", "e", "a", "b"]}


class World:
    """A dataset folder, two writers that count, and what is asked of them."""

    def __init__(self, folder):
        self.folder, self.style, self.settings, self.identity = folder / "made", STYLE, SETTINGS, "m"
        self.folder.mkdir()
        self.titles = {item: f"title {item}" for item in "abcde"}
        self.histories = {user: list(items) for user, items in HISTORIES.items()}
        for n, item in enumerate("abcde"):
            self.paint(item, (50 * n, 10, 10))

    def paint(self, item, colour):
        Image.new("RGB", (5, 5), colour).save(self.folder / f"{item}.png")

    def summarize(self):
        """Make all summaries; return how many item and user prompts were written."""

        def caption(prompt):
            with Image.open(prompt.images[0]) as image:
                return f"an image of {image.getpixel((0, 0))}"

        item, user = Planted(caption), Planted(lambda prompt: f"knows {hash(prompt.text) % 10**9}")
        images = {name: self.folder / f"{name}.png" for name in self.titles}
        who = Summarizers(self.identity, self.identity, lambda: item, lambda: user)
        stage = Stage(self.folder, "t", self.style, Items(self.titles, images), self.settings, who)
        plan = Plan(self.histories, {u: set(range(1, len(h) + 1)) for u, h in self.histories.items()})
        self.known = make_preferences(stage, plan)
        return item.asked, user.asked


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    # u1: 1, 2, 3; u2: 1, 2; u3: 1, 2, 3, 4
    assert made.summarize() == (5, 9)
    assert made.summarize() == (0, 0)
    return made


def test_another_image_redoes_its_item_and_the_states_that_have_read_it(world):
    world.paint("b", (1, 2, 3))
    # u1 from its second item on, u3 at its fourth
    assert world.summarize() == (1, 3)
    world.paint("b", (50, 10, 10))  # as it was: known
    assert world.summarize() == (0, 0)


def test_the_same_image_under_two_names_is_described_once(tmp_path):
    made = World(tmp_path)
    made.paint("e", (0, 10, 10))  # as a
    assert made.summarize()[0] == 4


def test_another_title_redoes_the_states_that_name_it(world):
    world.titles["e"] = "another"
    assert world.summarize() == (0, 3)


def test_another_history_redoes_what_lies_behind_the_change_alone(world):
    world.histories["u1"] += ["e"]
    assert world.summarize() == (0, 1)
    world.histories["u3"][2] = "c"  # its states at 3 and 4
    assert world.summarize() == (0, 2)
    rows = {(r.user, r.seen): r.history for r in read_user_summaries(world.folder / "made.t.usum")}
    assert rows["u3", 4] == history_digest(["d", "e", "c", "b"]) and rows["u1", 4] == history_digest(list("abce"))


def test_another_wording_redoes_what_it_words(world):
    world.style = replace(STYLE, next_block=STYLE.next_block + " Be brief.")
    assert world.summarize() == (0, 1 + 0 + 2)  # second blocks: u1 at 3, u3 at 3 and 4
    world.style = replace(STYLE, image_summary=STYLE.image_summary + " Be brief.")
    assert world.summarize()[0] == 5


def test_another_model_redoes_everything(world):
    world.identity = "n"
    assert world.summarize() == (5, 9)


def test_off_names_the_command_when_something_is_stale_and_reads_what_is_not(world):
    world.settings = replace(SETTINGS, summarize="off")
    assert world.summarize() == (0, 0)
    world.paint("a", (9, 9, 9))
    with pytest.raises(UserError, match="1 item summaries are missing or stale.*summarize"):
        world.summarize()
