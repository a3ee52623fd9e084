"""What changed is generated again, and nothing else; the export is that of a run from scratch, byte for byte."""

import random
from contextlib import closing
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import settings as settings_
from hypothesis import strategies as st
from summary_world import BASE, STYLE, World, random_histories

from benchmarks import refresh as refresh_benchmark
from recbole_mllm.common.errors import UserError
from recbole_mllm.data.schema import store_file
from recbole_mllm.summaries.chains import history_digest
from recbole_mllm.summaries.generator import item_generator
from recbole_mllm.summaries.store import ReadOnlyStore, Store, opened_store
from recbole_mllm.summaries.store_tools import prune

# One change


@pytest.fixture
def world(tmp_path):
    """Rows read u1's states at 1, 2, 3, u2's at 1, 2 and u3's at 1, 2, 3, 4; items are known by their images."""
    settings = replace(BASE, block_size=2, item_summary="image", max_history=None)
    histories = {"u1": "abcx", "u2": "cdx", "u3": "deabx"}  # the last one of each is a target
    made = World(tmp_path, histories, settings)
    for n, item in enumerate("abcdex"):
        made.paint(item, (50 * n, 10, 10))
    assert made.refresh() == (5, 9, []) and made.refresh() == (0, 0, [])
    return made


def test_what_a_prompt_shows_redoes_what_has_read_it_alone(world):
    world.paint("b", (1, 2, 3))
    assert world.refresh()[:2] == (1, 3)  # u1 from its second item on, u3 at its fourth
    world.paint("b", (50, 10, 10))  # as it was: known
    assert world.refresh()[:2] == (0, 0)
    world.titles["e"] = "another"
    assert world.refresh()[:2] == (0, 3)
    world.style = replace(STYLE, next_block=STYLE.next_block + " Be brief.")
    assert world.refresh()[:2] == (0, 1 + 0 + 2)  # second blocks: u1 at 3, u3 at 3 and 4
    world.style = replace(STYLE, image_summary=STYLE.image_summary + " Be brief.")
    assert world.refresh()[0] == 5
    world.identity = "n"
    assert world.refresh()[:2] == (5, 9)
    for item in "ab":
        world.paint(item, (9, 9, 9))
    assert world.refresh()[0] == 1  # one image under two names is described once


def test_another_history_redoes_what_lies_behind_the_change_alone(world):
    world.histories["u1"][-1:] = ["e", "x"]
    assert world.refresh()[:2] == (0, 1)
    world.histories["u3"][2] = "c"  # its states at 3 and 4
    assert world.refresh()[:2] == (0, 2)
    rows = world.rows()
    assert rows["u3", 4].history == history_digest(list("decb"))
    assert rows["u1", 4].history == history_digest(list("abce"))


def test_off_names_the_command_when_something_is_stale_and_reads_what_is_not(world):
    off = replace(world.settings, summarize="off")
    known = world.known(off)
    assert all(known.of(u, p) for u, places in world.plan().positions.items() for p in places)
    world.paint("a", (9, 9, 9))
    with pytest.raises(UserError, match="1 item summaries are missing or stale.*summarize"):
        world.known(off)


# Any change


SETTINGS = st.builds(
    lambda size, partial, most, mode: replace(
        BASE, block_size=size, partial_block=partial, max_history=most, summary_mode=mode
    ),
    st.integers(1, 4), st.booleans(), st.none() | st.integers(1, 6), st.sampled_from(["recurrent", "direct"]),
)  # fmt: skip
STEPS = st.lists(
    st.tuples(st.sampled_from(["append", "insert", "title", "user", "gone"]), st.integers(0, 10**6)), max_size=6
)


def change(world, what, number):
    """Change the world in one way."""
    users = sorted(world.histories)
    user = users[number % len(users)]
    history = world.histories[user]
    if what == "append":
        history.append(f"i{number % 40}")
    elif what == "insert":
        history.insert(number % (len(history) + 1), f"i{number % 40}")
    elif what == "title":
        world.titles[history[number % len(history)]] = f"another title {number}"
    elif what == "user":
        world.histories[f"w{number}"] = [f"i{number % 40}", f"i{number % 37}", f"n{number}"]
    elif len(users) > 2:
        del world.histories[user]


@settings_(deadline=None, max_examples=12)
@given(seed=st.integers(0, 99), settings=SETTINGS, steps=STEPS, again=STEPS, last_k=st.none() | st.integers(1, 3))
def test_after_any_change_the_export_is_that_of_a_run_from_scratch(
    tmp_path_factory, seed, settings, steps, again, last_k
):
    folder = tmp_path_factory.mktemp("w")
    world = World(folder / "a", random_histories(random.Random(seed), 6, 2, 9, 30), settings, last_k)
    world.refresh()
    for number, changes in enumerate((steps, again)):
        for what, where in changes:
            change(world, what, where)
        some = {user for n, user in enumerate(sorted(world.histories)) if n % 2}
        *_, left = world.refresh(some)
        assert not set(left) & some
        *_, left = world.refresh()
        other = world.scratch(folder / f"scratch{number}")
        assert left == [] and world.file() == other.file()
        assert world.refresh() == (0, 0, [])


def test_users_left_out_are_named_and_what_they_have_stays_right(tmp_path):
    world = World(tmp_path / "a", random_histories(random.Random(3), 30, 4, 9))
    world.refresh()
    before = world.rows()
    for user in ("u1", "u2", "u3"):
        world.histories[user] += ["i7", "i8"]
    *_, left = world.refresh({"u2", "u9"})
    assert left == ["u1", "u3"]
    after = world.rows()
    assert set(after) - set(before) == {("u2", len(world.histories["u2"]) - k) for k in (1, 2)}
    assert all(after[key] == row for key, row in before.items())
    with pytest.raises(UserError, match="4 user summaries are missing or stale and summarize is off"):
        world.known(replace(world.settings, summarize="off"))
    assert world.refresh()[1:] == (4, [])
    assert world.file() == world.scratch(tmp_path / "b").file()


def test_pruned_answers_are_generated_again(tmp_path):
    world = World(tmp_path / "a", random_histories(random.Random(4), 10, 3, 8))
    items, users, _ = world.refresh()
    prune(Store(store_file(world.folder)), "m", None, dry_run=False)
    assert world.refresh() == (items, users, [])


# What it costs


@pytest.mark.parametrize(("last_k", "each"), [(None, 10), (1, 1)])
@pytest.mark.parametrize("name", refresh_benchmark.SETTINGS)
def test_what_a_refresh_asks_is_what_the_benchmark_counts(tmp_path, name, last_k, each):
    settings = replace(refresh_benchmark.SETTINGS[name], item_summary="text")
    world = World(tmp_path, random_histories(random.Random(3), 15, 5, 35, 3000), settings, last_k)
    before = {user: len(history) for user, history in world.histories.items()}
    _, first, _ = world.refresh()
    active = list(world.histories)[::4]
    for user in active:
        world.histories[user] += [f"n{user}{n}" for n in range(each)]
    more = [each if user in active else 0 for user in before]
    assert (first, world.refresh()[1]) == refresh_benchmark.prompts(list(before.values()), more, last_k, settings)


def test_which_settings_keep_a_refresh_below_three_percent():
    found = {each: refresh_benchmark.shares(3000, each) for each in (1, 10)}
    many = [share for table in found.values() for row in table.values() for share in (row["None"], row["10"])]
    assert max(many) <= 3
    assert max(found[1]["block_size: 3"].values()) <= 3 and max(max(row.values()) for row in found[10].values()) <= 3
    assert max(found[1]["block_size: 10, partial_block: false"].values()) <= 3
    # as docs/refresh.md says: few rows a user, each of which must read what is new
    for name in ("block_size: 10", "max_history: 10", "summary_mode: direct"):
        assert 3 < found[1][name]["1"] < 8


def test_what_only_reads_the_store_claims_no_prompt_of_it(tmp_path):
    """As `plan` and dry runs read it, also while another process generates; others share the work by their claims."""
    world = World(tmp_path, {"u": "abc"})
    with closing(opened_store(world.folder)) as store, closing(ReadOnlyStore(world.folder)) as read:
        assert item_generator(world.stage(), store).leases is not None
        assert item_generator(world.stage(), read).leases is None
