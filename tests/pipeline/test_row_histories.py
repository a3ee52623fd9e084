"""What each row's prompt has read is that row's own list: told by a server that answers with the items it was shown."""

import random
import re
from collections import Counter

import pytest
from echoed_prompts import EVALUATION, echoing, prompts_of, read, shown, told, write_items

from recbole_mllm.common.errors import UserError
from recbole_mllm.quick_start import make_config

pytest.importorskip("openai")


@pytest.fixture(scope="module")
def url():
    with echoing() as planned:
        yield planned.url


def walks(users=8, length=9):
    """Users' items in order; users have items in common, none stands twice in a walk."""
    return {f"u{user}": [f"i{user * 2 + place}" for place in range(length)] for user in range(users)}


def rows_of(world, seed=0):
    """Return the rows of each part as (user, target, list)."""
    rng = random.Random(seed)
    parts = {"train": [], "valid": [], "test": []}
    for user, walk in walks().items():
        last = len(walk) - 1
        for place in range(1, len(walk)):
            part = {last: "test", last - 1: "valid"}.get(place, "train")
            if world in ("windows", "shuffled"):
                parts[part].append((user, walk[place], walk[max(0, place - 3) : place]))
            elif world == "beginnings":
                parts[part].append((user, walk[place], walk[:place]))
            elif world == "sessions":  # the second begins with the last item of the first, and then as the first did
                second = [walk[3], walk[0], *walk[4:]]
                own, at = (walk[:4], place) if place < 4 else (second, place - 3 + 1)
                parts[part].append((user, own[at] if at < len(own) else walk[last], own[:at]))
            elif world == "one a user" and place == last:
                parts[("train", "valid", "test")[int(user[1:]) % 3]].append((user, walk[last], walk[:last]))
    if world == "odd":
        for user, walk in walks().items():
            parts["train"] += [
                (user, walk[5], walk[:3]),  # one list twice, with two targets
                (user, walk[6], walk[:3]),
                (user, walk[0], walk[:1]),  # an item taken again
                (user, walk[2], [walk[0], walk[3], walk[2]]),
                (user, walk[1], [walk[0], walk[0]]),
            ]
            parts["valid"].append((user, walk[7], [*walk[:3], walk[6]]))
            parts["test"].append((user, walk[8], [walk[1], *walk[:3]]))
    if world == "shuffled":
        for rows in parts.values():
            rng.shuffle(rows)
    return parts


def write_listed(folder, parts, user="user_id", item="item_id"):
    folder.mkdir(parents=True)
    for part, rows in parts.items():
        lines = [f"{user}:token\t{item}:token\t{item}_list:token_seq"]
        lines += [f"{user}\t{target}\t{' '.join(listed)}" for user, target, listed in rows]
        (folder / f"{folder.name}.{part}.inter").write_text("\n".join(lines) + "\n")
    write_items(folder, {own for rows in parts.values() for _, t, listed in rows for own in (t, *listed)}, item)


def write_ties(folder, names):
    folder.mkdir(parents=True)
    user, item, time = names
    lines = [f"{user}:token\t{item}:token\t{time}:float"]
    lines += [f"{owner}\t{one}\t1700000000" for owner, walk in walks().items() for one in walk]
    (folder / f"{folder.name}.inter").write_text("\n".join(lines) + "\n")
    write_items(folder, {one for walk in walks().values() for one in walk}, item)


LISTED = {
    "benchmark_filename": ["train", "valid", "test"],
    "alias_of_item_id": ["item_id_list"],
    "load_col": {"inter": ["user_id", "item_id", "item_id_list"]},
}


MODES = {
    "recurrent": ({}, lambda own: own),
    "the last two": ({"max_history": 2}, lambda own: own[-2:]),
    "full blocks": ({"partial_block": False}, lambda own: own[: len(own) // 2 * 2]),
    "direct": ({"summary_mode": "direct"}, lambda own: own),
    "titles": ({"summary_mode": "none", "history_titles": 3}, lambda own: own[-3:]),
}
WORLDS = {
    "windows": MODES, "shuffled": ["recurrent"], "sessions": ["recurrent", "direct"], "beginnings": ["the last two"],
    "one a user": ["recurrent"], "odd": ["recurrent", "titles"],
}  # fmt: skip


@pytest.mark.parametrize("world", WORLDS)
def test_a_prompt_has_read_its_own_rows_list_and_nothing_else(tmp_path, url, world):
    parts = rows_of(world)
    write_listed(tmp_path / "win", parts)
    for mode in WORLDS[world]:
        keys, expected = MODES[mode]
        found = prompts_of(tmp_path / "win", url, **LISTED, **keys)
        truth = told((user, target, expected(own)) for rows in parts.values() for user, target, own in rows)
        assert told((user, target, read(text)) for user, target, text in found) == truth, mode


def test_leaving_one_out_a_prompt_has_read_what_stands_before_its_target_in_the_file(tmp_path, url):
    """All times are equal, so that the order is the file's alone."""
    write_ties(tmp_path / "ties", ("user_id", "item_id", "timestamp"))
    truth = told((user, item, walk[:n]) for user, walk in walks().items() for n, item in enumerate(walk) if n)
    for mode in ("recurrent", "full blocks"):
        keys, expected = MODES[mode]
        found = prompts_of(tmp_path / "ties", url, **keys)
        assert told((user, target, read(text)) for user, target, text in found) == Counter(
            {(user, item, tuple(expected(list(own)))): n for (user, item, own), n in truth.items()}
        ), mode


def test_the_export_names_each_state_once_and_a_refresh_asks_nothing(tmp_path, url):
    from recbole_mllm.summaries.chains import history_digest
    from recbole_mllm.summaries.summary_files import read_rows

    parts = rows_of("sessions")
    write_listed(tmp_path / "win", parts)
    prompts_of(tmp_path / "win", url, **LISTED)
    (path,) = (tmp_path / "win").glob("*.usum")
    rows = dict(read_rows(path, "user"))  # which refuses what stands there twice
    assert [place.owner for place in rows] == sorted(place.owner for place in rows)
    wanted = {(user, len(own), history_digest(own)) for own_rows in parts.values() for user, _, own in own_rows}
    assert wanted <= set(rows)
    assert all(place.history == history_digest(shown(text)) for place, (_, text) in rows.items())
    before = path.read_bytes()
    truth = prompts_of(tmp_path / "win", url, **LISTED, summarize="off")
    assert path.read_bytes() == before and len(truth) == sum(map(len, parts.values()))


def test_the_latest_training_rows_and_the_items_met_are_each_users_whatever_the_lists_show(tmp_path):
    from recbole_mllm.data.dataloader import training_pairs

    parts = rows_of("shuffled")
    write_listed(tmp_path / "win", parts)
    for path in (tmp_path / "win").glob("*.inter"):  # seconds apart, which float32 cannot tell
        header, *lines = path.read_text().splitlines()
        rows = (line.split("\t") for line in lines)
        timed = [f"{user}\t{item}\t{listed}\t{1_700_000_000 + int(item[1:])}" for user, item, listed in rows]
        path.write_text("\n".join([f"{header}\ttimestamp:float", *timed]) + "\n")
    keys = LISTED | {"load_col": {"inter": ["user_id", "item_id", "item_id_list", "timestamp"]}, "train_last_k": 2}
    dataset = dataset_of("MLLMMSR", tmp_path / "win", **keys)
    train, *_ = dataset.build()
    users, items = dataset.field2id_token["user_id"], dataset.field2id_token["item_id"]
    rows = zip(*(train.inter_feat[field].tolist() for field in ("user_id", "item_id")), strict=True)
    assert {(users[u], items[i]) for u, i in rows} == {(u, w[n]) for u, w in walks().items() for n in (5, 6)}
    met = {(users[u], items[i]) for u, i in training_pairs(train).tolist()}
    assert met == {(user, item) for user, walk in walks().items() for item in walk[:-2]}
    assert {user: set(items) for user, items in train.met.items()} == {u: set(w) for u, w in walks().items()}


def dataset_of(model, folder, **keys):
    from recbole.data import create_dataset

    base = {"data_path": str(folder.parent), "eval_args": EVALUATION, "train_neg_sample_args": None, "mllm": "tiny"}
    return create_dataset(make_config(model, folder.name, [], base | keys))


@pytest.mark.parametrize(
    ("columns", "keys", "words"),
    [
        (2, {}, r"win\.train\.inter:1: there is no column item_id_list:token_seq; benchmark files must list in it"),
        (3, {"load_col": {"inter": ["user_id", "item_id"]}}, "load_col does not name item_id_list"),
        (3, {"alias_of_item_id": None}, r"numbered apart .* set alias_of_item_id: \[item_id_list\]"),
    ],
)
def test_benchmark_files_without_usable_lists_say_what_they_need(tmp_path, columns, keys, words):
    write_listed(tmp_path / "win", rows_of("windows"))
    for path in (tmp_path / "win").glob("*.inter"):
        rows = (line.split("\t")[:columns] for line in path.read_text().splitlines())
        path.write_text("".join("\t".join(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=words):
        dataset_of("SASRec", tmp_path / "win", **(LISTED | keys))
    general = LISTED | {"load_col": {"inter": ["user_id", "item_id"]}, "alias_of_item_id": None}
    assert dataset_of("BPR", tmp_path / "win", **general).inter_num == 8 * 8


OWN = {"USER_ID_FIELD": "userID", "ITEM_ID_FIELD": "business_id", "TIME_FIELD": "date"}


def test_a_datasets_own_field_names_do_in_its_yaml(tmp_path, url):
    write_ties(tmp_path / "ties", OWN.values())
    (tmp_path / "ties/dataset.yaml").write_text("".join(f"{key}: {name}\n" for key, name in OWN.items()))
    found = prompts_of(tmp_path / "ties", url)
    truth = {(user, item): walk[:n] for user, walk in walks().items() for n, item in enumerate(walk) if n}
    assert {(user, target): read(text) for user, target, text in found} == truth
    assert all(shown(text)[0] == target for _, target, text in found)
    for model in ("SASRec", "BPR"):
        made = dataset_of(model, tmp_path / "ties")
        assert made.inter_num == 8 * 9 and made.time_field in made.inter_feat


def test_inspect_takes_field_names_from_config_files_and_keys(tmp_path, capsys):
    from recbole_mllm.cli import main

    write_ties(tmp_path / "ties", OWN.values())
    folder, page = str(tmp_path / "ties"), f"--output={tmp_path / 'page.html'}"
    assert main(["inspect", folder, page]) == 2
    assert "name yours with USER_ID_FIELD and ITEM_ID_FIELD" in capsys.readouterr().err
    (tmp_path / "own.yaml").write_text("".join(f"{key}: {name}\n" for key, name in OWN.items()))
    for words in (["--config_files", str(tmp_path / "own.yaml")], [f"--{key}={name}" for key, name in OWN.items()]):
        assert main(["inspect", folder, page, *words]) == 0
        assert re.search(r"interactions +72;", capsys.readouterr().out)
