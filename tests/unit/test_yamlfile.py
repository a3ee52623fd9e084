"""YAML files: whatever is wrong with one is a line that names the file, and the line where there is one."""

import sys
from pathlib import Path

import pytest
from recbole.config import Config

from recbole_mllm.common.config import checked_file, every_key, is_model
from recbole_mllm.common.yaml_files import check_readable, line_of, read_mapping
from recbole_mllm.errors import UserError

UNREADABLE = {
    "latin-1": ("a: 1\nb: é\n".encode("latin-1"), ":2: it is not UTF-8 (byte 0xe9), maybe Latin-1"),
    "UTF-16": ("a: 1\n".encode("utf-16"), " is UTF-16; save it as UTF-8"),
    "UTF-16 without a mark": ("epochs: 1\n".encode("utf-16-le"), " is UTF-16; save it as UTF-8"),
    "binary": (b"a: 1\n\x00\x01\x02" + bytes(range(128, 255)), ":2: it holds a NUL byte"),
    "a control character": (b"a: 1\nb: \x07\n", ":2: it holds a control character (code 7)"),
    "a list": (b"- a\n- b\n", ":1: it must hold `key: value` lines, and here is a list"),
    "a text": (b"\nhello\n", ":2: it must hold `key: value` lines, and here is a single value"),
    "a mistake": (b"a: 1\nb: c: d\n", ":2: it is no valid YAML: mapping values are not allowed here"),
    "a tab": (b"a:\n\tb: 1\n", ":2: it is no valid YAML"),
    "two documents": (b"a: 1\n---\nb: 2\n", ":2: it is no valid YAML: expected a single document"),
    "an alias of nothing": (b"a: 1\nb: *x\n", ":2: it is no valid YAML: found undefined alias 'x'"),
    "deep": (b"a: " + b"[" * 5_000, " is nested too deeply"),
}
REFUSED = {
    "a Python object": (
        b'a: 1\nb: !!python/object/apply:os.system ["touch made"]\n',
        ":2: the tag !!python/object/apply",
    ),
    "a Python tuple": (b"b: !!python/tuple [1]\n", ":1: the tag !!python/tuple is not read"),
    "a tag of nobody's": (b"b: !foo x\n", ":1: the tag !foo is not read"),
    "a key twice": (b"a: 1\nb: 2\na: 3\n", ":3: a stands there already, on line 1"),
    "an inner key twice": (b"a:\n  x: 1\n  x: 2\n", ":3: x stands there already, on line 2"),
    "no date": (b"a: 1\nb: 2026-02-30\n", ":2: the value cannot be read (day is out of range"),
    "a huge number": (b"a: " + b"9" * 5000, ":1: the value cannot be read (Exceeds the limit"),
    "a list in itself": (b"a: &a [*a]\n", ":1: it is no valid YAML: found unconstructable recursive node"),
}


@pytest.mark.parametrize(("data", "said"), [*UNREADABLE.values(), *REFUSED.values()], ids=[*UNREADABLE, *REFUSED])
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, monkeypatch, data, said):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "my.yaml"
    path.write_bytes(data)
    with pytest.raises(UserError) as found:
        read_mapping(path)
    assert f"{path}{said}" in str(found.value) and "\n" not in str(found.value)
    assert not (tmp_path / "made").exists()


def test_a_file_that_is_not_there_or_a_folder_says_so(tmp_path):
    with pytest.raises(UserError, match=r"my\.yaml cannot be read: No such file"):
        read_mapping(tmp_path / "my.yaml")
    with pytest.raises(UserError, match="is no file; put a YAML file in its place"):
        read_mapping(tmp_path)


@pytest.mark.parametrize("text", ["", "# nothing\n", "null\n", "\ufeff\n"])
def test_an_empty_file_has_no_keys(tmp_path, text):
    (tmp_path / "my.yaml").write_text(text)
    assert read_mapping(tmp_path / "my.yaml") == {} and not check_readable(tmp_path / "my.yaml")


def test_values_are_read_as_recbole_reads_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run"])
    path = tmp_path / "my.yaml"
    path.write_text(
        "\ufefflearning_rate: 1e-3\nweight_decay: 1.5E-2\nseed: 7\nx: &x {a: 1}\ny: {<<: *x, b: off}\nn: 1_000\n"
    )
    read = read_mapping(path)
    assert read["learning_rate"] == 0.001 and read["y"] == {"a": 1, "b": False} and read["n"] == 1000
    stock = Config(model="BPR", dataset="ml-100k", config_file_list=[str(path)]).file_config_dict
    assert stock == read
    assert line_of(path, "seed") == 3 and line_of(path, "y", "b") == 5 and line_of(path, "z") is None


@pytest.mark.parametrize("case", UNREADABLE)
def test_recbole_is_not_given_what_nobody_can_read(tmp_path, monkeypatch, case):
    monkeypatch.setattr(sys, "argv", ["run"])
    path = tmp_path / "my.yaml"
    path.write_bytes(UNREADABLE[case][0])
    with pytest.raises(UserError, match="my.yaml"):
        Config(model="BPR", dataset="ml-100k", config_file_list=[path])


def test_a_stock_run_of_a_stock_model_keeps_what_recbole_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run"])
    path = tmp_path / "mine.yaml"
    path.write_text("my_own_key: 1\nepochs: 3\nepochs: 4\nsizes: !!python/tuple [1, 2]\nlearning_rate: 0.0\n")
    (tmp_path / "empty.yaml").write_text("")
    config = Config(model="BPR", dataset="ml-100k", config_file_list=[path, tmp_path / "empty.yaml"])
    assert (config["my_own_key"], config["epochs"], config["sizes"]) == (1, 4, (1, 2))
    with pytest.raises(UserError, match=r"mine\.yaml:3: epochs stands there already, on line 2"):
        Config(model="MLLMMSR", dataset="ml-100k", config_file_list=[path])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epohcs: 3\n", "unknown key 'epohcs' in {}:1; did you mean 'epochs'?"),
        ("seed: 1\nper_model:\n  SASRek: {epochs: 3}\n", "{}:3: per_model names 'SASRek', which is no model; did"),
        ("per_model: {sasrec: {epochs: 3}}", "'sasrec', which is no model; did you mean SASRec?"),
        ("per_model: {MLLMMSR:direct: {epochs: 3}}", "names models, not variants such as MLLMMSR:direct; write ML"),
        ("per_model:\n  SASRec:\n    epcohs: 4\n", "unknown key 'epcohs' in {}:3, per_model, SASRec; did you mean 'ep"),
        ("per_model: [SASRec]", "{}:1: per_model must hold a model's name"),
        ("benchmark_defaults: {tpok: [1]}", "unknown key 'tpok' in {}:1, benchmark_defaults; did you mean 'topk'?"),
        ("benchmark_defaults: {topk: [1]}", "{}:1: benchmark_defaults is read from properties/overall.yaml alone"),
    ],
)  # fmt: skip
def test_a_key_or_model_that_is_none_names_the_nearest(tmp_path, text, said):
    path = tmp_path / "my.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as found:
        checked_file(path)
    assert said.format(path) in str(found.value)


def test_a_models_own_keys_are_known_where_only_its_source_reads_them(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(
        "per_model: {AutoInt: {has_residual: true}, SASRec: {n_layers: 1}, Random: {seed: 1}, xgboost: null}"
    )
    with pytest.raises(UserError, match="per_model must hold"):  # null is no mapping
        checked_file(path)
    path.write_text(
        "per_model: {AutoInt: {has_residual: true}, SASRec: {n_layers: 1}, xgboost: {seed: 1}}\ntail_ratio: 0.1"
    )
    assert checked_file(path)["per_model"]["AutoInt"] == {"has_residual": True}
    assert {"use_filter", "lora_r", "train_batch_size", "USER_ID_FIELD", "data_path"} <= every_key()
    assert is_model("MLLMMSR") and is_model("KD_DAGFM") and not is_model("sasrec") and not is_model("../SASRec")


@pytest.mark.parametrize("what", ["folder", "link"])
def test_a_dataset_yaml_that_is_no_file_is_not_passed_over(tmp_path, monkeypatch, what):
    from recbole_mllm.health.layout import find_layout

    monkeypatch.setattr(sys, "argv", ["run"])
    path = tmp_path / "mine" / "dataset.yaml"
    path.parent.mkdir()
    (path.parent / "mine.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\nu\ti\t1\n")
    if what == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    for read in (
        lambda: Config(model="BPR", dataset="mine", config_dict={"data_path": str(tmp_path)}),
        lambda: find_layout(tmp_path / "mine", {}),
    ):
        with pytest.raises(UserError, match=r"dataset\.yaml is (no file|a link that leads nowhere); put a YAML file"):
            read()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("item_knd: movie\n", "unknown key 'item_knd' in {}:1; did you mean 'item_kind'?"),
        ("load_col: {}\nTIEM_FIELD: t\n", "unknown key 'TIEM_FIELD' in {}:2; did you mean 'TIME_FIELD'?"),
        ("a: [1,\n", "{}:2: it is no valid YAML"),
        ("- a\n", "{}:1: it must hold `key: value` lines"),
        ("per_model: {SASRec: {epochs: 3}}", "{}:1: per_model is not read here"),
        ("item_kind: movie\nblock_size: 0\n", "block_size is 0; it must be a whole number, at least 1 ({}:2)"),
        ("MAX_ITEM_LIST_LENGTH: 0\n", "MAX_ITEM_LIST_LENGTH is 0; it must be a whole number, at least 1 ({}:1)"),
    ],
)
@pytest.mark.parametrize("model", ["BPR", "MLLMMSR"])
def test_a_datasets_own_file_is_checked_in_every_run_and_by_inspect(tmp_path, monkeypatch, model, text, said):
    from recbole_mllm.health.layout import find_layout

    monkeypatch.setattr(sys, "argv", ["run"])
    path = tmp_path / "mine" / "dataset.yaml"
    path.parent.mkdir()
    path.write_text(text)
    (path.parent / "mine.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\nu\ti\t1\n")
    with pytest.raises(UserError) as found:
        Config(model=model, dataset="mine", config_dict={"data_path": str(tmp_path)})
    assert said.format(path) in str(found.value)
    if "must be a whole" not in said:  # `inspect` reads names and places alone
        with pytest.raises(UserError) as told:
            find_layout(Path(path.parent), {})
        assert str(told.value) == str(found.value)
