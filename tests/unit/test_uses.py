"""What the leaderboard says the model uses is what it was planted to use, and nothing else.

A planted MLLM reads prompts made by the project's own controls, in four worlds: its answer follows the order of the
history, the colours of images, the kinds in titles, or the candidate alone.
"""

import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from planted_writers import Planted
from stock_forward import KEYS, STYLE

from recbole_mllm.benchmark.ranking import build
from recbole_mllm.benchmark.records import append
from recbole_mllm.benchmark.report import read_leaderboard, render
from recbole_mllm.benchmark.tables import format_table
from recbole_mllm.benchmark.variants import SETS, VARIANTS, part_of, resolve
from recbole_mllm.benchmark.wording import uses
from recbole_mllm.common.prompts import recommend_prompt
from recbole_mllm.common.settings import Settings
from recbole_mllm.data.item_table import Items
from recbole_mllm.summaries.controls import controlled, other_images
from recbole_mllm.summaries.generator import CachedGenerator
from recbole_mllm.summaries.preferences import Preferences
from recbole_mllm.summaries.store import Decoding, Store
from recbole_mllm.summaries.user_summaries import SummaryRequests, preferences
from tests.planted_runs import N_CANDIDATES, plant_run

USERS, ITEMS, LENGTH, COLOURS, KINDS = 150, 60, 6, ("red", "green", "blue"), 3
SEEN = re.compile(r"item(\d+) kind(\d)(?:: (red|green|blue))?")

MATTERS = {
    "order": {"shuffled-history", "wrong-summary", "no-history"},
    "colours": {"wrong-image", "wrong-summary", "title-only", "no-history"},
    "kinds": {"wrong-summary", "no-history"},
    "candidate": set(),
}


class World:
    """Users whose next item follows from their history as `truth` says, and the MLLM that answers by it."""

    def __init__(self, truth):
        self.truth, rng = truth, np.random.default_rng(7)
        colours = rng.integers(0, len(COLOURS), ITEMS)
        kinds = rng.integers(0, KINDS, ITEMS)
        titles = {f"i{n}": f"item{n} kind{kinds[n]}" for n in range(ITEMS)}
        self.items = Items(titles, {f"i{n}": Path(f"{COLOURS[colours[n]]}-{n}.png") for n in range(ITEMS)})
        self.histories, self.asked = {}, {}
        for user in range(USERS):
            liked = np.flatnonzero({"colours": colours, "kinds": kinds}.get(truth, np.zeros(ITEMS)) == user % 3)
            liked = liked if len(liked) and truth in ("colours", "kinds") else np.arange(ITEMS)
            *history, target = rng.choice(liked, LENGTH + 1, replace=False).tolist()
            if truth == "order":
                target = (history[-1] + 1) % ITEMS
            if truth == "candidate":
                target = int(rng.integers(0, ITEMS // 5)) * 5
            others = rng.choice(np.setdiff1d(np.arange(ITEMS), [target]), N_CANDIDATES - 1, replace=False).tolist()
            self.histories[f"u{user}"] = [f"i{n}" for n in history]
            self.asked[f"u{user}"] = [f"i{n}" for n in (target, *others)]

    def answer(self, prompt):
        """Return how sure the MLLM is that the user takes the candidate: the first item a question names."""
        candidate, *read = SEEN.findall(prompt.text)
        number = int(candidate[0])
        if self.truth == "candidate":
            return 2.0 * (number % 5 == 0)
        if not read:
            return 0.0
        if self.truth == "order":
            return 3.0 * (number == (int(read[-1][0]) + 1) % ITEMS)
        if self.truth == "kinds":
            return 3.0 * np.mean([kind == candidate[1] for _, kind, _ in read])
        shown = prompt.images[0].name.partition("-")[0] if prompt.images else ""
        return 3.0 * np.mean([colour == shown for *_, colour in read])

    def scores(self, variant, folder):
        """Return ``[users, candidates]`` of the full model or a variant, through the project's own prompts."""
        keys = KEYS | {"item_kind": "product"} | (resolve(f"MLLMMSR:{variant}").overrides if variant else {})
        settings = Settings.from_config(keys)
        items, s = self.items, settings.summary
        if s.control == "wrong-image":
            items = replace(items, images=other_images(items.images, s.summary_seed))
        summaries = {item: path.name.partition("-")[0] for item, path in items.images.items()}
        summaries = summaries if s.item_summary == "image" else {}
        plan = controlled(SummaryRequests(self.histories, {user: {LENGTH} for user in self.histories}), s)
        echo = Planted(lambda prompt: "; ".join(match[0] for match in SEEN.finditer(prompt.text)), 64)
        store = Store(folder / f"{variant}.sqlite")
        generator = CachedGenerator("user", lambda: echo, "echo", store, Decoding(9))
        texts = preferences(generator, STYLE, items, summaries, plan, s) if s.summary_mode != "none" else {}
        store.close()
        known, shown = Preferences(texts, plan, items, STYLE, s), settings.recommend.use_image
        rng = np.random.default_rng(len(variant))
        return np.array([
            [
                self.answer(recommend_prompt(
                    STYLE, known.of(user, LENGTH), items.title(item), items.image(item) if shown else None
                )) + rng.normal()
                for item in asked
            ]
            for user, asked in self.asked.items()
        ])  # fmt: skip


@pytest.mark.parametrize("truth", MATTERS)
def test_the_section_says_of_each_control_whether_it_was_planted_to_matter(truth, tmp_path):
    world = World(truth)
    for label in ("Pop", *SETS["controls"]):
        planted = world.scores(label.partition(":")[2], tmp_path) if label != "Pop" else None
        kind = "baseline" if label == "Pop" else "mllm"
        append(tmp_path / "runs.jsonl", plant_run(tmp_path, label, 0.0, kind, n_users=USERS, scores=planted))
    board = render(tmp_path)
    found = {use.variant.partition(":")[2]: use for use in uses(board)}
    assert len(found) == len(SETS["controls"]) - 1
    assert {name for name, use in found.items() if use.verdict == "matters"} == MATTERS[truth]
    assert all(use.verdict in ("matters", "n.s.") for use in found.values())
    told = json.loads((tmp_path / "leaderboard.json").read_text())["uses"]
    assert [use["variant"] for use in told] == [use.variant for use in uses(board)]
    pages = [unescape((tmp_path / f"leaderboard.{end}").read_text()) for end in ("md", "html")]
    pages.append(" ".join(format_table(read_leaderboard(tmp_path)).split()))
    pages.append((tmp_path / "leaderboard.tex").read_text().replace("$-$", "−").replace("{[}", "[").replace("{]}", "]"))
    sheet = pd.read_csv(tmp_path / "leaderboard-uses.csv").set_index("variant")
    assert list(sheet.index) == [use.variant for use in uses(board)]
    for name, use in found.items():
        line = sheet.loc[use.variant]
        assert (line["difference"], line["low"], line["high"]) == pytest.approx((use.difference, *use.ci95))
        assert (line["verdict"], line["sentence"]) == (use.verdict, use.sentence)
        assert use.tested_against == "MLLMMSR" and use.ci95[0] <= use.difference <= use.ci95[1]
        assert (use.p_raw < 0.05) == (not use.ci95[0] <= 0 <= use.ci95[1])
        words = "matters here: −" if name in MATTERS[truth] else "is not shown to matter by these 150 users: "
        assert use.sentence.startswith(f"{VARIANTS[name].part} {words}")
        assert ("n.s. (p = " in use.sentence) != (name in MATTERS[truth])
        sentence = use.sentence.replace("<", "\\textless{}")
        assert all(use.sentence in page or sentence in page for page in pages)


def test_a_part_that_does_harm_is_said_to_and_without_a_full_model_there_is_no_section(tmp_path):
    runs = [plant_run(tmp_path, "MLLMMSR", 0.3, "mllm"), plant_run(tmp_path, "MLLMMSR:no-image", 2.5, "mllm")]
    (use,) = uses(build(runs, tmp_path))
    assert use.verdict == "harms" and use.sentence.startswith("The candidate's image does harm here: +0.")
    assert not uses(build(runs[1:], tmp_path))


def test_each_variant_says_what_it_takes_away():
    assert part_of("MLLMMSR:block-2") == "The size of a block, against 2,"
    assert part_of("MLLMMSR:of-tomorrow") == "What of-tomorrow changes"
