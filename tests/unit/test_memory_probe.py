"""Whether a model knows a dataset: one that is planted to is found out, one that is not is cleared."""

import json
import random
import re
from pathlib import Path

import planned_server
import pytest
import small_world
from planted_runs import plant_run

from recbole_mllm.benchmark.memory_probe import (
    BEGINNING,
    BY_ID,
    GENRE,
    NEXT,
    YEAR,
    judge,
    memory_file,
    memory_of,
    questions_of,
    verdict,
)
from recbole_mllm.cli import main

WORDS = ["amber", "birch", "cedar", "delta", "ember", "frost", "grove", "heron", "inlet", "jetty", "knoll", "larch"]
GENRES = ["Comedy", "Drama", "Horror", "Western"]
ITEMS, USERS = 300, 80


@pytest.fixture
def folder(tmp_path):
    """Items with titles of four words, a year and one or two genres."""
    draw = random.Random(5)
    place = tmp_path / "films"
    place.mkdir()
    rows = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    for n in range(ITEMS):
        title, genres = " ".join(draw.sample(WORDS, 4)), " ".join(draw.sample(GENRES, draw.choice((1, 2))))
        rows.append(f"{n}\t{title}\t{draw.randrange(1930, 2000)}\t{genres}")
    (place / "films.item").write_text("\n".join(rows) + "\n")
    return place


@pytest.fixture
def histories():
    draw = random.Random(6)
    return {f"u{n}": [str(item) for item in draw.sample(range(ITEMS), 12)] for n in range(USERS)}


def found(questions, answers):
    return {finding.kind: finding for finding in judge(questions, answers)}


def test_a_model_that_knows_all_is_found_out_and_one_that_knows_one_kind_is_in_that_kind(folder, histories):
    questions = questions_of("films", folder, "item_id", histories, 7, 60)
    kinds = [BEGINNING, BY_ID, YEAR, GENRE, NEXT]
    assert list(found(questions, [q.truth[0] for q in questions])) == kinds
    for kind, finding in found(questions, [f"It is {q.truth[0]}." for q in questions]).items():
        assert (finding.asked, finding.right, finding.rate) == (60, 60, 1.0) and finding.ci95[0] > 0.9, kind
        assert finding.p < 1e-6 and finding.chance < 0.7
    answers = [q.truth[0] if q.kind == YEAR else "I do not know" for q in questions]
    assert verdict("m", judge(questions, answers)).startswith("Asked without any history, m knows this dataset (year):")


@pytest.mark.parametrize("kind", ["guesses", "always the same", "refuses", "names everything"])
def test_a_model_that_does_not_know_does_no_better_than_chance(folder, histories, kind):
    draw = random.Random(8)
    questions = questions_of("films", folder, "item_id", histories, 7, 60)
    said = {
        "guesses": lambda q: draw.choice([other for other in questions if other.kind == q.kind]).truth[0],
        "always the same": lambda q: next(other for other in questions if other.kind == q.kind).truth[0],
        "refuses": lambda q: "I am sorry, I cannot know that.",
        "names everything": lambda q: "A B " + " ".join([*WORDS, *GENRES]) + " 1950 1960",
    }[kind]
    findings = found(questions, [said(q) for q in questions])
    assert "is not shown to know this dataset" in verdict("m", list(findings.values()))
    assert findings[NEXT].chance == 0.5
    unclear = f"of {findings[NEXT].asked} ({findings[NEXT].asked} answers say neither A nor B), by chance"
    assert (unclear in verdict("m", list(findings.values()))) == (kind == "refuses")
    if kind == "names everything":
        assert findings[GENRE].rate == findings[GENRE].chance == 1.0, "whoever says all is always right, by chance"


def test_what_is_asked_holds_no_history_and_depends_on_the_seed_alone(folder, histories):
    questions = questions_of("films", folder, "item_id", histories, 7, 20)
    turned = dict(reversed(histories.items()))
    assert questions_of("films", folder, "item_id", turned, 7, 20) == questions
    assert questions_of("films", folder, "item_id", histories, 8, 20) != questions
    for q in (q for q in questions if q.kind == NEXT):
        user, *pair = re.search(r"user (\w+) take next: A, item (\d+), or B, item (\d+)", q.prompt.text).groups()
        right = pair["AB".index(q.truth[0])]
        (wrong,) = set(pair) - {right}
        assert histories[user][-1] == right and wrong not in histories[user]
    assert {q.truth[0] for q in questions if q.kind == NEXT} == {"A", "B"}
    for q in (q for q in questions if q.kind == BEGINNING):
        assert q.truth[0] not in q.prompt.text and " ".join(q.truth[0].split()[:2]) in q.prompt.text


def test_a_dataset_without_years_or_titles_of_several_words_is_asked_about_what_it_has(folder, histories):
    (folder / "films.item").write_text("item_id:token\ttitle:token_seq\n1\tOne\n2\tTwo\n")
    assert {q.kind for q in questions_of("films", folder, "item_id", histories, 7, 9)} == {BY_ID, NEXT}


def test_a_title_is_known_without_the_year_and_the_article_of_a_catalogue(folder, histories):
    titles = ["Toy Story (1995)", "Godfather, The (1972)", "Heat (1995)", "Usual Suspects, The (1995)", "2001"]
    rows = [f"{n}\t{title}\n" for n, title in enumerate(titles)]
    (folder / "films.item").write_text("item_id:token\ttitle:token_seq\n" + "".join(rows))
    questions = questions_of("films", folder, "item_id", {}, 7, 9)
    asked = {kind: {q.truth[0] for q in questions if q.kind == kind} for kind in (BEGINNING, BY_ID)}
    assert asked[BEGINNING] == {"Toy Story", "Usual Suspects"}, "no beginning gives the whole title away"
    assert asked[BY_ID] == {"Toy Story", "Godfather", "Heat", "Usual Suspects", "2001"}
    answers = {"Toy Story": "Toy Story", "Godfather": 'It is "The Godfather" (1972).', "Heat": "Heat, by Michael Mann"}
    assert all(q.is_answered(answers.get(q.truth[0], q.truth[0])) for q in questions)
    assert not any(q.is_answered("The (1995)") for q in questions)


def test_whoever_repeats_the_question_knows_nothing(folder, histories):
    """The year is in the title, the genre too, and the ids are not the first column."""
    draw = random.Random(9)
    rows = ["movie_title:token_seq\titem_id:token\trelease_year:token\tclass:token_seq"]
    for n in range(ITEMS):
        year, genre = draw.randrange(1930, 2000), draw.choice(GENRES)
        title = f"1001 {' '.join(draw.sample(WORDS, 3))}, 1900, a {genre} of {year}" if n % 2 else draw.choice(WORDS)
        title += "" if n % 2 else f" ({year})"
        rows.append(f"{title}\t{n}\t{year}\t{genre}")
    (folder / "films.item").write_text("\n".join(rows) + "\n")
    questions = questions_of("films", folder, "item_id", histories, 7, 60)
    parrot = found(questions, [q.prompt.text for q in questions])
    assert list(parrot) == [BEGINNING, BY_ID, YEAR, GENRE, NEXT]
    assert all(finding.right == 0 for kind, finding in parrot.items() if kind != NEXT) and parrot[NEXT].p > 0.05
    assert all(re.search("with the id .?[0-9]+.? in", q.prompt.text) for q in questions if q.kind == BY_ID)


def test_the_command_asks_once_and_a_leaderboard_tells(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    place = small_world.write(tmp_path / "dataset", images=False)
    titles = {small_world.item(n): f"title of {small_world.item(n)}" for n in range(small_world.ITEMS)}

    def remembers(_: int, text: str) -> planned_server.Reply | None:
        item = re.search(r"with the id (\w+)", text)
        return planned_server.completion(titles[item[1]]) if item else None

    with planned_server.serving(planned_server.Planned(plan=remembers)) as server:
        words = ["probe-memory", "steps", "--questions=20", f"--mllm=server:m@{server.url}", "--finetune=none"]
        words += ["--server_key_env=null"]
        assert main(words) == 0
        asked = len(server.bodies)
        told = capsys.readouterr().out
        assert main(words) == 0 and len(server.bodies) == asked, "answers come from the store"
    assert capsys.readouterr().out == told
    assert told.startswith("Asked without any history, server:m knows this dataset (title from its id):")
    assert not any("history" in text for text in server.texts())
    known = json.loads(memory_file(place).read_text())
    assert list(known) == ["server:m"]
    config = {"data_path": str(place), "provenance": {"weights": {"mllm": "server:m"}}}
    record = plant_run(tmp_path / "results", "MLLMMSR", 1.0, kind="mllm", config=config)
    assert memory_of([record]) == {"server:m": known["server:m"] | {"verdict": told.splitlines()[0]}}
    (Path("results") / "runs.jsonl").write_text(record.to_line() + "\n")
    assert main(["report", "results"]) == 0
    pages = [Path("results", f"leaderboard.{form}").read_text() for form in ("md", "html", "json")]
    assert all("knows this dataset (title from its id)" in page for page in [*pages, capsys.readouterr().out])
    (by_id,) = [one for one in json.loads(pages[2])["memory"]["server:m"]["findings"] if one["kind"] == BY_ID]
    assert (by_id["right"], by_id["rate"]) == (by_id["asked"], 1.0)
    whole = memory_file(place).read_text()
    for damaged in (whole.replace('"kind"', '"sort"'), whole.replace('"findings"', '"found"'), "[1, 2]", whole[:-9]):
        memory_file(place).write_text(damaged)
        assert memory_of([record]) == {} and main(["report", "results"]) == 0
    memory_file(place).write_text(whole)
    other = ["--questions=20", "--mllm=server:big@http://127.0.0.1:9", "--finetune=none", "--user_summarizer=tiny"]
    capsys.readouterr()
    assert main(["probe-memory", "steps", *other, "--prompt_style=demo"]) == 0
    assert "not asked: server:big@http://127.0.0.1:9, which ranks; ask it with" in capsys.readouterr().out
    assert main(["probe-memory", "steps", "--questions=20", "--mllm=tiny", "--prompt_style=demo"]) == 0
    assert "is not shown to know this dataset" in capsys.readouterr().out
    assert len(json.loads(memory_file(place).read_text())) == 2
    out = tmp_path / "dataset" / "halved"
    assert main(["split", str(place), "--protocol", "temporal", "--out", str(out)]) == 0
    assert memory_file(out).read_bytes() == memory_file(place).read_bytes()
    with planned_server.serving(planned_server.Planned(plan=remembers)) as server:
        again = ["probe-memory", "halved", "--questions=4", f"--mllm=server:n@{server.url}", *words[-2:]]
        assert main(again) == 0 and all("dataset steps" in text for text in server.texts())
        assert main([*again, "--name", "Steps-100K"]) == 0
        assert any("dataset Steps-100K" in text for text in server.texts())
