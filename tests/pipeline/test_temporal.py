"""A temporal split, recomputed from the raw log: rows, candidates, training, and what a prompt has read."""

import json
import random
from bisect import bisect_left
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import recbole
import yaml
from echoed_prompts import echoing, prompts_of, read
from run_parts import LOO

from recbole_mllm.benchmark.jobs import BenchmarkPlan, jobs_of
from recbole_mllm.benchmark.report import render
from recbole_mllm.benchmark.worker import run_job
from recbole_mllm.cli import main
from recbole_mllm.common.errors import UserError
from recbole_mllm.data.atomic import read_atomic
from recbole_mllm.evaluation.candidates import prepare_loaders
from recbole_mllm.evaluation.protocol import protocol_line
from recbole_mllm.quick_start import make_config, run

PARTS = ("train", "valid", "test")
EXAMPLES = Path(recbole.__file__).parent / "dataset_example"
START = 1_700_000_000


def log(seed, users=40, items=60):
    """Return (user, item, time), seconds apart and some at once, in an order that is not theirs.

    u0 to u4 come late, u5 to u7 have one early interaction, u8 is not seen in the end; some items are new in the end.
    """
    rng = random.Random(seed)
    rows = []
    for user in range(users):
        low, high, count = 0, 900, rng.randrange(3, 20)
        if user < 5:
            low = 860
        elif user < 8:
            high, count = 300, 1
        elif user == 8:
            high = 500
        for _ in range(count):
            time = rng.randrange(low, high)
            rows.append((f"u{user}", f"i{rng.randrange(items + time // 60)}", START + time))
    rng.shuffle(rows)
    return rows


class Truth:
    """What the issue of a temporal split says of a raw log, in loops over it."""

    def __init__(self, rows, moments=None, shares=(0.1, 0.1), target="last", longest=100):
        self.ordered = sorted(rows, key=lambda row: row[2])  # stable: equal times as in the file
        times = [time for *_, time in self.ordered]
        if moments is None:
            places = round(len(rows) * (1 - sum(shares))), round(len(rows) * (1 - shares[1]))
            moments = [times[place] for place in places]
        self.moments, (low, high) = moments, moments
        self.whole, self.rows, self.alone = {}, {part: {} for part in PARTS}, Counter()
        found = {part: [] for part in PARTS}
        for user, item, time in self.ordered:
            part = "train" if time < low else "valid" if time < high else "test"
            own = self.whole.setdefault(user, [])
            found[part].append((user, item, len(own)))
            own.append(item)
        self.training = [row[:2] for row in found["train"]]
        for part, each in found.items():
            chosen = {}
            for row in each:
                key = row if part == "train" else row[0]
                if target == "last" or key not in chosen or chosen[key][2] == 0:  # which has no history
                    chosen[key] = row
            for user, item, place in chosen.values():
                self.alone[part] += place == 0
                if place:
                    history = self.whole[user][:place]
                    self.rows[part][user, item, place] = history[-longest:]


def write_log(folder, rows):
    """Write MovieLens files, whose films have genres."""
    folder.mkdir()
    (folder / "ratings.dat").write_text("".join(f"{user}::{item}::4::{time}\n" for user, item, time in rows))
    items = dict.fromkeys(item for _, item, _ in rows)
    genres = ("War", "Comedy", "Drama")
    films = [f"{item}::item-{item}::{genres[n % 3]}\n" for n, item in enumerate(items)]
    (folder / "movies.dat").write_text("".join(films))
    return folder


def convert(raw, out, *options):
    assert main(["convert", "movielens", "--raw", str(raw), "--out", str(out), *options]) == 0
    return out


def split(folder, out, *options):
    assert main(["split", str(folder), "--out", str(out), *options]) == 0
    return out


def rows_in(folder):
    found = {}
    for part in PARTS:
        rows = read_atomic(folder / f"{folder.name}.{part}.inter")
        found[part] = {
            (row["user_id"], row["item_id"], int(float(row["position"]))): row["item_id_list"].split(" ")
            for row in rows
        }
    return found


TEMPORAL = ("--protocol", "temporal")
OPTIONS = {
    "shares": ((), {}),
    "other shares": (("--valid-share", ".2", "--test-share", "0.15"), {"shares": (0.2, 0.15)}),
    "moments, the first": (
        ("--boundaries", f"{START + 500},{START + 700}", "--target", "first", "--max-list", "4"),
        {"moments": (START + 500, START + 700), "target": "first", "longest": 4},
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_rows_are_those_of_the_raw_log_from_a_dump_or_from_a_folder(tmp_path, case):
    options, known = OPTIONS[case]
    rows = log(len(case))
    raw, truth = write_log(tmp_path / "raw", rows), Truth(rows, **known)
    one = convert(raw, tmp_path / "one" / "d", *TEMPORAL, *options)
    two = split(convert(raw, tmp_path / "d"), tmp_path / "two" / "d", *TEMPORAL, *options)
    assert rows_in(one) == truth.rows == rows_in(two)
    whole = [(row["user_id"], row["item_id"]) for row in read_atomic(one / "d.inter")]
    assert whole == [row[:2] for row in truth.ordered]
    for name in ("d.inter", "d.item", *(f"d.{part}.inter" for part in PARTS)):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    for folder in (one, two):
        about = json.loads((folder / "manifest.json").read_text())["split"]
        assert about["moments"] == list(truth.moments) and about["train_interactions"] == len(truth.training)
        assert {part: about[f"{part}_rows_without_history_left_out"] for part in PARTS} == {
            part: truth.alone[part] for part in PARTS
        }
        known_users, known_items = ({row[n] for row in truth.training} for n in (0, 1))
        new = sum(user not in known_users for user, *_ in truth.rows["test"])
        assert about["test_targets_of_new_users"] == new
        assert about["test_targets_that_are_new_items"] == sum(i not in known_items for _, i, _ in truth.rows["test"])
        assert f"test targets of new users: {new}" in (folder / "README.md").read_text()


@pytest.mark.parametrize("unit", [1, 1_000, 1_000_000])
def test_boundaries_that_are_dates_are_in_the_unit_of_the_times(tmp_path, unit):
    rows = [(user, item, time * unit) for user, item, time in log(5)]
    (folder := tmp_path / "dated").mkdir()
    head = "user_id:token\titem_id:token\texact_time:token\ttimestamp:float\n"
    (folder / "dated.inter").write_text(head + "".join(f"{u}\t{i}\t{time}\t{time}\n" for u, i, time in rows))
    moments = [START + 500, START + 700]
    dates = ",".join(datetime.fromtimestamp(moment, UTC).isoformat() for moment in moments)
    found = split(folder, tmp_path / "later", *TEMPORAL, "--boundaries", dates)
    assert rows_in(found) == Truth(rows, [moment * unit for moment in moments]).rows


def test_filters_that_the_files_of_a_split_would_not_obey_are_refused(tmp_path, capsys):
    (raw := write_log(tmp_path / "raw", log(3)))
    timed, later = convert(raw, tmp_path / "t"), convert(raw, tmp_path / "later", *TEMPORAL)
    run = ["benchmark", "--dataset", "later", f"--data_path={tmp_path}", "--models", "Pop", "--output_dir"]
    assert main([*run, str(tmp_path / "out"), "--user_inter_num_interval='[3,inf)'"]) == 2
    assert "user_inter_num_interval would do nothing: the split of later stands in files" in capsys.readouterr().err
    for folder in (timed, later):
        with (folder / "dataset.yaml").open("a") as file:
            file.write('val_interval: {timestamp: "[0,inf)"}\n')
    assert main(["split", str(timed), *TEMPORAL, "--out", str(tmp_path / "new")]) == 2
    assert "sets val_interval, which RecBole does not apply" in capsys.readouterr().err
    assert not (tmp_path / "new").exists() and not (tmp_path / "out").exists()
    assert main([*run, str(tmp_path / "out")]) == 2


def test_the_rows_of_ml_100k_are_those_of_its_raw_log(tmp_path):
    """As RecBole's wheel holds it."""
    whole = EXAMPLES / "ml-100k"
    raw = [(row["user_id"], row["item_id"], float(row["timestamp"])) for row in read_atomic(whole / "ml-100k.inter")]
    truth, found = Truth(raw), split(whole, tmp_path / "later", *TEMPORAL)
    assert rows_in(found) == truth.rows
    about = json.loads((found / "manifest.json").read_text())["split"]
    assert (about["moments"], about["train_interactions"]) == (truth.moments, len(truth.training))


def test_a_random_target_is_of_its_period_and_depends_on_the_seed_alone(tmp_path):
    rows = log(3)
    raw, truth = write_log(tmp_path / "raw", rows), Truth(rows)
    found = [
        rows_in(convert(raw, tmp_path / name, *TEMPORAL, "--target", "random", "--seed", seed))
        for name, seed in (("a", "1"), ("b", "1"), ("c", "2"))
    ]
    assert found[0] == found[1] != found[2]
    assert {user for user, *_ in found[0]["test"]} >= {user for user, _, place in truth.rows["test"] if place > 20}
    times = {user: [time for other, _, time in truth.ordered if other == user] for user in truth.whole}
    for user, _, place in found[2]["test"]:
        assert times[user][place] >= truth.moments[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A temporal split, and the same dataset whole."""
    home = tmp_path_factory.mktemp("temporal")
    rows = log(9)
    whole = convert(write_log(home / "raw", rows), home / "whole")
    return split(whole, home / "later", *TEMPORAL, "--max-list", "6"), Truth(rows, longest=6)


MODELS = (
    *("Pop", "ItemKNN", "BPR", "LightGCN", "FM", "DeepFM"),
    *("SASRec", "GRU4Rec", "BERT4Rec", "SASRecF", "GRU4RecF", "MLLMMSR"),
)
GENERAL = MODELS[:6]
SMALL = {
    "epochs": 1, "show_progress": False, "state": "ERROR", "metrics": ["NDCG", "GAUC"], "topk": [5], "use_gpu": False,
    "valid_metric": "NDCG@5", "frozen_candidates": True, "embedding_size": 8, "hidden_size": 8, "inner_size": 8,
    "n_heads": 2, "n_layers": 1,
}  # fmt: skip


def configured(folder, model, **keys):
    load = yaml.safe_load((folder / "dataset.yaml").read_text())["load_col"]
    own = {"mllm": "none"} if model == "MLLMMSR" else {}
    if model in ("FM", "DeepFM"):
        own = {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 1}}
    if model.endswith("RecF"):
        own = {"load_col": load | {"item": ["item_id", "genres"]}, "selected_features": ["genres"]}
    mode = LOO | {"mode": "uni10"}
    given = {"data_path": str(folder.parent), "checkpoint_dir": str(folder.parent / "saved"), "eval_args": mode}
    return make_config(model, folder.name, [], SMALL | given | own | keys)


def raw_rows(data, part):
    rows = part.inter_feat
    columns = [data.id2token(field, rows[field].numpy()).tolist() for field in ("user_id", "item_id")]
    return list(zip(*columns, strict=True))


def test_models_of_every_kind_meet_one_set_of_candidates_and_learn_what_lies_before_the_first_moment(world):
    from recbole.data import create_dataset

    folder, truth = world
    digests = {}
    for model in MODELS:
        config = configured(folder, model)
        if model == "MLLMMSR":
            data = create_dataset(config)
            train, _, test, digests[model] = prepare_loaders(config, data)
        else:
            done = run(config)
            data, train, test, digests[model] = done.dataset, done.train_data, done.test_data, done.candidates
            assert np.isfinite(list(done.test.values())).all()
        learnt = raw_rows(data, train._dataset)
        if model in GENERAL:
            assert Counter(learnt) == Counter(truth.training), model
        else:
            assert Counter(learnt) == Counter(row[:2] for row in truth.rows["train"]), model
        assert Counter(raw_rows(data, test._dataset)) == Counter(row[:2] for row in truth.rows["test"])
        users = np.repeat(test.rows.users, test.rows.counts * test.count)
        for user, item in zip(users.tolist(), test.negatives.tolist(), strict=True):
            assert data.id2token("item_id", item) not in truth.whole[data.id2token("user_id", user)]
        assert data.facts.split(config).future_share() == 0
    assert len(set(digests.values())) == 1, digests


def test_leaving_one_out_trains_on_what_comes_after_most_test_targets(world):
    from recbole.data import create_dataset

    folder, truth = world
    whole = folder.parent / "whole"
    config = configured(whole, "Pop")
    found = create_dataset(config).facts.split(config).future_share()
    own = {}
    for user, _, time in truth.ordered:
        own.setdefault(user, []).append(time)
    latest = max(time for times in own.values() if len(times) > 1 for time in times[: max(2, len(times) - 2)])
    last = [times[-1] for times in own.values() if len(times) > 2]
    assert found == pytest.approx(bisect_left(sorted(last), latest) / len(last)) and found > 0.5


def test_a_prompt_has_read_what_its_user_did_before_and_the_answers_of_another_split_are_found(tmp_path):
    rows = log(11, users=14)
    whole, truth = convert(write_log(tmp_path / "raw", rows), tmp_path / "whole"), Truth(rows, longest=3)
    load = yaml.safe_load((whole / "dataset.yaml").read_text())["load_col"]
    with echoing() as server:
        prompts_of(whole, server.url, load_col=load)
        asked = len(server.bodies)
        later = split(whole, tmp_path / "later", *TEMPORAL, "--max-list", "3")
        load = yaml.safe_load((later / "dataset.yaml").read_text())["load_col"]
        found = prompts_of(later, server.url, load_col=load)
        assert asked and len(server.bodies) == asked
        before = Counter(
            (user, item, *truth.whole[user][:place]) for each in truth.rows.values() for user, item, place in each
        )
        assert Counter((user, item, *read(text)) for user, item, text in found) == before
        for path in (later / "later.mllm.sqlite", *later.glob("*.usum")):  # written again, the chains are the same
            path.unlink()
        again = prompts_of(later, server.url, load_col=load)
        assert again == found and len(server.bodies) > asked


def test_a_leaderboard_says_that_nothing_has_seen_the_future_and_who_is_new(world, tmp_path, monkeypatch):
    folder, truth = world
    monkeypatch.chdir(tmp_path)
    keys = {"data_path": str(folder.parent), "topk": [5], "valid_metric": "NDCG@5", "use_gpu": False}
    keys["eval_args"] = LOO | {"mode": "uni10"}
    (job,) = jobs_of(BenchmarkPlan("later", ("Pop",), (2024,), tmp_path / "out", overrides=keys))
    job.folder.mkdir(parents=True)
    run_job(json.loads(json.dumps(job.order())))
    render(tmp_path / "out")
    told = json.loads((tmp_path / "out" / "leaderboard.json").read_text())
    assert told["future_share"] == 0 and told["protocol"].startswith("temporal split (trained before ")
    known_users, known_items = ({row[n] for row in truth.training} for n in (0, 1))
    slices = told["rows"][0]["slices"]
    new = sum(user not in known_users for user, *_ in truth.rows["test"])
    assert slices["new_user"]["NDCG@5"]["n"] == new > 0
    assert slices["cold"]["NDCG@5"]["n"] == sum(i not in known_items for _, i, _ in truth.rows["test"]) > 0
    for name in ("leaderboard.md", "leaderboard.html"):
        text = (tmp_path / "out" / name).read_text()
        assert "future_share 0.000" in text and "the user has no interaction in training" in text


@pytest.mark.parametrize(
    ("time", "said"),
    [
        (875_747_190.0, "1997-10-01 23:06:30 UTC (875747190)"),
        (1_700_000_000_123.0, "2023-11-14 22:13:20 UTC (1700000000123)"),
        (212.0, "212"),
        (0.5, "0.5"),
    ],
)
def test_the_moments_of_a_split_are_dates_beside_their_numbers(time, said):
    known = {"temporal_split": {"moments": [time, time + 1], "train_interactions": 9}, "benchmark_filename": ["train"]}
    keys = {"eval_args": {"order": "TO", "mode": {"test": "uni5"}}, "limit_users": None, "candidates_file": None}
    keys |= {"candidate_seed": 1, "exclude_seen": True, "frozen_candidates": True}
    assert protocol_line(known | keys).startswith(f"temporal split (trained before {said}, tested from ")


@pytest.mark.parametrize("kind", ["RS", "TS"])
def test_splits_that_no_leaderboard_can_compare_are_refused_before_anything_is_trained(world, tmp_path, kind, capsys):
    words = ["--dataset", "whole", "--models", "Pop,SASRec", f"--data_path={world[0].parent}"]
    mode = {"split": {kind: [0.8, 0.1, 0.1]}, "order": "TO", "group_by": "user", "mode": "uni5"}
    assert main(["benchmark", *words, "--output_dir", str(tmp_path / "out"), f"--eval_args={mode}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert kind in line and "split DATASET --protocol temporal --out DIR" in line
    assert not list((tmp_path / "out").rglob("*.npz"))


def test_how_much_of_the_future_leave_one_out_sees_on_ml_100k(tmp_path):
    from recbole.data import create_dataset

    from recbole_mllm.evaluation.protocol import future_share

    keys = {"data_path": str(EXAMPLES), "state": "ERROR", "use_gpu": False}
    split = LOO | {"mode": "uni20"}
    config = make_config("Pop", "ml-100k", [], keys | {"eval_args": split, "checkpoint_dir": str(tmp_path)})
    data = create_dataset(config)
    assert future_share(data, None, None) == pytest.approx(0.999, abs=5e-4)
    config["global_times"] = False
    assert future_share(data, None, None) is None


def test_what_a_temporal_split_cannot_be_made_of_is_one_line(tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    pairs = "".join(f"{user}\t{' '.join(f'i{user + n}' for n in range(5))}\n" for user in range(20))
    (tmp_path / "raw" / "MicroLens-made_pairs.tsv").write_text(pairs)
    (tmp_path / "raw" / "MicroLens-made_titles.csv").write_text("item,title\ni1,One\n")
    words = ["convert", "microlens", "--raw", str(tmp_path / "raw"), "--out"]
    assert main([*words, str(tmp_path / "lists"), *TEMPORAL]) == 2
    assert not (tmp_path / "lists").exists()
    assert main([*words, str(tmp_path / "lists")]) == 0
    timed = convert(write_log(tmp_path / "timed", log(1)), tmp_path / "t")
    outside = ["--boundaries", f"{START - 9},{START - 5}"]
    cases = [
        ([str(tmp_path / "lists"), *TEMPORAL], "their order is each user's own"),
        ([str(timed), *TEMPORAL, *outside], "no interaction lies in the train period"),
        ([str(timed), *TEMPORAL, "--valid-share", ".6", "--test-share", ".5"], "leave nothing to train on"),
        ([str(timed), "--target", "first"], "--target is of --protocol temporal"),
        ([str(tmp_path / "raw")], "holds no raw.inter"),
        ([str(timed), "--seeed=3"], "split takes no --seeed"),
        ([str(timed), "--USER_ID_FIELD=uid"], "t.inter:1: there is no column uid; name yours with"),
    ]
    capsys.readouterr()
    for given, said in cases:
        assert main(["split", *given, "--out", str(tmp_path / "new")]) == 2
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert said in line, line
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("protocol", ["loo", "paper"])
def test_a_folder_split_for_another_protocol_is_what_convert_makes_of_the_dump(tmp_path, protocol):
    raw = write_log(tmp_path / "raw", log(2))
    one = convert(raw, tmp_path / "one" / "d", "--protocol", protocol)
    later = convert(raw, tmp_path / "later", *TEMPORAL)
    two = split(later, tmp_path / "two" / "d", "--protocol", protocol)
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    for name in names:
        if name.startswith("d."):
            lines = [(folder / name).read_text().splitlines() for folder in (one, two)]
            assert sorted(lines[0]) == sorted(lines[1]), name
    keys = [yaml.safe_load((folder / "dataset.yaml").read_text()) for folder in (one, two)]
    assert keys[0] == keys[1]


def test_a_folder_keeps_its_own_columns_and_images(tmp_path):
    from PIL import Image

    folder = tmp_path / "own"
    (folder / "pictures").mkdir(parents=True)
    Image.new("RGB", (4, 4), "red").save(folder / "pictures" / "a.png")
    lines = ["userID:token\tbusiness_id:token\tstars:float\tdate:float"]
    lines += [f"{user}\t{item}\t4\t{time}" for user, item, time in log(5)]
    (folder / "own.inter").write_text("\n".join(lines) + "\n")
    (folder / "own.item").write_text("business_id:token\ttitle:token_seq\timage:token\ni1\tOne\tpictures/a.png\n")
    own = "USER_ID_FIELD: userID\nITEM_ID_FIELD: business_id\nTIME_FIELD: date\nitem_kind: movie\n"
    (folder / "dataset.yaml").write_text(own)
    out = split(folder, tmp_path / "new", *TEMPORAL)
    header = (out / "new.test.inter").read_text().splitlines()[0]
    assert header == "userID:token\tbusiness_id_list:token_seq\tbusiness_id:token\tposition:float\tdate:float"
    assert (out / "new.inter").read_text().splitlines()[0] == lines[0]
    assert (out / "pictures" / "a.png").samefile(folder / "pictures" / "a.png")
    keys = yaml.safe_load((out / "dataset.yaml").read_text())
    assert keys["item_kind"] == "movie" and keys["ITEM_ID_FIELD"] == "business_id"


def test_rows_that_do_not_fit_the_whole_log_are_refused(tmp_path):
    from recbole.data import create_dataset

    folder = convert(write_log(tmp_path / "raw", log(4)), tmp_path / "d", *TEMPORAL)
    lines = (folder / "d.inter").read_text().splitlines(keepends=True)
    (folder / "d.inter").write_text("".join([lines[0], *lines[2:]]))
    with pytest.raises(UserError, match=r"d\.train\.inter does not fit d\.inter"):
        create_dataset(configured(folder, "SASRec"))


def test_a_log_that_has_grown_behind_its_split_is_named(tmp_path, caplog):
    from recbole.data import create_dataset

    folder = convert(write_log(tmp_path / "raw", rows := log(4)), tmp_path / "d", *TEMPORAL)
    create_dataset(configured(folder, "SASRec"))
    assert "was made of" not in caplog.text
    last = (folder / "d.inter").read_text().splitlines()[-1]
    with (folder / "d.inter").open("a") as file:
        file.write(f"{last}\n{last}\n")
    create_dataset(configured(folder, "SASRec"))
    assert (
        f"d.inter holds {len(rows) + 2:,} interactions, and its temporal split was made of {len(rows):,}" in caplog.text
    )
