"""Does a language model know this dataset? Questions about its items and users, asked without any user's history.

The command ``probe-memory`` asks them, through the dataset's store; what they show stands beside the dataset. Who
answers them better than chance has met the dataset, or what it is about, in training: what such a model recommends may
be remembered.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from recbole_mllm.benchmark.leaderboard import LEVEL
from recbole_mllm.benchmark.records import RunRecord
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.files import write_text
from recbole_mllm.common.progress import warn_once
from recbole_mllm.common.prompts import CLOSE, OPEN, Prompt
from recbole_mllm.common.settings import Settings
from recbole_mllm.data.atomic import read_columns, read_numbered
from recbole_mllm.data.histories import user_of
from recbole_mllm.data.sampling import hash64, sample_users
from recbole_mllm.data.schema import item_file, title_column
from recbole_mllm.mllm.interface import Decoding

COUNT = 100  # questions of a kind
_TOKENS = 32  # of an answer: a title
BEGINNING, BY_ID, YEAR, GENRE, NEXT = "title from its beginning", "title from its id", "year", "genre", "next item"
_WORDING = {
    BEGINNING: 'The dataset {dataset} has an item whose title begins with "{given}". Write its whole title and nothing '
    "else.",
    BY_ID: "What is the title of the item with the id {given} in the dataset {dataset}? Write the title and nothing "
    "else.",
    YEAR: 'In which year did "{given}" appear, an item of the dataset {dataset}? Write the year and nothing else.',
    GENRE: 'Which genre has "{given}", an item of the dataset {dataset}? Write the genre and nothing else.',
    NEXT: "In the dataset {dataset}, which of two items did {given}? Answer A or B and nothing else.",
}
_COLUMNS = {
    YEAR: ("year", "release_year"),
    GENRE: ("genre", "genres", "class", "category", "categories"),
}  # of .item
_CATALOGUED = re.compile(r"(,\s(the|an?|les?|la|l'|il|lo|der|die|das|el|los|las))?(\s*\(\d{4}\))?\s*$", re.IGNORECASE)
_YEAR = re.compile(r"(?<!\d)(?:1[5-9]|20)\d\d(?!\d)")


@dataclass(frozen=True, slots=True)
class Probe:
    """A question of a kind, and any of the answers that are right."""

    kind: str
    prompt: Prompt
    truth: tuple[str, ...]

    def is_answered(self, answer: str) -> bool:
        """Return whether `answer` is right."""
        if self.kind == NEXT:
            return _side(answer) in self.truth
        if self.kind == YEAR:
            return next(iter(_YEAR.findall(answer)), None) in self.truth
        return any(f" {_plain(one)} " in f" {_plain(answer)} " for one in self.truth)

    @property
    def is_given_away(self) -> bool:
        """Whether a right answer stands in the question."""
        years = _YEAR.findall(self.prompt.text)
        return any(year in self.truth for year in years) if self.kind == YEAR else self.is_answered(self.prompt.text)


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """How many questions of a kind were answered rightly, with the exact 95 % interval of the rate, beside chance.

    `p` is that of so many right answers, or more, by chance. `unclear` of the answers to A or B named neither.
    """

    kind: str
    asked: int
    right: int
    rate: float
    ci95: tuple[float, float]
    chance: float
    p: float
    unclear: int = 0

    @classmethod
    def of(cls, questions: Sequence[Probe], answers: Sequence[str]) -> ProbeResult:
        """Compare the `answers` to `questions` of one kind with the same answers dealt to the other questions.

        So an answer that is often right, whatever is asked, is what chance gives; at least one in as many truths.
        """
        right = sum(q.is_answered(a) for q, a in zip(questions, answers, strict=True))
        others = len(questions) * (len(questions) - 1)
        dealt = sum(q.is_answered(a) for i, q in enumerate(questions) for j, a in enumerate(answers) if i != j)
        chance = max(dealt / max(1, others), 1 / len({q.truth for q in questions}))
        unclear = 0
        if questions[0].kind == NEXT:
            chance = 0.5  # as its sides are drawn
            unclear = sum(_side(answer) is None for answer in answers)
        test = binomtest(right, len(questions), chance, alternative="greater")
        low, high = binomtest(right, len(questions)).proportion_ci(0.95)
        rate, p = test.statistic, float(test.pvalue)
        return cls(questions[0].kind, len(questions), right, rate, (low, high), chance, p, unclear)

    def __str__(self) -> str:
        low, high = self.ci95
        unclear = f" ({self.unclear} answers say neither A nor B)" if self.unclear else ""
        rate = f"{self.rate:.1%} [{low:.1%}, {high:.1%}]"
        return f"{self.kind} {rate} of {self.asked}{unclear}, by chance {self.chance:.1%}"


def judge(questions: Sequence[Probe], answers: Sequence[str]) -> list[ProbeResult]:
    """Return what the `answers` show, kind by kind."""
    both = list(zip(questions, answers, strict=True))
    kinds = dict.fromkeys(question.kind for question in questions)
    return [ProbeResult.of(*zip(*(one for one in both if one[0].kind == kind), strict=True)) for kind in kinds]


def verdict(model: str, findings: Sequence[ProbeResult]) -> str:
    """Return the sentence that `findings` about `model` support, p corrected for how many kinds were asked."""
    rates = "; ".join(map(str, findings))
    kinds = [finding.kind for finding in findings if finding.p < LEVEL / len(findings)]
    if kinds:
        return f"Asked without any history, {model} knows this dataset ({', '.join(kinds)}): {rates}."
    return f"Asked without any history, {model} is not shown to know this dataset: {rates}."


def probe_memory(config: Any, count: int = COUNT, name: str | None = None) -> list[str]:
    """Ask the model that writes the user summaries of a run of `config`; return what it shows, for people.

    Args:
        config: RecBole's.
        count: Questions of each kind.
        name: What the dataset is called where a model may have read of it; None: as its folder, or what that was split
            from.

    Raises:
        UserError: The model cannot be loaded, or the dataset has nothing to ask about.
    """
    from recbole.utils import init_seed

    from recbole_mllm.model.summarizers import make_summary_setup
    from recbole_mllm.quick_start import read_and_split
    from recbole_mllm.summaries.generator import user_generator
    from recbole_mllm.summaries.store import opened_store

    init_seed(config["seed"], config["reproducibility"])
    for key, value in {"use_image": False, "item_summary": "text", "control": None, "summarize": "auto"}.items():
        config[key] = value  # nothing is summarised, and no image shown
    config["eval_args"] = {**config["eval_args"], "mode": {"valid": "full", "test": "full"}}  # no candidates are drawn
    settings = Settings.from_config(config)
    _, (train, *_) = read_and_split(config)
    setup = make_summary_setup(config, settings, config["device"])
    histories = {user_of(name): items for name, items in train._dataset.histories.items()}
    asked_of = name or _name_of(setup.folder), setup.folder, config["ITEM_ID_FIELD"]
    questions = questions_of(*asked_of, histories, config["seed"], count)
    if not questions:
        raise UserError(f"{item_file(setup.folder)} has no titles to ask about, and no user's items are known")
    decoding = Decoding(_TOKENS, rules=setup.summarizers["user"].rules)
    with closing(opened_store(setup.folder)) as store:
        generator = replace(user_generator(setup, store), kind="probe", decoding=decoding)
        with generator.progress(len(questions)):
            answers = generator.answer([question.prompt for question in questions])
    model, findings = settings.mllm.identity("user_summarizer"), judge(questions, answers)
    path = memory_file(setup.folder)
    known = {"seed": config["seed"], "findings": [asdict(finding) for finding in findings]}
    write_text(path, json.dumps(read_memory(path) | {model: known}, indent=2) + "\n")
    said = [verdict(model, findings), f"written: {path}; a leaderboard of this model on this dataset says so too"]
    if config["mllm"] and settings.mllm.identity("mllm") != model:
        said.append(f"not asked: {config['mllm']}, which ranks; ask it with --user_summarizer={config['mllm']}")
    return said


# ---- the questions


def questions_of(
    dataset: str, folder: Path, field: str, histories: Mapping[str, Sequence[str]], seed: int, count: int = COUNT
) -> list[Probe]:
    """Return up to `count` questions of each kind that the files in `folder` have the answers to.

    None is a question that whoever repeats it has answered: a film's year may stand in its title.

    Args:
        dataset: The name it is asked about by.
        folder: Has its ``.item`` file.
        field: The name of the items' ids there.
        histories: Each user's items, oldest first.
        seed: Draws items, users and sides.
        count: Of each kind.
    """
    path = item_file(folder)
    columns = read_columns(path)
    title = title_column(columns)
    rows = {row[field]: row for _, row in read_numbered(path)} if title and field in columns else {}
    titles = {item: _bare(row[title]) for item, row in rows.items() if title and row[title].strip()}

    def about(kind: str, given: str, truth: Collection[str]) -> Probe:
        text = _WORDING[kind].format(dataset=dataset, given=f"{OPEN}{given}{CLOSE}")
        return Probe(kind, Prompt(text), tuple(truth))

    def probe(kind: str, item: str) -> Probe | None:
        if kind in (BEGINNING, BY_ID):
            given, truth = item if kind == BY_ID else _half(titles[item]), [titles[item]]
        else:
            name = next(name for name in _COLUMNS[kind] if name in columns)
            given, truth = titles[item], _values(rows[item][name], kind, columns[name])
        return about(kind, given, truth) if given and truth else None

    kinds = [BEGINNING, BY_ID, *(kind for kind, names in _COLUMNS.items() if any(name in columns for name in names))]
    out = []
    for kind in kinds:
        asked = (probe(kind, item) for item in _drawn(titles, kind, seed))
        out += list(islice((one for one in asked if one and not one.is_given_away), count))
    for user, side, pair in _pairs(histories, seed, count):
        out.append(about(NEXT, f"user {user} take next: A, item {pair[0]}, or B, item {pair[1]}", [side]))
    return out


def _name_of(folder: Path) -> str:
    """Return the name of the dataset in `folder`; where `split` wrote it, of the one that was split."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["converter"] == "split":
            return str(manifest["inputs"][0]["file"]).removesuffix(".inter")
    return folder.name


def _drawn(items: Iterable[str], kind: str, seed: int) -> list[str]:
    return sorted(items, key=lambda item: (hash64("probe", kind, seed, item), item))


def _bare(title: str) -> str:
    """Return a title without the year, and the article moved to its end, that catalogues write and people do not."""
    return _CATALOGUED.sub("", title).strip() or title


def _half(title: str) -> str:
    """Return the first half of a title's words; "" where it has too few to leave something to know."""
    words = title.split()
    return " ".join(words[: len(words) // 2])


def _values(text: str, kind: str, column: str) -> list[str]:
    """Return the years or genres in a column of ``.item``, which a token_seq separates by spaces."""
    if kind == YEAR:
        return _YEAR.findall(text)[:1]
    return text.split() if column == "token_seq" else [one for one in re.split(r"[|,;]", text) if _plain(one)]


def _pairs(histories: Mapping[str, Sequence[str]], seed: int, count: int) -> Iterator[tuple[str, str, tuple[str, str]]]:
    """Yield a user, the side (A or B) of their last item, and both items: the other one is drawn by popularity."""
    every = sorted(item for items in histories.values() for item in items)
    users = sample_users(histories, count, seed)
    for user in sorted(user for user in users if set(histories[user]) < set(every)):
        draw, own = random.Random(hash64("probe", NEXT, seed, user)), set(histories[user])
        other = draw.choice(every)
        while other in own:
            other = draw.choice(every)
        pair = (histories[user][-1], other)
        side = draw.choice("AB")
        yield user, side, pair if side == "A" else pair[::-1]


def _side(answer: str) -> str | None:
    """Return the first of A and B that an answer names."""
    return next(iter(re.findall(r"\b[AB]\b", answer)), None)


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


# ---- what a leaderboard says of it


def memory_file(folder: Path) -> Path:
    """Return the file of what models have shown to know of the dataset in `folder`."""
    return folder / f"{folder.name}.memory.json"


def memory_of(records: Iterable[RunRecord]) -> dict[str, dict[str, Any]]:
    """Return what the models behind `records` have shown to know, from beside their dataset: findings and verdict."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        place = record.config.get("data_path")
        known = read_memory(memory_file(Path(str(place)))) if place and record.weights else {}
        for model in record.weights.values():
            if model in known:
                try:
                    said = verdict(model, [ProbeResult(**finding) for finding in known[model]["findings"]])
                except (KeyError, TypeError):
                    path = memory_file(Path(str(place)))
                    warn_once(f"{path}: the entry of {model} cannot be read; run probe-memory again")
                else:
                    found[model] = {**known[model], "verdict": said}
    return found


def read_memory(path: Path) -> dict[str, Any]:
    """Return what `probe_memory` has written to `path`, by model; nothing where there is no such file."""
    with suppress(OSError, ValueError, TypeError):
        return dict(json.loads(path.read_text(encoding="utf-8")))
    return {}
