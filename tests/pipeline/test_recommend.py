"""Recommendations from checkpoints: MLLMMSR's scores are those of its evaluation, a planted sequence is continued."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small_world
from run_parts import run_keys

from recbole_mllm.cli import main
from recbole_mllm.common.checkpoint import find_checkpoint
from recbole_mllm.common.errors import UserError
from recbole_mllm.quick_start import make_config, run
from recbole_mllm.recommender import Recommender
from recbole_mllm.retrieval.baseline import ids_file

SMALL = {
    "MLLMMSR": {"mllm": "tiny", "prompt_style": "demo", "epochs": 1, "train_last_k": 1, "limit_users": 4, "lora_r": 2},
    "GRU4Rec": {"epochs": 60, "train_neg_sample_args": None, "learning_rate": 0.01},
    "ItemKNN": {},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("recommend")
    small_world.write(home / "data")
    return home


@pytest.fixture(scope="module")
def outcomes(home):
    common = run_keys(home, seed=2024, state="ERROR", use_gpu=False, frozen_candidates=True)
    return {name: run(make_config(name, "steps", [], common | keys)) for name, keys in SMALL.items()}


@pytest.fixture(scope="module")
def ours(outcomes):
    return Recommender(outcomes["MLLMMSR"].checkpoint)


def test_scores_are_those_of_the_evaluation(outcomes, ours):
    outcome = outcomes["MLLMMSR"]
    data, pairs = outcome.dataset, outcome.pairs
    names, tokens = data.field2id_token[data.uid_field], data.field2id_token[data.iid_field]
    user = pairs["user_id"][0]
    own = pairs["user_id"] == user
    asked = [str(tokens[n]) for n in pairs["item_id"][own]]
    history = ours.history(str(names[user]))
    assert history[-1] in asked  # the target, last of all
    frame = ours.recommend(history=history[:-1], candidates=asked, top=len(asked))
    found = frame.set_index("item_id")["score"]
    np.testing.assert_allclose([found[item] for item in asked], pairs["score"][own], atol=1e-5)
    np.testing.assert_allclose(frame["p_yes"], 1 / (1 + np.exp(-frame["score"])))
    assert (frame["score"].diff().dropna() <= 0).all()


def test_a_user_is_read_whole_and_offered_nothing_met(ours):
    history = ours.history("u03")
    assert history == [small_world.item(6 + t) for t in range(small_world.LENGTH)]
    frame = ours.recommend("u03", top=1000)
    assert set(frame["item_id"]) == {small_world.item(n) for n in range(small_world.ITEMS)} - set(history)
    pd.testing.assert_frame_equal(frame, ours.recommend(history=history, top=1000))
    assert frame["title"].iloc[0] == f"title of {frame['item_id'].iloc[0]}"


def test_the_preference_is_explained_block_by_block(ours):
    states = ours.explain("u03")
    history = ours.history("u03")
    assert [list(items) for items in states["items"]] == [history[:3], history[3:6], history[6:]]
    assert ours.preference("u03") == states["preference"].iloc[-1] != states["preference"].iloc[0]


def test_an_edited_file_is_not_passed_over(home, ours):
    (path,) = (home / "data" / "steps").glob("*.isum")
    whole = path.read_text()
    path.write_text(whole.rpartition("\t")[0] + "\tmine\n")
    with pytest.raises(UserError, match=r"the file was edited: `recbole-mllm store import "):
        ours.recommend(history=["i01"], candidates=["i02"])
    path.write_text(whole)
    assert len(ours.recommend(history=["i01"], candidates=["i02"])) == 1


def test_a_sequential_model_continues_a_history_it_has_not_seen(outcomes):
    found = Recommender(outcomes["GRU4Rec"].checkpoint)
    for start in (11, 25, 33):  # histories of users begin at even items
        history = [small_world.item(start + t) for t in range(4)]
        assert found.recommend(history=history, top=1)["item_id"].tolist() == [small_world.item(start + 4)]
    assert list(found.recommend("u00").columns) == ["rank", "item_id", "title", "score"]


def test_data_written_after_a_baselines_checkpoint_is_named(outcomes, tmp_path, caplog):
    checkpoint = shutil.copy(outcomes["ItemKNN"].checkpoint, tmp_path)  # as stock RecBole saves one, without ids
    Recommender(checkpoint)
    assert "was written after" not in caplog.text
    os.utime(checkpoint, (0, 0))
    Recommender(checkpoint)
    assert "steps.inter was written after" in caplog.text


def test_several_users_come_in_one_frame(outcomes):
    found = Recommender(outcomes["GRU4Rec"].checkpoint)
    frame = found.recommend(["u07", "u03"], top=4)
    assert list(frame["user_id"]) == ["u07"] * 4 + ["u03"] * 4 and list(frame["rank"]) == [1, 2, 3, 4] * 2
    for user, part in frame.groupby("user_id"):
        assert part.drop(columns="user_id").reset_index(drop=True).equals(found.recommend(user, top=4))
    for users, said in ((["u07", "nobody"], "no user 'nobody'"), ([], "list of users is empty")):
        with pytest.raises(UserError, match=said):
            found.recommend(users)


def test_a_retriever_chooses_whom_the_mllm_ranks(outcomes):
    retriever = outcomes["GRU4Rec"].checkpoint
    found = Recommender(outcomes["MLLMMSR"].checkpoint, retriever_checkpoint=retriever, top_k=5)
    best = Recommender(retriever).recommend("u05", top=5)["item_id"]
    frame = found.recommend("u05")
    assert sorted(frame["item_id"]) == sorted(best) and len(frame) == 5


@pytest.mark.parametrize(("protocol", "more"), [("paper", []), ("temporal", ["--boundaries", "4,6"])])
def test_a_history_is_whole_whatever_the_split(home, protocol, more):
    folder = home / "data" / protocol
    assert main(["split", str(home / "data" / "steps"), "--protocol", protocol, "--out", str(folder), *more]) == 0
    keys = {"data_path": str(home / "data"), "checkpoint_dir": str(home / "saved"), "state": "ERROR", "epochs": 1}
    found = Recommender(run(make_config("Pop", protocol, [], keys | {"frozen_candidates": True})).checkpoint)
    assert sorted(found.users) == [f"u{n:02d}" for n in range(small_world.USERS)]
    for n in (0, 7, 29):
        assert found.history(f"u{n:02d}") == [small_world.item(2 * n + t) for t in range(small_world.LENGTH)]


@pytest.mark.parametrize(
    ("model", "arguments", "said"),
    [
        ("MLLMMSR", {"user": "u3"}, "no user 'u3'; did you mean"),
        ("MLLMMSR", {"history": ["i01", "x99"]}, "'x99' is unknown"),
        ("MLLMMSR", {"user": "u03", "candidates": ["i1"]}, "'i1' is unknown"),
        ("MLLMMSR", {"user": "u03", "history": ["i01"]}, "either a user"),
        ("MLLMMSR", {"user": "u03", "top": 0}, "top is 0; it must be a whole number, at least 1"),
        ("MLLMMSR", {"user": 7}, "no user '7'"),
        ("MLLMMSR", {"history": "x99"}, "'x99' is unknown"),
        ("MLLMMSR", {"history": 99}, "'99' is unknown"),
        ("ItemKNN", {"history": ["i01"]}, "take a sequential model"),
        ("GRU4Rec", {"history": []}, "reads a history"),
    ],
)
def test_what_cannot_be_recommended_is_refused(outcomes, model, arguments, said):
    with pytest.raises(UserError, match=said):
        Recommender(outcomes[model].checkpoint).recommend(**arguments)


@pytest.mark.parametrize("kept", [True, False], ids=["ids kept", "stock checkpoint"])
def test_a_checkpoint_of_other_items_is_refused(outcomes, tmp_path, kept):
    checkpoint = Path(shutil.copy(outcomes["GRU4Rec"].checkpoint, tmp_path))
    if kept:
        shutil.copy(ids_file(outcomes["GRU4Rec"].checkpoint), ids_file(checkpoint))
    rows = small_world.write(tmp_path) / "steps.inter"
    text = rows.read_text()
    # as many users and items, two of which change places: the weights fit, and mean others
    for change in ([text.replace("i03", "x").replace("i04", "i03").replace("x", "i04")] if kept else []) + [
        text + f"u00\tnew\t{small_world.LENGTH + 1}\n"
    ]:
        rows.write_text(change)
        with pytest.raises(UserError, match="other users or items than at training"):
            Recommender(checkpoint, data_path=tmp_path)


@pytest.mark.parametrize("folder", [".", "/"])
def test_a_folder_without_a_name_holds_no_checkpoint(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no checkpoint is in"):
        Recommender(folder)


def test_a_run_of_another_model_is_named(tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "SASRec-now.pth").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"no checkpoint of MLLMMSR is in .*; it holds one of SASRec; give a run of MLLM"
    ):
        find_checkpoint(str(tmp_path))


def test_the_command_prints_and_writes(home, outcomes, capsys, monkeypatch):
    monkeypatch.chdir(home)
    ids = home / "ids.txt"
    ids.write_text("i01\ni02\n\ni03\n")
    checkpoint = str(outcomes["MLLMMSR"].checkpoint)
    words = ["recommend", "--checkpoint", checkpoint, "--user", "u03", "--candidates", str(ids)]
    assert main([*words, "--json", "out.json", "--csv", "out.csv", "--explain"]) == 0
    said = capsys.readouterr().out
    written = json.loads((home / "out.json").read_text())
    assert written["preference"] in said and "title of i02" in said
    frame = pd.read_csv(home / "out.csv")
    assert frame["item_id"].tolist() == [row["item_id"] for row in written["recommendations"]]
    assert sorted(frame["item_id"]) == ["i01", "i02", "i03"]
    assert main([*words, "--json", "out.json"]) == 0  # its own file is replaced
    assert main([*words, "--json", str(ids)]) == 2  # another's is not
    assert ids.read_text().startswith("i01")
    (home / "none.txt").write_text("\n")
    for more, said in (
        (["--json", "one", "--csv", "./one"], "both name"),
        (["--candidates", "none.txt"], "is empty"),
        (["--data_path=3"], "dataset is not in 3/"),
    ):
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (home / "one").exists()
    assert main(["recommend", "--checkpoint", str(outcomes["ItemKNN"].checkpoint), "--history", "i01"]) == 2
