"""A damaged atomic file is one line with its place, for every model and before anything else; a sound one loads."""

import os
from pathlib import Path

import pytest
import small_world
from recbole.config import Config
from recbole.data import create_dataset

from recbole_mllm.cli import main
from recbole_mllm.common.errors import UserError
from recbole_mllm.data import checking

HEAD = "user_id:token\titem_id:token\ttimestamp:float\trating:float\n"
ROWS = [f"u{u}\ti{(u + t) % 9}\t{100 * u + t}\t{t % 5}" for u in range(6) for t in range(5)]
ITEM_HEAD = "item_id:token\ttitle:token_seq\tprice:float\tvector:float_seq\n"
ITEMS = [f"i{n}\tthe title {n}\t{n}.5\t0.1 0.{n}" for n in range(9)]
USER_HEAD = "user_id:token\tage:token\n"
USERS = [f"u{n}\t{n}" for n in range(6)]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def text(head, rows, third=None):
    """Return a file, its row in line 4 replaced by `third`."""
    rows = rows if third is None else [*rows[:2], third, *rows[3:]]
    return (head + "".join(f"{row}\n" for row in rows)).encode()


def inter(third):
    return text(HEAD, ROWS, third)


def item(third):
    return text(ITEM_HEAD, ITEMS, third)


GOOD = {"inter": text(HEAD, ROWS), "item": text(ITEM_HEAD, ITEMS), "user": text(USER_HEAD, USERS)}


def plant(**files):
    folder = Path("x")
    folder.mkdir(exist_ok=True)
    for kind, content in (GOOD | files).items():
        (folder / f"x.{kind}").write_bytes(content)
    return folder


def load(model="Pop", **keys):
    """Read the dataset as a run of `model` through our command does."""
    base = {"data_path": ".", "gpu_id": "", "load_col": None, "frozen_candidates": True, "mllm": "tiny"}
    base["eval_args"] = {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "uni5", "group_by": "user"}
    return create_dataset(Config(model, "x", config_dict=base | keys))


DAMAGED = {
    "a time that is text": ("inter", inter("u0\ti2\tsoon\t1"), r"x\.inter:4: timestamp 'soon' is no number; write"),
    "no time": ("inter", inter("u0\ti2\t\t1"), r"x\.inter:4: timestamp is missing"),
    "a time that is NaN": ("inter", inter("u0\ti2\tnan\t1"), r"x\.inter:4: timestamp 'nan' is no number"),
    "a time without end": ("inter", inter("u0\ti2\t-inf\t1"), r"x\.inter:4: timestamp '-inf' is infinite"),
    "a value too few": ("inter", inter("u0\ti2\t3"), r"x\.inter:4: 3 values for 4 columns"),
    "a value too many": ("inter", inter("u0\ti2\t3\t1\tx"), r"x\.inter:4: 5 values for 4 columns"),
    "the end cut off": ("inter", GOOD["inter"][:-5], r"x\.inter:31: 3 values for 4"),
    "a NUL": ("inter", inter("u0\ti\x002\t3\t1"), r"x\.inter:4: a NUL byte inside the line; remove it"),
    "UTF-16": ("inter", GOOD["inter"].decode().encode("utf-16"), r"x\.inter:1: .*looks like UTF-16; save it as UTF-8"),
    "Latin-1": ("item", item("i2\té\t1\t0 0").decode().encode("latin-1"), r"x\.item:4: byte 4 is no UTF-8; save the"),
    "carriage returns alone": ("inter", GOOD["inter"].replace(b"\n", b"\r"), r"x\.inter:1: a carriage return inside"),
    "a quote left open": ("inter", inter('u0\t"i2\t3\t1'), r"x\.inter:4: a value starts with a quote that does not"),
    "two quotes left open": (  # pandas takes the rows between for a part of one id
        "inter",
        text(HEAD, [*ROWS[:2], 'u0\t"i2\t3\t1', *ROWS[3:9], 'u0\ti2"\t3\t1', *ROWS[10:]]),
        r"x\.inter:4: a value starts with a quote that does not close at its end: '\"i2'",
    ),
    "no types": ("inter", text("user_id\titem_id\ttimestamp\trating\n", ROWS), r"x\.inter:1: 'user_id' is no column"),
    "no header": ("inter", text("", ROWS), r"x\.inter:1: 'u0' is no column; write name:type"),
    "commas": ("inter", GOOD["inter"].replace(b"\t", b","), r":1: .* is no column; write name:type, tabs betwe"),
    "a column twice": ("inter", text(HEAD.replace("rating", "timestamp"), ROWS), r":1: two columns are called timest"),
    "no users": ("inter", text(HEAD.replace("user_id", "who"), ROWS), r"x\.inter:1: there is no column user_id; its"),
    "no ids of items": ("item", text(ITEM_HEAD.replace("item_id", "what"), ITEMS), r"x\.item:1: there is no column it"),
    "ids that are numbers": ("inter", text(HEAD.replace("user_id:token", "user_id:float"), ROWS), "must be a token"),
    "times that are words": ("inter", text(HEAD.replace("stamp:float", "stamp:token"), ROWS), "and must be a float"),
    "no times": ("inter", text(HEAD.replace("timestamp", "when"), ROWS), "ordered by time, and there is no timestamp"),
    "an empty file": ("inter", b"", r"x\.inter is empty; its first line must name the columns"),
    "a header alone": ("inter", HEAD.encode(), r"x\.inter holds no row behind its header; write the interactions"),
    "a header of items alone": ("item", ITEM_HEAD.encode(), r"x\.item holds no row behind its header; remove the file"),
    "an empty item": ("inter", inter("u0\t\t3\t1"), r"x\.inter:4: item_id is empty"),
    "RecBole's own id": ("inter", inter("u0\t[PAD]\t3\t1"), r"x\.inter:4: item_id is \[PAD\], which RecBole reserves"),
    "a very long id": ("inter", inter(f"u0\t{'i' * 5000}\t3\t1"), r"x\.inter:4: item_id has 5,000 characters"),
    "an item twice": ("item", item("i0\tanother\t1\t0 0"), r"x\.item:4: item_id 'i0' is already in line 2"),
    "words for a number": ("item", item("i2\tx\tcheap\t0 0"), r"x\.item:4: price 'cheap' is no number; write a number"),
    "words in a vector": ("item", item("i2\tx\t1\t0.1 much"), r"x\.item:4: vector 'much' is no number"),
    "a rating in words": ("inter", inter("u0\ti2\t3\tgood"), r"x\.inter:4: rating 'good' is no number"),
}


# inspect counts what it can continue behind, so as to show all of it
COUNTED = {
    "no times", "a header alone", "an empty item", "RecBole's own id", "a very long id", "no time",
    "a time that is NaN", "a rating in words",
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_damage_is_one_line_with_its_place_and_inspect_says_the_same(what, capsys):
    kind, content, message = DAMAGED[what]
    plant(**{kind: content})
    with pytest.raises(UserError, match=message) as caught:
        load()
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()
    if kind == "inter" and what not in COUNTED:
        assert main(["inspect", "x"]) == 2
        said = capsys.readouterr().err.strip().removeprefix("recbole-mllm: ")
        assert said.split("(")[0].strip() == str(caught.value).split("(")[0].strip()


def test_every_model_of_ours_is_told_the_same():
    plant(inter=inter("u0\ti2\t\t1"))
    for model, keys in (("MLLMMSR", {}), ("SASRec", {"loss_type": "BPR"})):
        with pytest.raises(UserError, match=r"x\.inter:4: timestamp is missing"):
            load(model, **keys)
    assert load("BPR", frozen_candidates=None).inter_num == len(ROWS)  # a stock run of another model stays stock


SOUND = {
    "a byte order mark": {"inter": b"\xef\xbb\xbf" + GOOD["inter"]},
    "carriage returns and line feeds": {"inter": GOOD["inter"].replace(b"\n", b"\r\n")},
    "no last line end": {"inter": GOOD["inter"][:-1]},
    "empty lines": {"inter": GOOD["inter"].replace(b"\nu3", b"\n\nu3", 1)},
    "titles in quotes": {"item": item('i2\t"Heroes"\t1\t0 0')},
    "quotes inside": {"item": item('i2\tthe "Heroes" and 12"\t1\t0 0')},
    "an item twice, the same": {"item": text(ITEM_HEAD, [*ITEMS, ITEMS[0]])},
    "a rating left out": {"inter": inter("u0\ti2\t3\t")},
    "other values left out": {"item": item("i2\t\tNA\t"), "user": text(USER_HEAD, USERS, "u2\t")},
    "a separator of its own": {k: v.replace(b"\t", b"|") for k, v in GOOD.items()},
}  # fmt: skip


@pytest.mark.parametrize("what", SOUND)
def test_what_recbole_reads_rightly_is_read(what, monkeypatch):
    plant(**SOUND[what])
    keys = {"field_separator": "|"} if "separator" in what else {}
    found, stock = load(**keys), load("Pop", frozen_candidates=None, **keys)
    assert found.inter_num == len(ROWS) and found.item_num == 10 and found.user_num == 7
    for name in ("inter_feat", "item_feat", "user_feat"):
        one, two = getattr(found, name), getattr(stock, name)
        assert one.astype(str).equals(two.astype(str))
    plant()  # a plain file is never read value by value
    monkeypatch.setattr(checking, "check_file", lambda *_: pytest.fail("the quick look was enough"))
    assert load().inter_num == len(ROWS)


def test_a_column_that_is_not_loaded_may_hold_anything():
    plant(inter=inter("u0\ti2\t3\tgood"), item=item("i2\tx\tcheap\t0 0"))
    load_col = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "title"]}
    assert load(load_col=load_col).inter_num == len(ROWS)
    plant(item=b"not even a table\x00")
    assert load(load_col={"inter": load_col["inter"]}).inter_num == len(ROWS)


def test_another_encoding_is_read_where_it_is_set():
    plant(**{kind: content.decode().replace("u0", "ü0").encode("latin-1") for kind, content in GOOD.items()})
    assert "ü0" in load(encoding="latin-1").field2token_id["user_id"]
    with pytest.raises(UserError, match=r"x\.inter:2: byte 1 is no UTF-8"):
        load()
    with pytest.raises(UserError, match="there is no encoding 'latin-one'"):
        load(encoding="latin-one")


@pytest.mark.parametrize("kind", ["inter", "item", "user"])
def test_a_folder_or_a_link_that_leads_nowhere_is_no_file(kind):
    path = plant() / f"x.{kind}"
    path.unlink()
    for put in (path.mkdir, lambda: path.symlink_to("nowhere")):
        put()
        with pytest.raises(UserError, match=rf"x\.{kind} is no file; put one in its place"):
            load()
        assert kind == "user" or main(["inspect", "x"]) == 2
        path.rmdir() if path.is_dir() else path.unlink()


def test_what_is_not_there_is_named():
    with pytest.raises(UserError, match=r"x\.train\.inter does not exist; .*filename names \['train', 'test'\]"):
        plant() and load(benchmark_filename=["train", "test"])
    with pytest.raises(UserError, match=r"x\.inter:1: rows are ordered by time, and TIME_FIELD is null; name the"):
        load("MLLMMSR", TIME_FIELD=None)
    plant(item=b"")
    with pytest.raises(UserError, match=r"x\.item is empty; .* such as item_id:token"):
        load()
    Path("x/x.inter").unlink()
    with pytest.raises(UserError, match=r"^x/x\.inter does not exist; interactions are read from it"):
        load()


def test_a_file_that_may_not_be_read_is_one_line():
    plant()
    path = Path("x/x.inter")
    path.chmod(0)
    user = os.geteuid()
    os.seteuid(user or 65_534)  # root may read anything
    try:
        with pytest.raises(UserError, match=r"x\.inter cannot be read: Permission denied"):
            checking.check_file(path, checking.Rules(("user_id",)))
    finally:
        os.seteuid(user)


def test_a_run_stops_with_exit_code_2_before_a_model_is_loaded(monkeypatch, capsys):
    folder = small_world.write(Path("dataset"))
    good = (folder / "steps.inter").read_text()
    (folder / "steps.inter").write_text(good.replace("u03\ti08\t3\n", "u03\ti08\n"))
    monkeypatch.setattr("recbole_mllm.mllm.loading.load", lambda *_, **__: pytest.fail("loaded"), raising=False)
    plan = ["plan", "--dataset", "steps", "--mllm=tiny"]
    summarize = ["summarize", "--dataset", "steps", "--mllm=tiny"]
    export = ["candidates", "export", "--dataset", "steps", "--out", "c.jsonl.gz"]
    run, ours = (["--model", model, "--dataset", "steps"] for model in ("BPR", "MLLMMSR"))
    for words in (run, [*ours, "--mllm=tiny"], plan, summarize, export):
        assert main(words) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].endswith("steps.inter:25: 2 values for 3 columns; check for stray tabs"), words


def leaving(lengths, items=40):
    """Plant users of so many interactions each."""
    rows = [f"u{u}\ti{(u + t) % items}\t{t}\t1" for u, length in enumerate(lengths) for t in range(length)]
    plant(inter=text(HEAD, rows), item=text(ITEM_HEAD, [f"i{n}\tx\t1\t0 0" for n in range(items)]))


@pytest.mark.parametrize("model", ["BPR", "MLLMMSR"])
@pytest.mark.parametrize(
    ("lengths", "keys", "message"),
    [
        ([1] * 9, {}, r"no row of x is left to (train|test) on, of 9 users; leaving one out tests users of at least 3"),
        ([2] * 9, {}, r"no row of x is left to test on, of 9 users; leaving one out"),
        ([5] * 9, {"user_inter_num_interval": "[100,inf)"}, "no interaction of x is left after filtering; loosen user"),
        ([5, 5, 40], {}, r"user u2 (has met all 40 items|leaves fewer than 5 items)"),
        ([36] * 3, {}, r"user u0 leaves fewer than 5 items"),
    ],
)
def test_a_dataset_that_leaves_nothing_is_one_line(model, lengths, keys, message):
    leaving(lengths)
    with pytest.raises(UserError, match=message):
        split(model, **keys)


def split(model, **keys):
    from recbole.data import data_preparation

    dataset = load(model, load_col={"inter": ["user_id", "item_id", "timestamp"]}, **keys)
    return data_preparation(dataset.config, dataset)


def test_nothing_to_validate_on_is_told_and_nothing_to_tune_on_refused(caplog):
    from recbole_mllm.quick_start import make_config, validate

    leaving([3] * 9)
    split("BPR")
    assert "no row of x is left to validate on, of 9 users; leaving one out tests users of at least 3" in caplog.text
    base = {"data_path": ".", "gpu_id": "", "epochs": 1, "frozen_candidates": True, "load_col": None}
    base["eval_args"] = {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "uni5", "group_by": "user"}
    with pytest.raises(UserError, match="no row of x is left to validate on"):
        validate(make_config("BPR", "x", [], base))


@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_a_benchmark_file_without_rows_is_named(part):
    folder = plant()
    for n, name in enumerate(("train", "valid", "test")):
        row = "" if name == part else f"u{n}\ti1 i2\ti3\n"
        (folder / f"x.{name}.inter").write_text("user_id:token\titem_id_list:token_seq\titem_id:token\n" + row)
    with pytest.raises(UserError, match=rf"x\.{part}\.inter holds no row behind its header; write the interactions"):
        load("SASRec", loss_type="BPR", benchmark_filename=["train", "valid", "test"])
