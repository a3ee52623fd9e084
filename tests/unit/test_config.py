"""Configuration: every shipped file parses; a wrong file, key or value is one line that names it and helps."""

from dataclasses import fields
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
import yaml
from recbole.config import Config
from stock_forward import KEYS

from recbole_mllm.common import settings
from recbole_mllm.common.config import (
    benchmark_defaults,
    check_keys,
    check_training,
    check_values,
    checked_file,
    completed,
    config_paths,
    every_key,
    is_model,
    per_model,
    recbole_config,
)
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.resources import PROPERTIES, named, resource
from recbole_mllm.common.settings import Settings, known_keys, mllm_keys
from recbole_mllm.common.yaml_files import check_readable, line_of, read_mapping
from recbole_mllm.inspect.measure import find_layout

PRESETS = {"demo", "ml-100k-posters", "microlens", "amazon2023", "paper", "llava-1.6-mistral-7b", "qwen2.5-vl-7b"}


def test_every_preset_the_design_names_is_there_and_parses():
    assert PRESETS | {"smolvlm-256m"} <= set(named("quick_start_config"))
    for name in named("quick_start_config"):
        keys = yaml.safe_load(resource("quick_start_config", name).read_text())
        Settings.from_config(KEYS | keys)
        for_all = set(keys) - mllm_keys() - {"per_model"}
        assert for_all <= {"MAX_ITEM_LIST_LENGTH"}, f"{name} would train every baseline of a benchmark with {for_all}"


def test_every_setting_stands_in_a_shipped_file_with_a_comment():
    text = (PROPERTIES / "model" / "MLLMMSR.yaml").read_text() + (PROPERTIES / "overall.yaml").read_text()
    missing = [key for key in known_keys() - {"note", "per_model"} if f"\n{key}:" not in f"\n{text}"]
    assert missing == []


NAN, INF = float("nan"), float("inf")
WRONG = {
    "summary_mode": ("recurent", None),
    "block_size": (0, -1, 1.5, NAN, INF, True, "3", None),
    "max_history": (0, 2.5, NAN, False),
    "lora_dropout": (1, -0.1, NAN, True),
    "summary_seed": (-1, 2**32, 1.5),
    "server_timeout": (0, INF, 10**9),
    "fusion": (-0.1, 1.5, NAN, True, "many"),
    "use_image": (1, "yes", None),
    "mllm": ("", " ", 5),
    "epochs": (-1, None, 0.5, NAN, True, "3"),
    "learning_rate": (0, -1e-3, NAN, INF, True, "fast"),
    "topk": ([], [0], [5, -1], 0, "5", [True], {}),
    "metrics": ([], 5, [5]),
    "valid_metric": (5, None),
    "device": ("gpu", 7, "cuda:x"),
    "eval_args": (
        5, {"mode": "uni0"}, {"mode": "uni-5"}, {"mode": "pop"}, {"mode": {"test": "unix"}}, {"mode": 20},
        {"split": {"RS": [0.8, -0.1, 0.3]}}, {"split": {"RS": [0, 0, 0]}}, {"split": {"RS": ["a"]}},
        {"split": {"RS": [8, 2]}}, {"split": {"LS": "valid_test"}}, {"split": {"XS": [8, 1, 1]}}, {"split": ["LS"]},
        {"split": {"RS": [8, 1, 1], "LS": "valid_and_test"}}, {"order": "to"}, {"order": None},
    ),
    "LIST_SUFFIX": ("", 5),
    "train_neg_sample_args": ({"sample_num": 0}, {"sample_num": True}, {"alpha": NAN}, {"candidate_num": -1}),
    "show_progress": ("False", "maybe", 2),
    "field_separator": ("",),
    "user_inter_num_interval": (5, "[x,inf)", "5", "[5,inf", "[3,1]", ""),
    "val_interval": ("[3,inf)", {"rating": "3"}, {"rating": 3}, {"rating": None}),
    "rm_dup_inter": ("middle", False, True),
    "load_col": ([], ["user_id"], {"iter": ["user_id"]}, {"inter": "user_id"}, {"inter": []}, {"inter": None}),
    "benchmark_filename": ("train", [], [1, 2]),
    "clip_grad_norm": (5, {"max_norm": 0}, {"max_norm": NAN}, {"max_norm": True}),
}  # fmt: skip
SAID = {
    "lora_dropout": "lora_dropout is 1; it must be a number, at least 0 and below 1",
    "max_history": "max_history is 0; it must be a whole number, at least 1, or null",
    "use_image": "use_image is 1; it must be true or false",
    "summary_mode": "summary_mode is 'recurent'; it must be one of recurrent, direct, none",
}


@pytest.mark.parametrize("key", WRONG)
def test_a_value_that_is_none_names_key_value_range_and_place(key):
    said = []
    for value in WRONG[key]:
        with pytest.raises(UserError) as found:
            check_values({key: value}, lambda key: "my.yaml:3")
        said.append(str(found.value))
        assert said[-1].startswith(key) and "; it must be " in said[-1] and said[-1].endswith(" (my.yaml:3)"), value
        assert "\n" not in said[-1] and len(said[-1]) < 300
    assert said[0] == f"{SAID[key]} (my.yaml:3)" if key in SAID else True


def test_what_recboles_own_documentation_writes_is_taken():
    """From its guide and its published configurations; a stricter check must not refuse what has always run."""
    check_values(
        {
            "load_col": {"inter": ["user_id", "item_id"], "kg": ["head_id"], "item": "*", "user": []},
            "unload_col": {"inter": ["timestamp"]}, "user_inter_num_interval": "[0,1];(10, inf)",
            "item_inter_num_interval": None, "rm_dup_inter": "last", "benchmark_filename": ["train", "valid", "test"],
            "val_interval": {"rating": "[3,inf)", "timestamp": "[1356969600, 1404144000)", "genre": ["Drama"]},
            "field_separator": "\t", "show_progress": False, "normalize_all": None, "checkpoint_dir": "saved",
        }
    )  # fmt: skip


def test_every_number_of_ours_has_a_range_and_every_default_is_in_it():
    for group in settings._GROUPS:
        for key, hint in get_type_hints(group, include_extras=True).items():
            kinds = {hint, *(get_args(hint) if get_origin(hint) is not Annotated else ())}
            assert not {int, float} & kinds, f"{key} of {group.__name__} is a number without a range"
        assert {field.name for field in fields(group)} <= known_keys()
    shipped = yaml.safe_load((PROPERTIES / "overall.yaml").read_text())
    check_values(KEYS | shipped | shipped["benchmark_defaults"])


def test_numbers_at_the_ends_of_their_ranges_and_a_bare_off_are_taken():
    check_values({"lora_dropout": 0, "warmup_ratio": 1, "summary_temperature": 0, "fusion": 1, "limit_users": 1,
                  "candidate_seed": 2**32 - 1, "block_size": 3.0, "topk": 5, "epochs": 0, "eval_step": 0,
                  "eval_args": {"mode": {"valid": "uni1", "test": "labeled"}, "split": {"RS": [8, 1, 1]}}})  # fmt: skip
    assert Settings.from_config(KEYS | yaml.safe_load("summarize: off")).summary.summarize == "off"


def test_an_unknown_key_or_preset_names_the_nearest():
    with pytest.raises(UserError, match="unknown key 'lora_rnk' in my.yaml; did you mean lora_"):
        check_keys(["lora_rnk"], "my.yaml")
    check_keys(["learning_rate", "hidden_size", "lora_r", "eval_args"], "my.yaml")
    assert config_paths(["demo"]) == [str(resource("quick_start_config", "demo"))]
    with pytest.raises(UserError, match="is no preset; presets: .*demo"):
        config_paths(["dmeo"])


def test_a_section_for_one_model_is_read_for_it_alone(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("per_model: {SASRec: {epochs: 3, hidden_size: 8}}")
    two.write_text("per_model: {SASRec: {epochs: 4}}")
    assert per_model([str(one), str(two)], "SASRec") == {"epochs": 4, "hidden_size": 8}
    assert per_model([str(one)], "GRU4Rec") == {}
    two.write_text("epochs: 5\nhidden_size: 32\nn_layers: 1\nper_model: {SASRec: {epochs: 4}}")
    assert per_model([str(one), str(two)], "SASRec") == {"epochs": 4, "hidden_size": 32}, "a later plain key wins"
    assert per_model([str(two), str(one)], "SASRec") == {"epochs": 3, "hidden_size": 8}


def test_the_benchmark_compares_on_leave_one_out_with_twenty_candidates():
    assert benchmark_defaults()["eval_args"]["mode"] == {"valid": "uni20", "test": "uni20"}
    assert benchmark_defaults()["valid_metric"] == "NDCG@10"


def test_a_part_of_eval_args_leaves_the_other_parts_as_they_are():
    """RecBole would split by shares, in random order."""
    defaults = benchmark_defaults()
    found = completed(defaults, {"eval_args": {"mode": "full"}, "topk": [1]})
    assert found["eval_args"] == defaults["eval_args"] | {"mode": "full"} and found["topk"] == [1]
    assert completed(defaults, {}) == defaults


# YAML files


UNREADABLE = {
    "latin-1": ("a: 1\nb: é\n".encode("latin-1"), ":2: it is not UTF-8 (byte 0xe9); save it as UTF-8"),
    "UTF-16": ("a: 1\n".encode("utf-16"), ":1: it is not UTF-8"),
    "UTF-16 without a mark": ("epochs: 1\n".encode("utf-16-le"), ":1: it holds a control character (code 0); remove"),
    "a control character": (b"a: 1\nb: \x07\n", ":2: it holds a control character (code 7)"),
    "a list": (b"- a\n- b\n", ":1: it must hold `key: value` lines, and here is a list"),
    "a text": (b"\nhello\n", ":2: it must hold `key: value` lines, and here is a single value"),
    "a mistake": (b"a: 1\nb: c: d\n", ":2: it is no valid YAML: mapping values are not allowed here"),
    "a tab": (b"a:\n\tb: 1\n", ":2: it is no valid YAML"),
    "two documents": (b"a: 1\n---\nb: 2\n", ":2: it is no valid YAML: expected a single document"),
    "an alias of nothing": (b"a: 1\nb: *x\n", ":2: it is no valid YAML: found undefined alias 'x'"),
    "deep": (b"a: " + b"[" * 500, " is nested too deeply"),
}
REFUSED = {
    "a Python object": (b'a: 1\nb: !!python/object/apply:os.system ["touch made"]\n', ":2: it is no valid YAML: "),
    "a tag of nobody's": (b"b: !foo x\n", ":1: it is no valid YAML: could not determine a constructor"),
    "a key twice": (b"a: 1\nb: 2\na: 3\n", ":3: it is no valid YAML: a stands there already, on line 1; keep"),
    "an inner key twice": (b"a:\n  x: 1\n  x: 2\n", ":3: it is no valid YAML: x stands there already, on line 2"),
    "no date": (b"a: 1\nb: 2026-02-30\n", ":2: the value cannot be read (day is out of range"),
    "a huge number": (b"a: " + b"9" * 5000, ":1: the value cannot be read (Exceeds the limit"),
    "a list in itself": (b"a: &a [*a]\n", ":1: it is no valid YAML: found unconstructable recursive node"),
}  # fmt: skip


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


def test_values_are_read_as_recbole_reads_them(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(
        "\ufefflearning_rate: 1e-3\nweight_decay: 1.5E-2\nseed: 7\nx: &x {a: 1}\ny: {<<: *x, a: 2, b: off}\nn: 1_000\n"
    )
    read = read_mapping(path)
    assert read["learning_rate"] == 0.001 and read["y"] == {"a": 2, "b": False} and read["n"] == 1000
    stock = Config(model="BPR", dataset="ml-100k", config_file_list=[str(path)]).file_config_dict
    assert stock == read
    assert line_of(path, "seed") == 3 and line_of(path, "y", "b") == 5 and line_of(path, "z") is None


def test_a_stock_run_of_a_stock_model_is_given_what_recbole_takes_and_nothing_that_nobody_can_read(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("my_own_key: 1\nepochs: 3\nepochs: 4\nsizes: !!python/tuple [1, 2]\nlearning_rate: 0.0\n")
    (tmp_path / "empty.yaml").write_text("")
    config = Config(model="BPR", dataset="ml-100k", config_file_list=[path, tmp_path / "empty.yaml"])
    assert (config["my_own_key"], config["epochs"], config["sizes"]) == (1, 4, (1, 2))
    with pytest.raises(UserError, match=r"mine\.yaml:3: it is no valid YAML: epochs stands there already, on line 2"):
        Config(model="MLLMMSR", dataset="ml-100k", config_file_list=[path])
    for data in (UNREADABLE["latin-1"][0], UNREADABLE["a list"][0], UNREADABLE["two documents"][0]):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"mine\.yaml"):
            Config(model="BPR", dataset="ml-100k", config_file_list=[path])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epohcs: 3\n", "unknown key 'epohcs' in {}:1; did you mean epochs?"),
        ("seed: 1\nper_model:\n  SASRek: {epochs: 3}\n", "{}:3: per_model names 'SASRek', which is no model; did"),
        ("per_model: {sasrec: {epochs: 3}}", "'sasrec', which is no model; did you mean SASRec?"),
        ("per_model: {MLLMMSR:direct: {epochs: 3}}", "'MLLMMSR:direct', which is no model; did you mean MLLMMSR?"),
        ("per_model:\n  SASRec:\n    epcohs: 4\n", "unknown key 'epcohs' in {}:3, per_model, SASRec; did you mean ep"),
        ("per_model: [SASRec]", "{}:1: per_model must hold a model's name"),
        ("per_model: {SASRec: 5}", "{}:1: per_model must hold a model's name"),
        ("benchmark_defaults: {topk: [1]}", "{}:1: benchmark_defaults is not read here; write its keys as they are"),
    ],
)  # fmt: skip
def test_a_key_or_model_that_is_none_names_the_nearest(tmp_path, text, said):
    path = tmp_path / "my.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as found:
        checked_file(path)
    assert said.format(path) in str(found.value)


def test_whole_numbers_with_a_point_are_whole_numbers_to_recbole():
    given = {"epochs": 2.0, "train_batch_size": 64.0, "seed": 3.0, "topk": [10.0], "learning_rate": 1}
    config = recbole_config("Pop", "mine", [], given | {"data_path": "."})
    read = {key: config[key] for key in given}
    assert read == given and [type(read[key]) for key in given] == [int, int, int, list, int]
    assert type(read["topk"][0]) is int
    check_training(config)


def test_lists_without_an_end_are_refused_of_the_models_that_have_lists():
    keys = {"MAX_ITEM_LIST_LENGTH": None, "train_neg_sample_args": None, "data_path": "."}
    assert recbole_config("Pop", "mine", [], keys)["MAX_ITEM_LIST_LENGTH"] is None
    with pytest.raises(UserError, match="MAX_ITEM_LIST_LENGTH is None; it must be a whole number, at least 1, for S"):
        recbole_config("SASRec", "mine", [], keys)


def test_a_models_own_keys_are_known_where_only_its_source_reads_them(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(
        "per_model: {AutoInt: {has_residual: true}, SASRec: {n_layers: 1}, xgboost: {seed: 1}}\ntail_ratio: 0.1"
    )
    assert checked_file(path)["per_model"]["AutoInt"] == {"has_residual": True}
    assert {"use_filter", "lora_r", "train_batch_size", "USER_ID_FIELD", "data_path"} <= every_key()
    assert is_model("MLLMMSR") and is_model("KD_DAGFM") and not is_model("sasrec") and not is_model("../SASRec")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("load_col: {}\nTIEM_FIELD: t\n", "unknown key 'TIEM_FIELD' in {}:2; did you mean TIME_FIELD?"),
        ("a: [1,\n", "{}:2: it is no valid YAML"),
        ("per_model: {SASRec: {epochs: 3}}", "{}:1: per_model is not read here"),
        (None, "{} is a link that leads nowhere; put a YAML file in its place"),
        ("item_kind: movie\nblock_size: 0\n", "block_size is 0; it must be a whole number, at least 1 ({}:2)"),
    ],
)
def test_a_datasets_own_file_is_checked_in_every_run_and_by_inspect(tmp_path, text, said):
    path = tmp_path / "mine" / "dataset.yaml"
    path.parent.mkdir()
    (path.parent / "mine.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\nu\ti\t1\n")
    path.symlink_to("nowhere") if text is None else path.write_text(text)
    keys = {"dataset": "mine", "config_dict": {"data_path": str(tmp_path)}}
    reads = [lambda: Config(model="BPR", **keys), lambda: Config(model="MLLMMSR", **keys)]
    if "must be a whole" not in said:  # `inspect` reads names and places alone
        reads.append(lambda: find_layout(path.parent, {}))
    for read in reads:
        with pytest.raises(UserError) as found:
            read()
        assert said.format(path) in str(found.value)
