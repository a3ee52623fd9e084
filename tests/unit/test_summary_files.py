"""Summaries are the user's: found by item or user, edited by command or in the file, and read by the next run."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import pytest
import unprivileged
from summary_world import BASE, World

from recbole_mllm.cli import main
from recbole_mllm.common.errors import UserError
from recbole_mllm.data.schema import isum_file, store_file, usum_file
from recbole_mllm.summaries import summary_files
from recbole_mllm.summaries.store import Store

SETTINGS = replace(BASE, block_size=2, item_summary="image", max_history=None)


@pytest.fixture
def world(tmp_path):
    """A user and an item share the name a; rows read u1's states at 1, 2 and 3, a's at 1 to 4."""
    made = World(tmp_path, {"u1": "abcx", "a": "deabx"}, SETTINGS)
    for n, item in enumerate("abcdex"):
        made.paint(item, (50 * n, 10, 10))
    made.refresh()
    return made


def run(world, words, capsys, code=0):
    """Run a store command on the world; return what it prints, or what it is refused with."""
    action, *rest = words
    assert main(["store", action, str(world.folder), *rest]) == code
    said = capsys.readouterr()
    assert code == 0 or said.err.count("\n") == 1
    return said.err if code else said.out


def edit(path, old, new):
    before = path.read_text()
    assert old in before
    path.write_text(before.replace(old, new))


def isum(world):
    rows = isum_file(world.folder, "t").read_text().splitlines()[1:]
    return dict(row.split("\t") for row in rows)


def answers(world):
    with closing(Store(store_file(world.folder))) as store, store.transaction() as db:
        return dict(db.execute("SELECT text, origin FROM answers"))


def test_an_item_is_shown_with_its_image_its_text_and_what_asked_for_it(world, capsys):
    said = run(world, ["show", "--item", "b", "--prompt"], capsys)
    assert said.splitlines()[:2] == ["tag t", f"item b, title: title of b, image: {world.images['b']}"]
    assert isum(world)["b"] in said and f"> {world.style.image_summary.splitlines()[-1]}" in said
    assert "no summary of item 'zz'" in run(world, ["show", "--item", "zz"], capsys, 2)
    assert "no summaries of tag 'x'; it has t" in run(world, ["show", "--item", "b", "--tag", "x"], capsys, 2)


def test_a_user_is_shown_state_by_state_with_the_prompts_that_were_asked(world, capsys):
    said = run(world, ["show", "--user", "u1", "--prompt"], capsys)
    rows = world.rows()
    heads = [line for line in said.splitlines() if line.startswith("user u1")]
    assert [re.sub(r", history \w{16}", "", head) for head in heads] == [
        "user u1, position 1, has read a",
        "user u1, position 2, has read a, b",
        "user u1, position 3, has read c and what was written at 2",
    ]
    assert all(rows["u1", seen].text in said for seen in (1, 2, 3))
    world.identity = "n"  # another model is asked all of it again
    world.refresh()
    asked = {prompt for batch in world.user.batches for prompt in batch}
    shown = "\n".join(line.removeprefix("  > ") for line in said.splitlines() if line.startswith("  > "))
    assert all(prompt in shown for prompt in asked if "title of c" in prompt and "title of a" not in prompt)


def test_a_set_item_is_read_by_the_next_run_and_what_it_was_read_for_is_written_anew(world, capsys):
    before = isum(world)
    said = run(world, ["set", "--item", "b", "--text", " a  \tlamp"], capsys)
    assert "3 user summaries were written from what it replaces" in said
    assert isum(world) == before | {"b": "a lamp"} and answers(world)["a lamp"] == "user"
    assert run(world, ["show", "--user", "u1"], capsys).count("the next run writes it again") == 2
    assert world.refresh() == (0, 3, [])  # u1 at 2 and 3; a at 4
    assert any("a lamp" in prompt for batch in world.user.batches for prompt in batch)
    assert isum(world)["b"] == "a lamp" and world.refresh() == (0, 0, [])


def test_a_set_state_is_read_and_continued(world, capsys):
    said = run(world, ["set", "--user", "u1", "--position", "2", "--text", "likes lamps"], capsys)
    assert "position 2 of tag t is set; 1 user summaries were written from what it replaces" in said
    assert world.rows()["u1", 2].text == "likes lamps"
    run(world, ["set", "--user", "u1", "--text", "likes all of it"], capsys)  # at 3, which continues the new text
    assert world.refresh() == (0, 0, [])
    known = world.known()
    assert [known.of("u1", p) for p in (2, 3)] == ["likes lamps", "likes all of it"]
    said = run(world, ["set", "--item", "a", "--text", "new"], capsys)  # the user a reads it at 3 and 4
    assert "5 user summaries were written from what it replaces" in said and "2 of those were set by you" in said
    for words, told in (
        (["--user", "u1", "--position", "9", "--text", "x"], "no summary at position 9 of tag t; it has 1, 2, 3"),
        (["--item", "a", "--position", "1", "--text", "x"], "an item has one summary"),
        (["--item", "a", "--text", " "], "--text is empty"),
    ):
        assert told in run(world, ["set", *words], capsys, 2)


def test_two_tags_must_be_told_apart(world, capsys):
    stage = world.stage
    world.stage = lambda settings=None: replace(stage(settings), tag="s")
    world.refresh()
    assert "several tags; add --tag, one of s, t" in run(world, ["set", "--item", "b", "--text", "x"], capsys, 2)
    assert "1 more with the same prompt share the answer" in run(
        world, ["set", "--item", "b", "--text", "x", "--tag", "t"], capsys
    )


@pytest.mark.parametrize("kind", ["isum", "usum"])
def test_an_edited_file_is_refused_before_anything_is_asked_and_imported_by_the_line_that_says_so(world, kind, capsys):
    path = {"isum": isum_file, "usum": usum_file}[kind](world.folder, "t")
    text = isum(world)["b"] if kind == "isum" else world.rows()["u1", 2].text
    edit(path, text, "mine")
    edited = path.read_bytes()
    world.histories["u1"].append("e")
    with pytest.raises(UserError, match=rf"{path.name}:\d+: 1 texts .* edited: `recbole-mllm store import {path}`"):
        world.refresh()
    assert path.read_bytes() == edited and world.item.asked + world.user.asked == 0
    assert main(["store", "import", str(path)]) == 0
    assert "1 summaries replaced" in capsys.readouterr().out and answers(world)["mine"] == "user"
    world.refresh()
    assert "mine" in (isum(world).values() if kind == "isum" else {row.text for row in world.rows().values()})
    assert world.refresh() == (0, 0, [])


def test_edited_states_of_one_chain_are_all_read(world, capsys):
    path, rows = usum_file(world.folder, "t"), world.rows()
    for seen in (2, 3):
        edit(path, rows["u1", seen].text, f"mine at {seen}")
    assert main(["store", "import", str(path)]) == 0
    assert world.refresh() == (0, 0, [])
    assert [world.rows()["u1", seen].text for seen in (1, 2, 3)] == [rows["u1", 1].text, "mine at 2", "mine at 3"]
    assert "1 of those were set by you" in run(world, ["set", "--user", "u1", "--position", "2", "--text", "x"], capsys)


@pytest.mark.parametrize("action", ["set", "import"])
def test_an_edit_while_a_command_replaces_another_text_is_noticed(world, action, capsys, monkeypatch):
    path, apply = isum_file(world.folder, "t"), summary_files._apply

    def edited_meanwhile(*given, **more):
        edit(path, isum(world)["c"], "of that moment")
        return apply(*given, **more)

    monkeypatch.setattr(summary_files, "_apply", edited_meanwhile)
    if action == "import":
        edit(path, isum(world)["b"], "mine")
    run(world, ["set", "--item", "b", "--text", "mine"] if action == "set" else ["import", str(path)], capsys)
    assert (isum(world)["b"], isum(world)["c"], answers(world)["mine"]) == ("mine", "of that moment", "user")
    with pytest.raises(UserError, match=r"1 texts are not the store's \(item c\), so the file was edited"):
        world.refresh()
    monkeypatch.undo()
    run(world, ["import", str(path)], capsys)
    world.refresh()
    assert (isum(world)["b"], isum(world)["c"]) == ("mine", "of that moment")


def test_what_only_reads_works_in_a_folder_that_may_not_be_written_to():
    with unprivileged.throwaway() as place:
        made = World(place, {"u1": "abcx"}, SETTINGS)
        for item in "abcx":
            made.paint(item, (1, 2, 3))
        made.refresh()
        made.folder.chmod(0o555)
        before = unprivileged.snapshot(made.folder)
        script = f"""
            folder = {str(made.folder)!r}
            for words in (["show", folder, "--user", "u1"], ["stats", folder], ["export", folder, "--out", "x.jsonl"]):
                assert main(["store", *words]) == 0
            assert main(["store", "set", folder, "--item", "b", "--text", "x"]) == 2
        """
        said = unprivileged.run(script, place, "recbole_mllm.summaries.summary_files")
        made.folder.chmod(0o755)
        assert "user u1, position 3" in said and before == unprivileged.snapshot(made.folder)


def test_a_removed_file_is_exported_anew(world):
    whole = world.file()
    edit(usum_file(world.folder, "t"), "likes", "hates")
    usum_file(world.folder, "t").unlink()
    assert world.refresh() == (0, 0, []) and world.file() == whole


def test_a_file_that_a_killed_run_has_just_exported_is_not_taken_for_edited(world):
    world.histories["u1"].append("e")
    world.refresh()
    with closing(Store(store_file(world.folder))) as store, store.transaction(write=True) as db:
        db.execute("UPDATE tags SET user_file = 'of before', item_file = ''")
    assert world.refresh() == (0, 0, [])


def test_what_cannot_be_imported_changes_nothing(world, capsys):
    path, before = isum_file(world.folder, "t"), answers(world)
    whole = path.read_text()
    for text, said in (
        (whole + "zz\tmine\n", "item zz has no summary of tag t in the store; remove the line"),
        (whole.replace(isum(world)["b"], ""), "the summary of item b is empty"),
        (whole.replace("summary:", "text:"), "t.isum:1: the columns are item_id, text; they must be item_id:token"),
        (whole + "a\tmine\n", "item a is already in line 2"),
    ):
        path.write_text(text)
        assert main(["store", "import", str(path)]) == 2
        assert said in capsys.readouterr().err and answers(world) == before
        with pytest.raises(UserError):
            world.refresh()


def test_the_count_that_a_state_has_read_is_a_whole_number(world, capsys):
    path = usum_file(world.folder, "t")
    whole, before = path.read_text(), answers(world)
    for seen in ("1e400", "inf", "nan", "5.7", "x", ""):
        path.write_text(whole.replace("u1\t1.0\t", f"u1\t{seen}\t").replace("u1\t1\t", f"u1\t{seen}\t"))
        assert path.read_text() != whole and main(["store", "import", str(path)]) == 2
        assert f"seen is '{seen}'; it must be a whole number" in capsys.readouterr().err and answers(world) == before


def test_states_of_other_histories_at_one_position_are_not_set_together(tmp_path, capsys):
    made = World(tmp_path, {"u1": "abcdex"}, replace(SETTINGS, block_size=1, max_history=2))
    for n, item in enumerate("abcdex"):
        made.paint(item, (50 * n, 10, 10))
    made.refresh()
    shown = run(made, ["show", "--user", "u1"], capsys)
    at = max(set(positions := re.findall(r"position (\d+), history \w+, has read", shown)), key=positions.count)
    assert positions.count(at) > 1
    told = run(made, ["set", "--user", "u1", "--position", at, "--text", "mine"], capsys, 2)
    assert f"has {positions.count(at)} summaries at position {at}, of histories that begin elsewhere" in told
    path = usum_file(made.folder, "t")
    lines = path.read_text().splitlines(keepends=True)
    place = next(n for n, line in enumerate(lines) if line.split("\t")[1].removesuffix(".0") == at)
    lines[place] = "\t".join([*lines[place].split("\t")[:3], "mine\n"])
    path.write_text("".join(lines))
    assert main(["store", "import", str(path)]) == 0
    assert run(made, ["show", "--user", "u1"], capsys).count("mine") == 1


def test_one_answer_of_two_items_is_one_text(tmp_path, capsys):
    world = World(tmp_path, {"u1": "abx"}, SETTINGS)
    for item in "abx":
        world.paint(item, (1, 1, 1))
    world.refresh()
    path, text = isum_file(world.folder, "t"), isum(world)["a"]
    path.write_text(path.read_text().replace(f"a\t{text}", "a\tone").replace(f"b\t{text}", "b\tother"))
    assert main(["store", "import", str(path)]) == 2
    assert "item a and item b have one prompt" in capsys.readouterr().err
    path.write_text(path.read_text().replace("b\tother", f"b\t{text}"))
    assert main(["store", "import", str(path)]) == 0
    assert isum(world) == {"a": "one", "b": "one"}
    world.refresh()
    assert isum(world) == {"a": "one", "b": "one"}
    run(world, ["set", "--item", "b", "--text", "two"], capsys)
    assert isum(world) == {"a": "two", "b": "two"}
    edit(path, "b\ttwo", "b\tthree")
    assert "give both the same text" not in run(world, ["import", str(path)], capsys)
    assert isum(world) == {"a": "three", "b": "three"} and world.refresh()[0] == 0


def test_summaries_that_the_store_does_not_know_are_set_aside_and_taken_in(world, capsys, caplog):
    """A store of an earlier version says nothing of whose an answer is, and one that was removed nothing at all."""
    path = usum_file(world.folder, "t")
    with closing(Store(store_file(world.folder))) as store, store.transaction(write=True) as db:
        db.execute("DROP TABLE tags"), db.execute("DROP TABLE summaries")
    assert world.refresh() == (0, 0, [])  # as they were exported
    with closing(Store(store_file(world.folder))) as store, store.transaction(write=True) as db:
        db.execute("DROP TABLE tags"), db.execute("DROP TABLE summaries")
    edit(path, world.rows()["u1", 3].text, "mine")
    assert world.refresh() == (0, 0, [])
    aside = path.with_name(f"{path.name}.edited-1")
    assert f"store import {world.folder} {aside}" in caplog.text and "mine" not in path.read_text()
    run(world, ["import", str(aside)], capsys)
    world.refresh()
    assert world.rows()["u1", 3].text == "mine"


def test_an_export_names_items_users_and_positions_and_is_imported(world, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    run(world, ["export", "--out", str(out)], capsys)
    _, *lines = map(json.loads, out.read_text().splitlines())
    named = {line["text"]: line["of"] for line in lines}
    assert named[isum(world)["c"]] == [{"tag": "t", "item": "c"}]
    assert named[world.rows()["u1", 3].text] == [{"tag": "t", "user": "u1", "position": 3}]
    assert len(named) == len(answers(world))
    run(world, ["set", "--item", "c", "--text", "mine"], capsys)
    assert "0 answers added, 12 known" in run(world, ["import", str(out)], capsys)
    assert answers(world)["mine"] == "user"
    assert "0 answers added, 1 replaced, 11 the same" in run(world, ["import", str(out), "--replace"], capsys)
    assert "mine" not in answers(world)
    assert "say into which dataset" in (main(["store", "import", str(out)]), capsys.readouterr().err)[1]


def test_two_that_set_texts_at_once_both_stand_in_the_file(world, monkeypatch):
    written = summary_files.write_atomic

    def slowly(*given):
        time.sleep(0.3)
        return written(*given)

    def set_item(item):
        with closing(Store(store_file(world.folder))) as store:
            summary_files.set_text(store, world.folder, "item", item, None, f"new {item}", "t")

    monkeypatch.setattr(summary_files, "write_atomic", slowly)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(set_item, "abc"))
    assert [isum(world)[item] for item in "abc"] == ["new a", "new b", "new c"]
