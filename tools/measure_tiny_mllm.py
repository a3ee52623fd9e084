"""Measure the bundled tiny MLLM on demo worlds it never saw: `python tools/measure_tiny_mllm.py --seeds 1 2 3`.

Prints one JSON line for each world: captions and summaries against the planted truth; AUC over one target and 20 unseen
items before and after LoRA, each ablation trained likewise; and what the true taste and popularity reach.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import fmean, stdev

import torch
from tiny_mllm import sentences
from tiny_mllm.language import demo_style
from tiny_mllm.reader import Reader
from tiny_mllm.settings import SHIPPED

from recbole_mllm.common.prompts import (
    Prompt,
    Style,
    image_summary_prompt,
    item_line,
    preference_prompt,
    recommend_prompt,
    titles_as_preference,
)
from recbole_mllm.demo.attributes import FIELDS, VISIBLE
from recbole_mllm.demo.world import World, demo_world, item_id, write_demo_dataset

BLOCK, NEGATIVES = 4, 20
Moment = tuple[int, int, int]  # user, how many interactions the summary has read, item


@dataclass(slots=True)
class Study:
    """One world, the reader, and what the reader has written about it."""

    world: World
    style: Style
    reader: Reader
    images: list[Path]
    captions: list[str]
    summaries: list[dict[int, str]]  # by user, then by how many interactions were read

    def prompt(self, moment: Moment, *, image: bool = True, summary: bool = True) -> Prompt:
        """Return the question about one item at one moment of a user."""
        user, seen, item = moment
        preference = self.summaries[user][seen] if summary else self.style.cold
        title = self.world.items[item].title
        return recommend_prompt(self.style, preference, title, self.images[item] if image else None)

    def candidates(self) -> list[list[int]]:
        """Return each user's target and 20 items never taken."""
        rng, everything = Random(self.world.seed), range(len(self.world.items))
        return [
            [user.history[-1], *rng.sample([n for n in everything if n not in user.history], NEGATIVES)]
            for user in self.world.users
        ]

    def training(self) -> list[tuple[Moment, str]]:
        """Return positives of the training part and one negative for each, with their answers."""
        rng, pairs = Random(5), []
        warm = [n for n in range(len(self.world.items)) if n not in self.world.cold]
        for number, user in enumerate(self.world.users):
            part = user.history[:-2]
            others = [n for n in warm if n not in part]
            for place, item in enumerate(part):
                if seen := place // BLOCK * BLOCK:
                    pairs.append(((number, seen, item), self.style.answer_yes))
                    pairs.append(((number, seen, rng.choice(others)), self.style.answer_no))
        return pairs


def study(seed: int, model: Path, folder: Path) -> Study:
    """Build the world of `seed` in `folder` and let the reader caption its items and summarise its users."""
    write_demo_dataset(folder, seed)
    world, style = demo_world(seed), demo_style()
    images = [folder / "images" / f"{item_id(n)}.png" for n in range(len(world.items))]
    reader = Reader.load(model, images)
    captions = reader.write([image_summary_prompt(style, image) for image in images])
    lines = [item_line(style, item.title, caption) for item, caption in zip(world.items, captions, strict=True)]
    summaries: list[dict[int, str]] = [{} for _ in world.users]
    histories = [user.history[:-1] for user in world.users]
    for start in range(0, max(map(len, histories)), BLOCK):
        users = [number for number, history in enumerate(histories) if start < len(history)]
        blocks = [histories[number][start : start + BLOCK] for number in users]
        asked = [
            preference_prompt(style, [lines[n] for n in block], summaries[number].get(start))
            for number, block in zip(users, blocks, strict=True)
        ]
        for number, block, text in zip(users, blocks, reader.write(asked), strict=True):
            summaries[number][start + len(block)] = text
    return Study(world, style, reader, images, captions, summaries)


def caption_shares(study: Study) -> dict[str, float]:
    """Return the share of captions that name each visible attribute."""
    read = [sentences.parse_caption(caption) or {} for caption in study.captions]
    return {
        field: fmean(told.get(field) == item.traits[field] for told, item in zip(read, study.world.items, strict=True))
        for field in VISIBLE
    }


def summary_shares(study: Study) -> dict[str, object]:
    """Return how many summaries parse, follow the rule, and name the dominant value of the last eight items."""
    rule: dict[str, list[bool]] = {field: [] for field in FIELDS}
    dominant: dict[str, list[bool]] = {field: [] for field in FIELDS}
    parsed = []
    for user, states in zip(study.world.users, study.summaries, strict=True):
        previous, start = None, 0
        for seen, text in states.items():
            told = sentences.parse_preference(text)
            parsed.append(told is not None and len(told) == len(FIELDS))
            block = [study.world.items[n].traits for n in user.history[start:seen]]
            right = sentences.summarize(block, previous)
            previous, start = told or {}, seen
            for field in FIELDS:
                rule[field].append(previous.get(field) == right[field])
        for field in FIELDS:
            votes = Counter(study.world.items[n].traits[field] for n in user.history[:-1][-8:])
            dominant[field].append(votes[(previous or {}).get(field, "")] == max(votes.values()))
    shares = {"rule": rule, "dominant_last8": dominant}
    means = {name: {field: fmean(hits) for field, hits in by.items()} for name, by in shares.items()}
    return {"count": len(parsed), "parsed": fmean(parsed), **means}


def auc(study: Study, scores: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return the mean AUC over users, its standard error, and the mean for warm and for cold targets."""
    each = [fmean((row[0] > other) + 0.5 * (row[0] == other) for other in row[1:]) for row in scores]
    cold = [user.history[-1] in study.world.cold for user in study.world.users]
    return {
        "all": fmean(each),
        "se": stdev(each) / len(each) ** 0.5,
        "warm": fmean(value for value, is_cold in zip(each, cold, strict=True) if not is_cold),
        "cold": fmean(value for value, is_cold in zip(each, cold, strict=True) if is_cold),
    }


def rankings(study: Study, lr: float) -> dict[str, dict[str, float]]:
    """Return the AUC of everything that can rank the candidates."""
    world, candidates = study.world, study.candidates()
    asked = [(u, max(study.summaries[u]), n) for u, row in enumerate(candidates) for n in row]
    pairs = study.training()

    def scored(reader: Reader, prompts: Sequence[Prompt]) -> dict[str, float]:
        flat = reader.yes_scores(prompts)
        return auc(study, [flat[i : i + 1 + NEGATIVES] for i in range(0, len(flat), 1 + NEGATIVES)])

    def trained(ask: Callable[[Moment], Prompt]) -> Reader:
        return study.reader.finetuned([ask(moment) for moment, _ in pairs], [answer for _, answer in pairs], lr=lr)

    counts = Counter(n for user in world.users for n in user.history[:-2])
    tastes = [user.taste for user in world.users]
    result = {
        "oracle_taste": auc(
            study, [[world.utility(t, world.items[n]) for n in c] for t, c in zip(tastes, candidates, strict=True)]
        ),
        "pop": auc(study, [[counts[n] for n in row] for row in candidates]),
        "zero_shot": scored(study.reader, [study.prompt(moment) for moment in asked]),
        "zero_shot_titles": scored(study.reader, [_by_titles(study, moment) for moment in asked]),
    }
    full = trained(study.prompt)
    result["sft"] = scored(full, [study.prompt(moment) for moment in asked])
    other = list(range(len(tastes)))
    Random(3).shuffle(other)
    result["sft_anothers_summary"] = scored(full, [_with_summary_of(study, other[m[0]], m) for m in asked])
    for name, ask in {
        "sft_no_image": lambda moment: study.prompt(moment, image=False),
        "sft_no_summary": lambda moment: study.prompt(moment, summary=False),
    }.items():
        result[name] = scored(trained(ask), [ask(moment) for moment in asked])
    return result


def _by_titles(study: Study, moment: Moment) -> Prompt:
    user, _, item = moment
    titles = [study.world.items[n].title for n in study.world.users[user].history[:-1][-10:]]
    preference = titles_as_preference(study.style, titles)
    return recommend_prompt(study.style, preference, study.world.items[item].title, study.images[item])


def _with_summary_of(study: Study, other: int, moment: Moment) -> Prompt:
    return study.prompt((other, max(study.summaries[other]), moment[2]))


def rounded(value: object) -> object:
    """Return `value` with all numbers in it at four places."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def main() -> None:
    """Measure every world asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--texts_only", action="store_true", help="captions and summaries, no ranking")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for seed in arguments.seeds:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            found = study(seed, arguments.model, Path(scratch) / "world")
        record = {"seed": seed, "captions": caption_shares(found), "summaries": summary_shares(found)}
        if not arguments.texts_only:
            record |= {"auc": rankings(found, arguments.lr), "lr": arguments.lr}
        print(json.dumps(rounded(record | {"seconds": time.perf_counter() - start})), flush=True)


if __name__ == "__main__":
    main()
